"""What may be deleted, against what the files themselves say; and deleting it, interrupted and raced."""

from __future__ import annotations

import io
import json
import random
import re
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sound_adapters import Dying, killed, put_adapter
from stage_farm import Cluster, contents, copied, document_of, plan_of, write_config
from terminal import Terminal

from farm.artifacts import Manifest, Spec, commit, dump, find
from farm.artifacts import verify as verify_artifact
from farm.config import FarmConfig
from farm.errors import UserError
from farm.garbage import collect, delete_unfinished, find_garbage, put_back
from farm.leases import Leases, owner_name
from farm.progress import Screen
from farm.queue import Queue
from farm.registry import Registry
from farm.run import run
from farm.store import LocalStore
from farm.verify import verify

NOW = datetime(2026, 6, 1, tzinfo=UTC)
NOTES = ("runs/", "glance/", "farm.json")  # that a run leaves
GRACE = NOW - timedelta(days=7)


def silent(*told: object) -> None:
    pass


def made(store: LocalStore, folder: str, name: str, *inputs: Manifest, days: float = 30) -> Manifest:
    """Commit an artifact as if so many days ago."""
    named = {f"input{n}": manifest.digest for n, manifest in enumerate(inputs)}
    spec = Spec(stage=folder.partition("/")[0], version=1, folder=folder, config={"name": name}, inputs=named)
    manifest = commit(store, spec, {"data/part": name.encode(), "z": b"z"}, wall_seconds=0)
    return dated(store, manifest, days)


def dated(store: LocalStore, manifest: Manifest, days: float) -> Manifest:
    at = (NOW - timedelta(days=days)).isoformat(timespec="seconds")
    manifest = manifest.model_copy(update={"created_at": at})
    store.put(f"{manifest.path}/manifest.json", dump(manifest))
    return manifest


def random_store(store: LocalStore, seed: int) -> None:
    """Forty artifacts, each made from earlier ones; some published, in packs or in runs; many of them old."""
    draw, made_so_far = random.Random(seed), []
    folders = ("sources/x", "edits/ink", "edits/fog", "quality/ink", "bases", "ranks", "packs", "adapters/ink")
    for number in range(30):
        folder = draw.choice(folders)
        inputs = draw.sample(made_so_far, min(len(made_so_far), draw.choice((0, 1, 1, 2))))
        name = str(draw.randrange(26))  # now and then the same thing again, in another folder
        manifest = made(store, folder, name, *inputs, days=draw.choice((1, 6, 8, 90)))
        if manifest.path not in {other.path for other in made_so_far}:
            made_so_far.append(manifest)
        if draw.random() < 0.1:
            store.put(f"edits/ink/{number:032x}/images/half.parquet", b"unfinished")
    adapters = [manifest for manifest in made_so_far if manifest.path.startswith("adapters/")]
    for manifest in draw.sample(adapters, min(2, len(adapters))):
        release = put_adapter(store, "ink", f"published {manifest.digest}")
        dated(store, find(store, release["adapter"]), 50)
        dated(store, find(store, f"bases/{release['base']}"), 50)
        Registry(store).publish("ink", **release)
        store.put("runs/1/plan.json", json.dumps([manifest.path, "adapters/never/made"]).encode())


def expected_garbage(root: Path) -> set[str]:
    """Read from the files alone: what no text names that something alive has, and what is old."""
    digest = re.compile(r"\b[0-9a-f]{32}\b")
    texts = {path.parent: path.read_text() for path in root.rglob("manifest.json")}
    alive = {folder for folder in texts if folder.parent.name == "packs"}
    old = {folder for folder, text in texts.items() if json.loads(text)["created_at"] < GRACE.isoformat()}
    alive |= texts.keys() - old
    named = set()
    for path in (*root.glob("registry/*.json"), *root.glob("runs/*/plan.json")):
        named |= set(digest.findall(path.read_text()))
    while True:
        for folder in alive:
            named |= set(json.loads(texts[folder])["inputs"].values())
        more = {folder for folder in texts if folder.name in named}
        if more <= alive:
            return {folder.relative_to(root).as_posix() for folder in texts.keys() - alive}
        alive |= more


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10**6))
def test_what_goes_is_what_nothing_refers_to(seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(Path(folder) / "store")
        random_store(store, seed)
        expected, before = expected_garbage(store.root), contents(store.root)
        garbage = find_garbage(store, [], before=GRACE)
        assert set(garbage.artifacts) == expected
        order = list(garbage.artifacts)
        for path, manifest in garbage.artifacts.items():
            inputs = [other for other in order if other.rpartition("/")[2] in manifest.inputs.values()]
            assert all(order.index(path) < order.index(other) for other in inputs), "before what it was made from"
        assert garbage.size == sum(
            len(data)
            for key, data in before.items()
            if key.startswith(tuple(f"{p}/" for p in expected)) and "manifest" not in key
        )
        assert contents(store.root) == before, "looking changes nothing"
        assert collect(store, garbage, silent) == []
        left = {key: data for key, data in before.items() if not key.startswith(tuple(f"{p}/" for p in expected))}
        assert contents(store.root) == left
        assert not find_garbage(store, [], before=GRACE).artifacts


@pytest.fixture
def store(root: Path, tmp_path: Path) -> LocalStore:
    """A finished farm whose sepia has been edited again with another prompt, and no more."""
    return copied(root, tmp_path / "store")


@pytest.fixture
def changed(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The folders of what another prompt made: edits and their quality."""
    Cluster().stand_in(monkeypatch)
    before = contents(store.root)
    config = FarmConfig.model_validate(document_of(store.root, catalogue__3__prompt="an old photograph"))
    run(config, screen=Screen(), stages=["concepts"])
    new = {
        "/".join(key.split("/")[:3]) for key in contents(store.root).keys() - before.keys() if not key.startswith(NOTES)
    }
    assert len(new) == 2
    return new


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(monkeypatch, capsys, "gc")


@pytest.fixture
def config(store: LocalStore, tmp_path: Path) -> Path:
    return write_config(tmp_path / "farm.yaml", store.root)


def test_a_farm_does_nothing_after_a_collection(
    terminal: Terminal, config: Path, store: LocalStore, changed: set[str], tmp_path: Path
) -> None:
    before = contents(store.root)
    young = terminal.document("-c", config, "--dry-run")
    assert young["artifacts"] == {} and young["young"] == 2
    dry = terminal.document("-c", config, "--dry-run", "--grace-days", 0)
    assert dry["dry_run"] and set(dry["artifacts"]) == changed and dry["young"] == 0
    assert dry["bytes"] == sum(fact["bytes"] for fact in dry["artifacts"].values()) > 0
    assert all(path in terminal.good("-c", config, "--dry-run", "--grace-days", 0) for path in changed)
    other = write_config(tmp_path / "other.yaml", store.root, catalogue__3__prompt="an old photograph")
    assert terminal.document("-c", config, "-c", other, "--dry-run", "--grace-days", 0)["artifacts"] == {}
    assert contents(store.root) == before
    status, out, _ = terminal.farm("-c", config, "--grace-days", 0, "--yes")
    assert status == 0 and out.endswith("deleted 2 folders\n")
    after = contents(store.root)
    assert after == {key: data for key, data in before.items() if not key.startswith(tuple(changed))}
    loaded = FarmConfig.model_validate(document_of(store.root))
    outcome = run(loaded, screen=Screen())
    assert outcome.built == 0 and not outcome.failures and not outcome.unpublished
    assert {key for key in contents(store.root).keys() - after.keys() if not key.startswith(NOTES)} == set()


def test_the_answer_of_a_collection_as_json(terminal: Terminal, config: Path, changed: set[str]) -> None:
    status, out, _ = terminal.farm("-c", config, "--grace-days", 0, "--yes", "--json")
    told = json.loads(out)
    assert status == 0 and set(told["artifacts"]) == changed and told["kept"] == [] and not told["dry_run"]


def test_nobody_is_there_to_ask(terminal: Terminal, config: Path, store: LocalStore, changed: set[str]) -> None:
    before = contents(store.root)
    status, _, err = terminal.farm("-c", config, "--grace-days", 0)
    assert status == 2
    assert err == "error: farm gc: nobody is there to ask; say --yes to delete, or --dry-run to only look.\n"
    assert contents(store.root) == before
    assert terminal.farm("-c", config)[0] == 0, "nothing is old enough, so nothing is asked"


class Keyboard(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "status"), [("n\n", 1), ("y\n", 0)])
def test_somebody_is_there_to_ask(
    terminal: Terminal,
    config: Path,
    store: LocalStore,
    changed: set[str],
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    status: int,
) -> None:
    monkeypatch.setattr("sys.stdin", Keyboard(answer))
    assert terminal.farm("-c", config, "--grace-days", 0)[0] == status
    assert bool(changed & {"/".join(key.split("/")[:3]) for key in store.list()}) == (status == 1)
    assert not list(store.list("queue/turns/"))


def test_two_stores_at_a_time_are_refused(terminal: Terminal, config: Path, tmp_path: Path) -> None:
    other = write_config(tmp_path / "other.yaml", tmp_path / "elsewhere")
    assert terminal.mistake("-c", config, "-c", other).startswith(f"{other}: store: ")


def test_what_says_what_is_referred_to_must_be_readable(
    terminal: Terminal, config: Path, store: LocalStore, changed: set[str]
) -> None:
    plan = plan_of(store.root)
    for key in ("registry/night.json", "runs/1/plan.json", f"{plan.ranks.path}/manifest.json"):
        data = store.get(key) if store.exists(key) else None
        store.put(key, b"{")
        before = contents(store.root)
        assert f"{key} is damaged" in terminal.mistake("-c", config, "--grace-days", 0, "--yes")
        assert contents(store.root) == before
        store.put(key, data) if data else store.delete(key)
    # A damaged manifest that nothing refers to is left alone, and said.
    path = min(changed)
    store.put(f"{path}/manifest.json", b"{")
    told = terminal.document("-c", config, "--dry-run", "--grace-days", 0)
    assert told["damaged"] == [path] and set(told["artifacts"]) == changed - {path}


def test_unfinished_work_and_checkpoints(terminal: Terminal, config: Path, store: LocalStore) -> None:
    plan = plan_of(store.root)
    mine = f"scratch/adapter-{plan.adapter('night').digest}/checkpoint.safetensors"
    others = [
        "edits/sepia/" + 32 * "a" + "/images/part-00000.parquet",
        f"scratch/base-{32 * 'b'}/x/y",
        f"live/base-{32 * 'b'}/s",
    ]
    store.delete(f"{plan.quality('night').path}/manifest.json")  # as if it were being made
    for key in (mine, *others, "queue/adapters/failed/x.json"):
        store.put(key, b"{}")
    before = contents(store.root)
    folders = sorted("/".join(key.split("/")[: 3 if key[0] == "e" else 2]) for key in others)
    assert terminal.document("-c", config, "--dry-run", "--unfinished")["unfinished"] == folders
    assert "3 unfinished folders are left alone" in terminal.good("-c", config, "--dry-run")
    terminal.farm("-c", config, "--grace-days", 0, "--yes")
    assert contents(store.root) == before
    queue = Queue(store, "adapters")
    queue.enqueue("k", {"concept": "night"})
    lease = queue.lease("elsewhere:1:1", 60)
    assert lease is not None
    assert "elsewhere:1:1 is at work on k" in terminal.farm("-c", config, "--yes", "--unfinished")[2]
    queue.ack(lease)
    hold = Leases(store, "queue/turns/").take("base-x", owner_name(), 60)
    assert hold is not None
    assert "is at work on base-x" in terminal.farm("-c", config, "--yes", "--unfinished")[2]
    Leases(store, "queue/turns/").drop("base-x")
    assert contents(store.root) == before
    assert terminal.farm("-c", config, "--yes", "--unfinished")[0] == 0
    assert contents(store.root) == {key: data for key, data in before.items() if key not in others}


def test_what_is_published_meanwhile_is_kept(tmp_path: Path) -> None:
    """Just before the collector reads the registry again."""
    registry = Registry(LocalStore(tmp_path))

    class Raced(LocalStore):
        def list(self, prefix: str = "") -> Any:
            if prefix == "registry/" and not registry.store.exists(f"{gone.path}/manifest.json"):
                registry.store.put("registry/ink.json", entry)
            return super().list(prefix)

    edits = made(registry.store, "edits/ink", "e")
    release = put_adapter(registry.store, "ink", "d1")
    entry = dump(registry.publish("ink", **release))
    registry.store.delete("registry/ink.json")
    for path in (release["adapter"], f"bases/{release['base']}"):
        dated(registry.store, find(registry.store, path), 30)
    gone = edits
    before = contents(tmp_path)
    garbage = find_garbage(registry.store, [], before=GRACE)
    assert len(garbage.artifacts) == 3
    assert set(collect(Raced(tmp_path), garbage, silent)) == {release["adapter"], f"bases/{release['base']}"}
    kept = {key: data for key, data in before.items() if not key.startswith("edits/")}
    assert contents(tmp_path) == kept | {"registry/ink.json": entry}


def test_a_killed_collection(tmp_path: Path) -> None:
    """At any moment no artifact is there in part, what is referred to is whole, and the next collection finishes."""
    reference = LocalStore(tmp_path / "reference")
    random_store(reference, 3)
    garbage = find_garbage(reference, [], before=GRACE)
    assert len(garbage.artifacts) > 4
    before = contents(reference.root)
    collect(reference, garbage, silent)
    after, calls, dying = contents(reference.root), 0, True
    while dying:
        store = LocalStore(tmp_path / str(calls))
        for key, data in before.items():
            store.path(key).parent.mkdir(parents=True, exist_ok=True)
            store.path(key).write_bytes(data)
        dying = killed(lambda store=store, calls=calls: collect(Dying(store, calls), garbage, silent))  # type: ignore[misc]
        for manifest in store.root.rglob("manifest.json"):
            assert verify_artifact(store, manifest.parent.relative_to(store.root).as_posix()) == []
        assert verify(store, [], silent).problems == verify(reference, [], silent).problems
        put_back(store)
        collect(store, find_garbage(store, [], before=GRACE), silent)
        assert contents(store.root) == after
        calls += 9
    assert calls > 40


def test_a_unit_whose_images_went_has_no_receipt(tmp_path: Path) -> None:
    """Receipts are deleted first: a unit with a receipt is not made again."""
    store = LocalStore(tmp_path)
    manifest = made(store, "edits/ink", "e")
    store.put(f"{manifest.path}/receipts/part", b"{}")
    garbage = find_garbage(store, [], before=GRACE)
    calls = 0
    while killed(lambda: collect(Dying(store, calls), garbage, silent)):  # noqa: B023, called at once
        calls += 1
        keys = {key.removeprefix(f"{manifest.path}/") for key in store.list()}
        assert "receipts/part" not in keys or keys >= {"data/part", "z"}
        put_back(store)
        garbage = find_garbage(store, [], before=GRACE)
    assert list(store.list()) == [] and calls > 4


def test_what_is_made_again_meanwhile_is_left(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    manifest = made(store, "edits/ink", "e")
    store.put("edits/ink/" + 32 * "a" + "/half", b"")
    garbage = find_garbage(store, [], before=GRACE)

    class Raced(LocalStore):
        def list(self, prefix: str = "") -> Any:
            if prefix == "registry/":
                made(store, "edits/ink", "e")
                spec = Spec(stage="edits", version=1, folder="edits/ink", config={"name": "other"})
                store.put(
                    f"edits/ink/{32 * 'a'}/manifest.json", dump(manifest.model_copy(update={"digest": spec.digest}))
                )
            return super().list(prefix)

    before = contents(tmp_path)
    assert collect(Raced(tmp_path), garbage, silent) == []
    assert {key for key in before if key.startswith(manifest.path)} == {
        k for k in contents(tmp_path) if manifest.path in k
    }
    delete_unfinished(store, garbage)
    assert store.exists(f"edits/ink/{32 * 'a'}/half"), "it was finished meanwhile"


def test_unreadable_tombstones_are_told(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put(f"edits/ink/{32 * 'a'}/deleted.json", b"{")
    for look in (put_back, lambda store: find_garbage(store, [], before=GRACE)):
        with pytest.raises(
            UserError, match=r"deleted\.json is damaged .* delete the folder edits/ink/a{32} and run again"
        ):
            look(store)
