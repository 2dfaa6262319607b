"""Names out of a hostile store: no manifest and no record leads out of its own folder, whatever it says."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sound_adapters import BASE, adapter_spec, put_adapter
from stage_farm import contents
from stores import BAD_KEYS
from tampered import edit_json, edit_manifest

from farm.artifacts import FileEntry, Manifest, Spec, commit, dump, find, open_artifact, verify
from farm.errors import IntegrityError, UserError
from farm.garbage import collect, find_garbage, put_back
from farm.graph import in_runs, read_graph
from farm.hub import push
from farm.objects import check_key, is_key
from farm.registry import Entry, Registry
from farm.store import LocalStore
from farm.sync import sync
from farm.verify import verify as verify_store

NASTY = st.sampled_from([key for key in BAD_KEYS if key != "\ud800"])
NAMES = (
    NASTY
    | st.text(max_size=12)
    | st.text(alphabet="./\\a\u2044\u2215\uff0f\u2024\uff0e\u202e\u200b\xa0%:~", max_size=8)
    | st.from_regex(r"adapters/[a-z.]{1,4}/[0-9a-f]{32}", fullmatch=True)
)
ENTRY = FileEntry.of(b"x").model_dump()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """Ink and fog are published, and beside the store is a folder that is nobody's business."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_bytes(b"x")
    store = LocalStore(tmp_path / "store")
    for concept in ("ink", "fog"):
        Registry(store).publish(concept, **put_adapter(store, concept, "one"))
    return store


def plain(document: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(dump(document))
    return found


@settings(max_examples=100, deadline=None)
@given(NAMES)
def test_a_manifest_lists_plain_keys_alone(name: str) -> None:
    spec = Spec(stage="x", version=1, folder="adapters/ink")
    sound = {"stage": "x", "version": 1, "path": spec.path, "digest": spec.digest, "config": {}, "inputs": {}}
    sound |= {"seed": 0, "packages": {}, "wall_seconds": 0, "device_seconds": 0, "created_at": "", "summary": {}}
    Manifest.model_validate({**sound, "files": {"a/b.parquet": ENTRY}})
    for changed in ({"files": {name: ENTRY}}, {"files": {}, "path": name}):
        try:
            made = Manifest.model_validate({**sound, **changed})
        except ValidationError:
            continue
        for key in (*made.files, made.path):
            check_key(key)
            assert key.isascii() and key.isprintable() and not key.startswith(("/", "~", ".")) and "/." not in key


@settings(max_examples=100, deadline=None)
@given(NAMES, st.sampled_from(["adapter", "digest", "base", "concept"]), st.booleans())
def test_a_record_names_its_own_concepts_adapters_alone(name: str, place: str, old: bool) -> None:
    digest = 32 * "a"
    release = {"version": 1, "adapter": f"adapters/ink/{digest}", "digest": digest, "base": 32 * "b", "metrics": {}}
    release |= {"published_at": "", "published_by": ""}
    record: dict[str, Any] = {**release, "version": 2, "concept": "ink", "history": [release]}
    Entry.model_validate(record)
    where = record["history"][0] if old and place != "concept" else record
    where[place] = name
    try:
        entry = Entry.model_validate(record)
    except ValidationError:
        return
    for made in entry.releases:
        assert made.adapter == f"adapters/ink/{made.digest}" and is_key(made.adapter) and is_key(f"bases/{made.base}")


FILES = [
    "../../../outside/file",
    "/etc/passwd",
    "a/../../x",
    "..\\x",
    "\u2024\u2024/x",
    "manifest.json",
    ".store/lock",
]


@pytest.mark.parametrize("name", FILES)
def test_no_command_follows_a_manifest_out_of_its_folder(store: LocalStore, tmp_path: Path, name: str) -> None:
    entry = Registry(store).get("ink")
    assert entry is not None
    edit_manifest(store, entry.adapter, lambda manifest: manifest["files"].update({name: ENTRY}))
    before, target = contents(store.root), LocalStore(tmp_path / "target")
    [problem] = verify(store, entry.adapter)
    assert f"{entry.adapter}/manifest.json is damaged" in problem and problem.isprintable() and problem[-1] == "."
    for call in (
        lambda: find(store, entry.adapter),
        lambda: open_artifact(store, entry.adapter),
        lambda: push(store, entry, "you/ink"),
        lambda: find_garbage(store, [], before=datetime.now(UTC)),
        lambda: put_adapter(store, "ink", "one"),
    ):
        with pytest.raises(UserError, match=r"manifest\.json is damaged"):
            call()
    assert problem in verify_store(store, [], lambda *_: None).problems
    copied = sync(store, target, lambda *_: None)
    assert problem in copied.problems and not [*target.list(entry.adapter)] and Registry(target).get("ink") is None
    assert contents(store.root) == before and [p.name for p in (tmp_path / "outside").iterdir()] == ["file"]
    assert {p.name for p in tmp_path.iterdir()} == {"outside", "store", "target"}


@pytest.mark.parametrize("path", ["adapters/fog/{digest}", "../outside", "registry", "adapters/ink/../fog/{digest}"])
def test_a_manifest_of_another_place_is_refused(store: LocalStore, path: str) -> None:
    ink = adapter_spec("ink", "one")
    edit_manifest(store, ink.path, lambda manifest: manifest | {"path": path.format(digest=ink.digest)})
    with pytest.raises(IntegrityError, match=rf"{ink.path}/manifest\.json (does not describe|is damaged)"):
        find(store, ink.path)


def test_a_collection_deletes_what_it_listed_alone(store: LocalStore) -> None:
    """A tombstone that names another folder's files takes none of them along."""
    spec = Spec(stage="x", version=1, folder="edits/ink")
    commit(store, spec, {"a": b"x"}, wall_seconds=0)
    edit_manifest(store, spec.path, lambda m: m | {"created_at": "2001-01-01T00:00:00+00:00"})
    store.put(f"{spec.path}/deleted.json", store.get(f"{spec.path}/manifest.json"))
    store.delete(f"{spec.path}/manifest.json")
    sound = store.get(f"{spec.path}/deleted.json")
    edit_json(store, f"{spec.path}/deleted.json", lambda m: m | {"files": {"../../registry/ink.json": ENTRY}})
    for look in (put_back, lambda store: find_garbage(store, [], before=datetime.now(UTC))):
        with pytest.raises(IntegrityError, match=r"deleted\.json is damaged"):
            look(store)
    edit_json(store, f"{spec.path}/deleted.json", lambda m: json.loads(sound) | {"path": f"bases/{BASE.digest}"})
    before = contents(store.root)
    garbage = find_garbage(store, [], before=datetime.now(UTC))
    collect(store, garbage, lambda *_: None)
    assert contents(store.root) == {key: data for key, data in before.items() if not key.startswith(spec.path)}


def test_what_no_key_can_be_is_not_listed(store: LocalStore) -> None:
    """Files that somebody left in the folder; their names are never given to anything."""
    listed = [*store.list()]
    for name in ("a b", "é", "a\u2044b", "x\ny", "a%2e"):
        (store.root / "adapters" / "ink" / name).write_bytes(b"x")
    assert [*store.list()] == listed and set(read_graph(store).manifests) == {
        *(adapter_spec(concept, "one").path for concept in ("ink", "fog")),
        BASE.path,
    }


@pytest.mark.parametrize("data", [b"[" * 100_000, b'["a", 1]', b"{}", b"null", b'[["a"]]', b"\xff", b'["a"'])
def test_a_runs_list_that_is_none_is_refused(store: LocalStore, data: bytes) -> None:
    store.put("runs/1/plan.json", data)
    with pytest.raises(IntegrityError, match=r"runs/1/plan\.json is damaged \(.*\): delete the folder runs/1\.$"):
        in_runs(store)
