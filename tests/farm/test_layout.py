"""Upgrades: marks of stores and configurations, and what a stage's new version makes anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from stage_farm import CONCEPTS, copied, document_of, plan_of, write_config
from terminal import Terminal
from tiny_farm import three_concepts

from farm import layout, plan
from farm.errors import IntegrityError, UserError
from farm.layout import MARK, check_layout, layout_of, mark_layout, migrate
from farm.store import LocalStore, Store, open_store
from farm.todo import make_todo

# The store's layout


def test_a_store_without_a_mark_is_of_the_first_layout(tmp_path: Path) -> None:
    store = three_concepts(tmp_path).store
    assert layout_of(store) is None and not store.exists(MARK)
    check_layout(store)
    assert mark_layout(store) and not mark_layout(store)
    assert layout_of(open_store(str(tmp_path))) == 1


def test_a_newer_layout_is_refused_by_every_command(root: Path, tmp_path: Path, terminal: Terminal) -> None:
    store = copied(root, tmp_path / "store", "registry")
    store.put(MARK, b'{"layout": 2}')
    config = write_config(tmp_path / "farm.yaml", tmp_path / "store")
    told = f"The store {store.url} is of layout 2 and this version reads 1: install the e2gan-farm that wrote it, or a "
    for command in (["run"], ["status"], ["history", "sepia"], ["show", "sepia"], ["verify"], ["gc"], ["migrate"]):
        assert terminal.mistake(*command, "-c", config) == told + "newer one."
    assert terminal.mistake("sync", tmp_path / "store", tmp_path / "copy").startswith(told)
    status, out, _ = terminal.farm("doctor", "--quick", "-c", config, "--working-dir", tmp_path, "--json")
    wrong = [check for check in json.loads(out)["checks"] if check["state"] == "error"]
    assert status == 1 and [check["what"] for check in wrong] == ["store"] and wrong[0]["found"].startswith(told)


def test_an_older_layout_names_the_command_that_migrates_it(
    root: Path, tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layout of the future, where documents have moved: steps run in order, go on where they were cut, once each."""
    store = copied(root, tmp_path / "store", "registry")
    config = write_config(tmp_path / "farm.yaml", tmp_path / "store")
    cut = [False, True]

    def second(store: Store) -> None:
        for key in list(store.list("registry/")):
            store.put(key.replace("registry/", "records/"), store.get(key))
            store.delete(key)

    def third(store: Store) -> None:
        if cut.pop():
            raise KeyboardInterrupt
        store.put("third", b"")

    monkeypatch.setattr(layout, "LAYOUT", 3)
    monkeypatch.setattr(layout, "STEPS", {1: second, 2: third})
    assert "is of layout 1 and this version reads 3: end its runs and servers, and `farm migrate`" in terminal.mistake(
        "status", "-c", config
    )
    assert terminal.farm("migrate", "-c", config)[0] == 130
    assert layout_of(store) == 2 and list(store.list("records/")) and not list(store.list("registry/"))
    assert terminal.good("migrate", "-c", config) == f"{store.url}: was of layout 2 and is of layout 3\n"
    assert (layout_of(store), store.exists("third"), migrate(store)) == (3, True, [])
    monkeypatch.setattr(layout, "LAYOUT", 1)
    with pytest.raises(UserError, match="is of layout 3"):
        open_store(str(tmp_path / "store"))


def test_migrate_marks_a_store_that_has_no_mark(root: Path, tmp_path: Path, terminal: Terminal) -> None:
    store = copied(root, tmp_path / "store", "registry")
    config = write_config(tmp_path / "farm.yaml", tmp_path / "store")
    assert terminal.document("migrate", "-c", config) == {
        "store": store.url,
        "layout": 1,
        "from": [],
        "marked": True,
    }
    assert terminal.good("migrate", "-c", config) == f"{store.url}: is of layout 1\n"


def test_sync_marks_the_copy(root: Path, tmp_path: Path, terminal: Terminal) -> None:
    store = copied(root, tmp_path / "store", "registry", "adapters", "bases")
    terminal.farm("sync", store.root, tmp_path / "copy")
    assert layout_of(LocalStore(tmp_path / "copy")) == 1 and layout_of(store) is None


@pytest.mark.parametrize("data", [b"", b"[]", b'{"layout": "1"}', b'{"layout": true}', b'{"layout": 0}', b"{}"])
def test_a_damaged_mark(tmp_path: Path, data: bytes) -> None:
    store = LocalStore(tmp_path)
    store.put(MARK, data)
    with pytest.raises(IntegrityError, match=r"farm\.json is damaged"):
        open_store(str(tmp_path))
    assert store.get(MARK) == data


# The configuration's version


@pytest.mark.parametrize("version", [2, 99])
def test_a_newer_configuration_is_refused_before_its_keys_are_read(
    tmp_path: Path, terminal: Terminal, version: int
) -> None:
    config = tmp_path / "farm.yaml"
    config.write_text(yaml.safe_dump({"version": version, "a key of the future": 1}))
    assert terminal.mistake("status", "-c", config) == (
        f"{config}: version: the file is of version {version} and this farm reads 1; install a newer e2gan-farm "
        "(docs/upgrading.md)."
    )


@pytest.mark.parametrize("version", ["one", 0, -1, True, 1.0, None])
def test_what_is_no_version(tmp_path: Path, terminal: Terminal, version: object) -> None:
    config = tmp_path / "farm.yaml"
    config.write_text(yaml.safe_dump({**document_of(tmp_path / "store"), "version": version}))
    assert terminal.mistake("status", "-c", config).startswith(f"{config}: version: should be a whole number, 1 today")


# A stage's version

FOLLOWS: dict[str, set[str]] = {
    "sources": {"sources", "selection", "edits", "base", "ranks", "adapters"},
    "selection": {"selection", "edits", "base", "ranks", "adapters"},
    "edits": {"edits", "base", "ranks", "adapters"},
    "quality": {"edits", "base", "ranks", "adapters"},
    "base": {"base", "ranks", "adapters"},
    "ranks": {"ranks", "adapters"},
    "adapter": {"adapters"},
}
"""What is due anew, as a todo names it, when a stage makes other bytes of the same inputs: itself and what follows."""


@pytest.mark.parametrize("stage", FOLLOWS)
def test_a_stages_new_version_makes_it_and_what_follows_due_anew(
    root: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    store = LocalStore(root)
    assert not make_todo(store, plan_of(root))
    monkeypatch.setitem(plan.VERSIONS, stage, plan.VERSIONS[stage] + 1)
    todo = make_todo(store, plan_of(root))
    everything = dict.fromkeys(("edits", "adapters"), CONCEPTS) | dict.fromkeys(
        ("sources", "selection", "base", "ranks"), True
    )
    due = {name: value for name, value in vars(todo).items() if value and name != "publish"}
    assert due == {name: everything[name] for name in FOLLOWS[stage]}


def test_every_stage_is_among_them() -> None:
    assert FOLLOWS.keys() == plan.VERSIONS.keys() - {"comparison", "representatives"}, "of which this farm has none"
