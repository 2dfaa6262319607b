from __future__ import annotations

import asyncio

import pytest
from in_process import PHOTO, encoded, pixels, service_of
from tiny_farm import TinyFarm

from farm.serve import replicas as module
from farm.serve.editor import Editor
from farm.serve.problems import BusyError
from farm.serve.replicas import Replicas
from farm.serve.settings import Settings


def test_as_many_photos_may_wait_as_there_are_replicas_for():
    replicas = Replicas(max_waiting=2)
    assert replicas.limit == 3
    for name in ("a", "b", "a"):
        replicas.hear({"replica": name})
    replicas.hear({})
    assert (replicas.limit, replicas.reports.keys()) == (6, {"a", "b"})
    with replicas.editing(4), replicas.editing(2):
        with pytest.raises(BusyError), replicas.editing():
            pass
        assert replicas.under_way == 6
    with replicas.editing(16), pytest.raises(BusyError):  # more than fit, when nothing else is under way
        replicas.admit()
    assert replicas.under_way == 0
    with pytest.raises(RuntimeError), replicas.editing():
        raise RuntimeError
    assert replicas.under_way == 0


def test_replicas_that_are_gone_count_no_longer(monkeypatch):
    replicas = Replicas(fewest=2, max_waiting=2)
    for name in "abc":
        replicas.hear({"replica": name})
    assert replicas.limit == 9
    monkeypatch.setattr(module, "REMEMBERED_SECONDS", -1)
    assert (replicas.limit, replicas.reports) == (6, {})


@pytest.fixture(scope="module")
def farm(tmp_path_factory):
    farm = TinyFarm(tmp_path_factory.mktemp("farm") / "store")
    farm.publish("fog", seed=1)
    farm.publish("ink", seed=2)
    return farm


def test_more_than_may_wait_are_refused_at_once(farm):
    """Requests at the same moment: those that are taken are edited as they would be alone."""
    service = service_of(farm, max_waiting=2)
    alone = pixels(service.edit("ink", encoded(PHOTO)))

    async def at_once() -> list:
        import httpx

        async with httpx.AsyncClient(transport=service.transport, base_url="http://farm") as client:
            return await asyncio.gather(*(client.post("/v1/edit/ink", content=encoded(PHOTO)) for _ in range(12)))

    answers = asyncio.run(at_once())
    kept = [answer for answer in answers if answer.status_code == 200]
    assert len(kept) == 3
    assert all((pixels(answer) == alone).all() for answer in kept)
    refused = [answer for answer in answers if answer.status_code == 503]
    assert len(refused) == 9 and all(answer.headers["retry-after"] == "1" for answer in refused)
    assert service.edit("ink", encoded(PHOTO)).status_code == 200
    service.close()


def test_a_check_is_a_real_edit_and_damaged_adapters_are_not_the_replicas_fault(tmp_path):
    farm = TinyFarm(tmp_path / "store")
    editor = Editor(Settings(store=farm.store.url, cache_mb=1))
    assert editor.check()["adapters"] == 0  # nothing is published: nothing can fail
    damaged = farm.publish("fog", seed=1)
    sound = farm.publish("ink", seed=2)
    farm.store.put(f"{damaged.adapter}/adapter_model.safetensors", b"")
    editor = Editor(Settings(store=farm.store.url, cache_mb=1))
    assert editor.check()["adapters"] == 1
    for entry in (damaged, sound):
        farm.store.put(f"{entry.adapter}/adapter_model.safetensors", b"")
    assert editor.check()["adapters"] == 1  # a real edit succeeded lately
    with pytest.raises(Exception, match="adapter_model"):
        Editor(Settings(store=farm.store.url, cache_mb=1)).check()


def test_jobs_of_two_bases_are_edited_together(tmp_path):
    farm = TinyFarm(tmp_path / "store")
    farm.publish("ink", seed=2)
    farm.publish("fog", seed=1, base=farm.add_base(seed=5))
    editor = Editor(Settings(store=farm.store.url, cache_mb=1))
    gathered = []

    async def all_at_once() -> tuple[list, list]:
        arrived = asyncio.Event()

        async def collect(job):
            gathered.append(job)
            if len(gathered) == 4:
                arrived.set()
            await arrived.wait()
            edits = await editor.together(gathered)
            return edits[gathered.index(job)]

        from farm.serve.editing import Wanted

        wanted = [Wanted(concept=c, strength=s) for c, s in (("ink", 1), ("fog", 1), ("ink", 0.5), ("fog", 0.5))]
        alone = [await editor.edit(one, PHOTO) for one in wanted]
        editor.collect = collect
        return alone, await asyncio.gather(*(editor.edit(one, PHOTO) for one in wanted))

    alone, together = asyncio.run(all_at_once())
    for one, other in zip(alone, together, strict=True):
        assert (one.image == other.image).all() and one.digest == other.digest
