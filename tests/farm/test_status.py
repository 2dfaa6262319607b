from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stage_farm import CONCEPTS, copied, one_thread, plan_of

from farm.glance import Documents, kept_at
from farm.plan import Plan
from farm.queue import Queue, owner_name
from farm.registry import Registry
from farm.standing import look
from farm.status import farm_status
from farm.store import LocalStore, Store


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def states(store: Store, plan: Plan) -> dict[str, tuple[str, str, str]]:
    rows = farm_status(store, plan)["concepts"]
    return {row["id"]: tuple(row["stages"][s] for s in ("edits", "adapter", "published")) for row in rows}


def test_an_empty_store(tmp_path: Path) -> None:
    found = farm_status(LocalStore(tmp_path), plan_of(tmp_path))
    assert found["farm"] == "stages" and found["store"] == tmp_path.as_uri()
    assert found["stages"] == dict.fromkeys(("sources", "selection", "base", "ranks"), "missing")
    assert [row["id"] for row in found["concepts"]] == list(CONCEPTS)
    for row in found["concepts"]:
        assert row["stages"] == {"edits": "missing", "adapter": "missing", "published": "missing"}
        assert row["published"] is None and not row["current"] and row["metrics"] is None and row["error"] is None
        assert row["prompt"] == f"in the style {row['id']}" and row["domain"] == "scenery"
    assert list(LocalStore(tmp_path).list()) == []


def test_a_finished_farm(root: Path) -> None:
    found = farm_status(LocalStore(root), plan_of(root))
    assert found["stages"] == dict.fromkeys(("sources", "selection", "base", "ranks"), "done")
    for row in found["concepts"]:
        assert set(row["stages"].values()) == {"done"}
        assert row["published"] == 1 and row["current"] and row["error"] is None
        assert row["metrics"]["n"] == 12 and row["metrics"]["l1"] > 0
    assert [row["role"] for row in found["concepts"]] == ["base", "base", "ranks", "adapter"]


def test_edits_half_done(root: Path, tmp_path: Path) -> None:
    store, plan = LocalStore(tmp_path), plan_of(tmp_path)
    store.put(f"{plan.edits('sepia').path}/part-00001.parquet", b"a part")
    assert states(store, plan)["sepia"] == ("partial", "missing", "missing")
    assert states(store, plan)["night"] == ("missing", "missing", "missing")


def test_the_queues_states(root: Path, tmp_path: Path) -> None:
    store, plan = copied(root, tmp_path / "farm", "edits", "quality"), plan_of(root)
    queue = Queue(store, "adapters")
    for concept in ("charcoal", "night", "sepia"):
        queue.enqueue(plan.adapter_key(concept), {"concept": concept})
    lease = queue.lease(owner_name(), 60, among={plan.adapter_key("night")})
    assert lease is not None
    broken = queue.lease(owner_name(), 60, among={plan.adapter_key("sepia")})
    assert broken is not None
    queue.fail(broken, "Traceback (most recent call last):\n  …\nValueError: no luck\n", 1)
    assert {name: state[1] for name, state in states(store, plan).items()} == {
        "charcoal": "queued",
        "cyanotype": "missing",
        "night": "running",
        "sepia": "failed",
    }
    errors = {row["id"]: row["error"] for row in farm_status(store, plan)["concepts"]}
    assert errors == {"charcoal": None, "cyanotype": None, "night": None, "sepia": "ValueError: no luck"}

    # A worker that fell silent does not run, and what was queued of another plan is not this one's.
    queue.release(lease)
    assert queue.lease("elsewhere:1:1", 0, among={plan.adapter_key("night")}) is not None
    assert states(store, plan)["night"][1] == "queued"
    other = plan_of(root, catalogue__0__prompt="in charcoal")
    assert {state[1] for state in states(store, other).values()} == {"missing"}


def test_a_failure_without_words_is_a_failure(tmp_path: Path) -> None:
    store, plan = LocalStore(tmp_path), plan_of(tmp_path)
    queue = Queue(store, "adapters")
    queue.enqueue(plan.adapter_key("sepia"), {"concept": "sepia"})
    lease = queue.lease(owner_name(), 60)
    assert lease is not None
    queue.fail(lease, "", 1)
    assert states(store, plan)["sepia"][1] == "failed"


def test_an_adapter_that_is_there_is_done_whatever_the_queue_says(root: Path, tmp_path: Path) -> None:
    store, plan = copied(root, tmp_path / "farm", "adapters"), plan_of(root)
    queue = Queue(store, "adapters")
    queue.enqueue(plan.adapter_key("sepia"), {"concept": "sepia"})
    assert states(store, plan)["sepia"] == ("missing", "done", "missing")


def test_a_published_adapter_of_another_plan_is_not_current(root: Path) -> None:
    other = plan_of(root, catalogue__3__prompt="an old photograph")
    [row] = [row for row in farm_status(LocalStore(root), other)["concepts"] if row["id"] == "sepia"]
    assert row["published"] == 1 and not row["current"]
    assert row["stages"] == {"edits": "missing", "adapter": "missing", "published": "missing"}
    assert row["metrics"] is None
    assert Registry(LocalStore(root)).get("sepia") is not None


class Asked:
    """A store that counts what is asked of it."""

    def __init__(self, store: Store) -> None:
        self.store, self.calls = store, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        if callable(getattr(self.store, name)):
            self.calls[name] += 1
        return getattr(self.store, name)


def test_the_store_is_asked_in_bulk(root: Path, tmp_path: Path) -> None:
    """Each document once, and no listing a concept: not of a finished farm, nor of one that has hardly begun."""
    plan = plan_of(root)
    finished = Asked(LocalStore(root))
    farm_status(finished, plan)  # type: ignore[arg-type]
    made = len(CONCEPTS) * 2 + 4  # adapters and quality; sources, selection, base, ranks
    assert finished.calls["get"] == made + len(CONCEPTS) + 1  # what a run would have kept
    assert finished.calls["list"] + finished.calls["marks"] == 11
    assert set(finished.calls) <= {"get", "list", "marks"}
    empty = Asked(LocalStore(tmp_path))
    farm_status(empty, plan)  # type: ignore[arg-type]
    assert set(empty.calls) <= {"list", "marks", "get"} and sum(empty.calls.values()) == 13
    assert empty.calls["get"] == 1


def test_what_a_run_has_read_is_not_read_again(root: Path, tmp_path: Path) -> None:
    store, plan = copied(root, tmp_path / "farm"), plan_of(root)
    for path in store.root.rglob("*.json"):
        os.utime(path, (1e9, 1e9))
    documents = Documents(store, kept_at(plan.config.name))
    look(documents, plan)
    documents.keep()
    asked = Asked(store)
    assert farm_status(asked, plan) == {**farm_status(LocalStore(root), plan), "store": store.url}  # type: ignore[arg-type]
    assert asked.calls["get"] == 1


def test_what_is_finished_between_two_looks_does_not_look_lost(root: Path, tmp_path: Path) -> None:
    """Whenever the adapter is committed, published and acknowledged, it is queued, or done."""
    plan = plan_of(root)

    def seen(when: int) -> tuple[dict[str, str], int | None]:
        store = copied(root, tmp_path / f"farm-{when}", "edits", "quality")
        queue, made = Queue(store, "adapters"), LocalStore(root)
        queue.enqueue(plan.adapter_key("sepia"), {"concept": "sepia"})
        calls = 0

        class Racing:
            def __getattr__(self, name: str) -> Any:
                nonlocal calls
                calls += 1
                if calls == when:
                    for key in [*made.list(f"{plan.adapter('sepia').path}/"), "registry/sepia.json"]:
                        store.put(key, made.get(key))
                    queue.drop(plan.adapter_key("sepia"))
                return getattr(store, name)

        rows = farm_status(Racing(), plan)["concepts"]  # type: ignore[arg-type]
        [row] = [row for row in rows if row["id"] == "sepia"]
        return row["stages"], calls if when == 0 else None

    _, calls = seen(0)
    assert calls
    for when in range(1, calls + 1):
        stages, _ = seen(when)
        assert (stages["adapter"], stages["published"]) in {
            ("queued", "missing"),
            ("done", "missing"),
            ("done", "done"),
        }
