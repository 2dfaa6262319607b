"""One store brought up to another: the same bytes, after kills too, and never over what others have published."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from rich.console import Console
from sound_adapters import Dying, killed, put_adapter
from stage_farm import contents, copied, plan_of, write_config
from stores import fresh
from terminal import Terminal

from farm.artifacts import dump, find, verify
from farm.config_file import load_config
from farm.errors import UserError
from farm.objects import Store
from farm.progress import Screen
from farm.queue import owner_name
from farm.registry import Registry
from farm.run import run
from farm.store import LocalStore
from farm.sync import Copied, sync
from farm.turn import turn

NOT_COPIED = ("queue/", "live/", "scratch/", "probe/")


@pytest.fixture
def here(root: Path, tmp_path: Path) -> LocalStore:
    """A finished farm with a run, a queue, checkpoints and work under way."""
    store = copied(root, tmp_path / "here")
    store.put("runs/1/plan.json", json.dumps([plan_of(root).adapter("night").path]).encode())
    store.put("runs/1/events.jsonl", b"{}\n")
    for folder in NOT_COPIED:
        store.put(f"{folder}x/y.json", b"{}")
    store.put(f"edits/night/{32 * 'a'}/images/part-00000.parquet", b"unfinished")
    return store


@pytest.fixture
def there(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "there")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(monkeypatch, capsys, "sync")


def silent(*told: object) -> None:
    pass


def copy(here: Store, there: Store) -> Copied:
    return sync(here, there, silent)


def finished(store: LocalStore) -> dict[str, bytes]:
    """What of a store is to be copied."""
    return {
        key: data
        for key, data in contents(store.root).items()
        if not key.startswith(NOT_COPIED) and data != b"unfinished"
    }


def test_a_copy_is_the_same_byte_for_byte(here: LocalStore, there: LocalStore, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    copied = sync(here, there, lambda *progress: told.append(progress))
    assert contents(there.root) == finished(here)
    manifests = [key for key in finished(here) if key.endswith("/manifest.json")]
    objects = len(finished(here)) - len(manifests) - 4 - 2
    assert (copied.artifacts, copied.concepts, copied.files, copied.there) == (len(manifests), 4, objects, 0)
    assert copied.problems == [] and [done for done, _, _ in told] == list(range(1, objects + 1))
    assert copy(here, there) == Copied(there=len(manifests))
    assert contents(there.root) == finished(here)
    loaded = load_config(write_config(tmp_path / "farm.yaml", there.root), [])
    assert run(loaded, screen=Screen(Console(quiet=True))).built == 0, "a farm goes on in the copy"


def test_to_a_bucket_and_back(here: LocalStore, there: LocalStore, moto_bucket: str) -> None:
    bucket = fresh(moto_bucket)
    assert copy(here, bucket).problems == [] and copy(bucket, there).problems == []
    assert contents(there.root) == finished(here)
    assert copy(here, bucket).artifacts == copy(bucket, there).artifacts == 0


def test_what_changed_since_is_brought_up(here: LocalStore, there: LocalStore) -> None:
    copy(here, there)
    registry = Registry(here)
    registry.publish("night", **put_adapter(here, "night", "new"))
    registry.unpublish("sepia")
    here.put("runs/1/events.jsonl", b"{}\n{}\n")
    copied = copy(here, there)
    assert (copied.artifacts, copied.concepts, copied.problems) == (2, 2, [])
    assert contents(there.root) == finished(here)
    # The other way round nothing is lowered, and what is newer there stays.
    behind = contents(there.root)
    newest = Registry(there).publish("night", **put_adapter(there, "night", "newest"))
    assert copy(here, there) == Copied(there=copied.there + copied.artifacts)
    assert Registry(there).get("night") == newest
    assert {key for key in behind if contents(there.root)[key] != behind[key]} == {"registry/night.json"}


@pytest.mark.parametrize("seed", range(3))
def test_a_copy_that_is_killed_goes_on(here: LocalStore, tmp_path: Path, seed: int) -> None:
    """At no time is anything there in part, or published before all of it is there."""
    draw, dying, kills = random.Random(seed), True, 0
    there = LocalStore(tmp_path / "there")
    while dying:
        calls = draw.randrange(5, 60)
        dying = killed(lambda calls=calls: sync(here, Dying(there, calls), silent))  # type: ignore[misc, arg-type]
        kills += dying
        for manifest in there.root.rglob("manifest.json"):
            assert verify(there, manifest.parent.relative_to(there.root).as_posix()) == []
        for entry in Registry(there).list().values():
            assert find(there, entry.adapter) and find(there, f"bases/{entry.base}")
    assert kills > 1 and contents(there.root) == finished(here)


def test_what_is_there_with_the_right_hash_is_not_copied_again(here: LocalStore, there: LocalStore) -> None:
    """And what an interrupted copy, or a disk, left there with a wrong one is."""
    path = plan_of(here.root).edits("night").path
    right, wrong = f"{path}/images/part-00000.parquet", f"{path}/measures/part-00000.parquet"
    there.put(right, here.get(right))
    there.put(wrong, here.get(wrong)[:-1])
    put: list[str] = []

    class Watched(LocalStore):
        def put(self, key: str, data: bytes) -> None:
            put.append(key)
            super().put(key, data)

    assert copy(here, Watched(there.root)).problems == []
    assert wrong in put and right not in put and len(put) == len(set(put))
    assert contents(there.root) == finished(here)
    there.delete(wrong)  # from a finished artifact
    put.clear()
    assert copy(here, Watched(there.root)).artifacts == 1 and put == [wrong]
    assert contents(there.root) == finished(here)


def test_what_is_damaged_here_does_not_go_there(here: LocalStore, there: LocalStore) -> None:
    plan = plan_of(here.root)
    sound = finished(here)
    here.put(f"{plan.adapter('night').path}/metrics.json", b"{}")
    here.put(f"{plan.adapter('sepia').path}/manifest.json", b"{")
    here.put("registry/cyanotype.json", b"{")
    problems = copy(here, there).problems
    for says in (
        f"{plan.adapter('night').path}/metrics.json is not the file that was put there",
        f"{plan.adapter('sepia').path}/manifest.json is damaged",
        "registry/cyanotype.json is damaged",
        f"did not get version 1 of night: {plan.adapter('night').path} is not the same there.",
        "did not get version 1 of sepia",
    ):
        assert sum(says in problem for problem in problems) == 1, says
    assert len(problems) == 5 and list(Registry(there).list()) == ["charcoal"]
    # Mended, it is all copied.
    for key, data in sound.items():
        here.put(key, data)
    assert copy(here, there).problems == []
    assert contents(there.root) == sound


def test_conflicts_are_told_and_left(here: LocalStore, there: LocalStore, terminal: Terminal) -> None:
    copy(here, there)
    for store, name in ((here, "mine"), (there, "yours")):
        Registry(store).publish("night", **put_adapter(store, "night", name))
    # Made in both places: the same Spec, other bytes.
    same = put_adapter(here, "ink", "same")
    manifest = find(here, same["adapter"])
    assert manifest is not None
    files = {**manifest.files, "metrics.json": manifest.files["metrics.json"].of(b"[]")}
    there.put(f"{same['adapter']}/metrics.json", b"[]")
    there.put(f"{same['adapter']}/manifest.json", dump(manifest.model_copy(update={"files": files})))
    Registry(here).publish("ink", **same)
    before = contents(there.root)
    status, out, _ = terminal.farm(here.root, there.root)
    lines = out.splitlines()
    assert status == 1
    assert lines[0] == f"{there.url}/{same['adapter']} has other files than {here.url} has: it is left as it is."
    assert lines[1].startswith(f"{there.url} did not get version 1 of ink: ")
    assert lines[2] == (
        f"{there.url}/registry/night.json was published to on its own (version 2 there, 2 here): it is left as it is."
    )
    after = contents(there.root)
    assert {key: after[key] for key in before} == before
    assert Registry(there).get("ink") is None


def test_a_publication_between_reading_and_writing_is_not_lost(here: LocalStore, there: LocalStore) -> None:
    copy(here, there)
    Registry(here).publish("night", **put_adapter(here, "night", "new"))

    class Raced(LocalStore):
        def replace_if_match(self, key: str, data: bytes, etag: str) -> bool:
            other = Registry(LocalStore(there.root))
            if other.record("night").version == 1:  # type: ignore[union-attr]
                other.unpublish("night")
            return super().replace_if_match(key, data, etag)

    [problem] = copy(here, Raced(there.root)).problems
    assert "registry/night.json was published to on its own (version 2 there, 2 here)" in problem
    assert Registry(there).get("night") is None


def test_the_command(here: LocalStore, there: LocalStore, terminal: Terminal) -> None:
    status, out, err = terminal.farm(here.root, there.url)
    assert status == 0 and out.startswith("copied 16 artifacts and 4 concepts' versions, ")
    assert err.splitlines()[-1].startswith("sync       48/48")
    marked = finished(here) | {"farm.json": b'{"layout": 1}\n'}
    assert contents(there.root) == marked, "no turn is left"
    told = json.loads(terminal.farm(here.root, there.root, "--json")[1])
    assert told == {"artifacts": 0, "concepts": 0, "files": 0, "size": 0, "there": 16, "problems": []}


def test_mistakes(here: LocalStore, there: LocalStore, terminal: Terminal) -> None:
    assert terminal.mistake(here.root, here.url) == f"farm sync: {here.root} and {here.url} are one store; name two."
    assert terminal.mistake(there.root, here.root) == f"farm sync: there is nothing in {there.url}; check its address."
    assert "cannot be opened" in terminal.mistake(here.root, "ftp://x/y")


def test_two_copies_take_turns(here: LocalStore, there: LocalStore, terminal: Terminal) -> None:
    """A collection there would take what the copy has not published yet for garbage."""

    class WaitedError(Exception):
        pass

    def waited(owner: str) -> None:
        assert owner == owner_name()
        raise WaitedError

    class Looking(LocalStore):
        def put(self, key: str, data: bytes) -> None:
            if "manifest" not in key and "queue/" not in key:
                with pytest.raises(WaitedError), turn(LocalStore(there.root), "collection", seconds=60, on_wait=waited):
                    pass
                raise UserError("looked.")
            super().put(key, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "farm.store.open_store", lambda url, patience: (Looking if "there" in url else LocalStore)(Path(url))
        )
        assert terminal.farm(here.root, there.root)[2].endswith("error: looked.\n")
