"""`farm publish`, `rollback`, `unpublish` and `history`, and what `farm run` makes of them; without Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sound_adapters import put_adapter
from stage_farm import CONCEPTS, Cluster, copied, plan_of, write_config
from terminal import Terminal

from farm.errors import StoreError
from farm.registry import Registry
from farm.serve.bank import Bank
from farm.serve.engines import Merging
from farm.serve.published import Published, UnknownConceptError
from farm.store import LocalStore, StoreUnreachableError
from farm.todo import make_todo


@pytest.fixture
def store(root: Path, tmp_path: Path) -> LocalStore:
    return copied(root, tmp_path / "store")


@pytest.fixture
def config(store: LocalStore, tmp_path: Path) -> Path:
    return write_config(tmp_path / "farm.yaml", store.root)


@pytest.fixture
def registry(store: LocalStore) -> Registry:
    return Registry(store)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    Cluster().stand_in(monkeypatch)
    return Terminal(monkeypatch, capsys)


def served(registry: Registry, concept: str) -> int | None:
    """The version, as the server loads it and as the registry has it."""
    try:
        loaded = Bank(Published(registry.store), Merging, byte_budget=1).get(concept).version
    except UnknownConceptError:
        loaded = None
    entry = registry.get(concept)
    assert loaded == (entry.version if entry else None)
    return loaded


def test_rollback_unpublish_and_publish(terminal: Terminal, config: Path, registry: Registry, tmp_path: Path) -> None:
    other = write_config(tmp_path / "other.yaml", registry.store.root, catalogue__3__prompt="an old photograph")
    old, new = plan_of(registry.store.root), plan_of(registry.store.root, catalogue__3__prompt="an old photograph")
    first, second = old.adapter("sepia").digest, new.adapter("sepia").digest
    assert terminal.farm("run", "-c", other)[0] == 0 and served(registry, "sepia") == 2
    assert terminal.good("rollback", "-c", other, "sepia") == f"sepia: version 3, rolled-back to 1, adapter {first}\n"
    assert served(registry, "sepia") == 3
    # A run leaves what people took out of service where it is, and says so.
    assert not make_todo(registry.store, new)
    status, _, err = terminal.farm("run", "-c", other)
    assert status == 0 and "taken out of service by hand; `farm publish sepia` puts it back" in err
    assert served(registry, "sepia") == 3
    rows = {row["id"]: row for row in terminal.document("status", "-c", other)["concepts"]}
    assert (rows["sepia"]["published"], rows["sepia"]["stages"]["published"]) == (3, "withdrawn")
    assert terminal.good("publish", "-c", other, "--all").splitlines()[3] == (
        "sepia: left out of service; `farm publish sepia` puts it back"
    )
    assert terminal.good("publish", "-c", other, "sepia") == f"sepia: version 4, published, adapter {second}\n"
    assert terminal.good("publish", "-c", other, "sepia") == "sepia: version 4 is this adapter already\n"
    assert terminal.good("rollback", "-c", other, "sepia", "--to", 2) == (
        "sepia: version 4 is the adapter of version 2 already\n"
    )
    assert terminal.good("unpublish", "-c", other, "sepia") == f"sepia: version 5, unpublished, adapter {second}\n"
    assert terminal.good("unpublish", "-c", other, "sepia") == "sepia: it is not published\n"
    assert served(registry, "sepia") is None
    terminal.farm("run", "-c", other)
    assert served(registry, "sepia") is None
    rows = {row["id"]: row for row in terminal.document("status", "-c", other)["concepts"]}
    assert (rows["sepia"]["published"], rows["sepia"]["stages"]["published"]) == (None, "withdrawn")
    # The configuration goes back to a prompt whose adapter nobody took out of service.
    assert make_todo(registry.store, old).publish == ("sepia",)
    terminal.farm("run", "-c", config)
    assert served(registry, "sepia") == 6

    told = terminal.document("history", "-c", config, "sepia")
    record = registry.record("sepia")
    assert record is not None
    assert told == {"concept": "sepia", "published": 6, "releases": [r.model_dump() for r in record.releases]}
    assert [(r["version"], r["action"], r["digest"], r["restores"]) for r in told["releases"]] == [
        (1, "published", first, None),
        (2, "published", second, None),
        (3, "rolled-back", first, 1),
        (4, "published", second, None),
        (5, "unpublished", second, None),
        (6, "published", first, None),
    ]
    text = terminal.good("history", "-c", config, "sepia")
    assert "rolled-back to 1" in text and "6 *" in text and first[:12] in text and "* is served" in text
    terminal.good("unpublish", "-c", config, "sepia")
    assert terminal.good("history", "-c", config, "sepia").endswith("not published now\n")
    assert terminal.document("history", "-c", config, "sepia")["published"] is None


def test_publishing_what_is_not_good_enough(terminal: Terminal, registry: Registry, tmp_path: Path) -> None:
    for concept in CONCEPTS:
        registry.store.delete(f"registry/{concept}.json")
    strict = write_config(tmp_path / "strict.yaml", registry.store.root, adapters__max_l1_ratio=0.01)
    status, out, _ = terminal.farm("publish", "-c", strict, "sepia", "night")
    assert status == 1 and len(out.splitlines()) == 2
    assert out.startswith("sepia is not published: L1 to the teacher 0.")
    assert "(adapters.max_l1_ratio)" in out and out.endswith("; --force publishes it all the same.\n")
    assert registry.records() == {}
    told = terminal.good("publish", "-c", strict, "sepia", "--force")
    assert told.startswith("sepia: version 1, published, forced: L1 to the teacher 0.")
    entry = registry.get("sepia")
    assert entry is not None and entry.forced and "is over 0.01 of the untouched photo's" in entry.forced
    assert "forced: L1" in terminal.good("history", "-c", strict, "sepia")
    # A run does not complain of what is served, nor does it take it away.
    status, out, _ = terminal.farm("run", "-c", strict, "--json")
    assert status == 0 and json.loads(out)["unpublished"].keys() == set(CONCEPTS) - {"sepia"}
    assert registry.get("sepia") == entry
    # Good ones are not forced, even with --force.
    lax = write_config(tmp_path / "lax.yaml", registry.store.root)
    terminal.good("publish", "-c", lax, "--all", "--force")
    assert {name: (record.version, record.forced) for name, record in registry.list().items()} == {
        **dict.fromkeys(CONCEPTS, (1, None)),
        "sepia": (1, entry.forced),
    }


def test_one_damaged_adapter_does_not_stop_the_others(terminal: Terminal, config: Path, registry: Registry) -> None:
    plan = plan_of(registry.store.root)
    for concept in CONCEPTS:
        registry.store.delete(f"registry/{concept}.json")
    registry.store.delete(f"{plan.adapter('charcoal').path}/metrics.json")
    registry.store.put(f"{plan.adapter('cyanotype').path}/manifest.json", b"{")
    registry.store.delete(f"{plan.adapter('night').path}/manifest.json")
    status, out, _ = terminal.farm("publish", "-c", config, "--all")
    lines = out.splitlines()
    assert status == 1 and lines[0].startswith("charcoal is not published: ") and "metrics.json is missing" in lines[0]
    assert "manifest.json is damaged" in lines[1] and lines[2] == "night: no adapter yet"
    assert lines[3].startswith("sepia: version 1, published")
    assert list(registry.list()) == ["sepia"]
    status, out, _ = terminal.farm("publish", "-c", config, "night")
    assert (status, out) == (1, "night is not published: it has no adapter yet; `farm run` trains it.\n")


def test_a_farm_without_adapters_publishes_nothing(terminal: Terminal, tmp_path: Path) -> None:
    config = write_config(tmp_path / "farm.yaml", tmp_path / "empty")
    assert terminal.good("publish", "-c", config, "--all").splitlines() == [f"{c}: no adapter yet" for c in CONCEPTS]


def test_mistakes(terminal: Terminal, config: Path, registry: Registry) -> None:
    for arguments in ([], ["--all", "sepia"]):
        told = terminal.mistake("publish", "-c", config, *arguments)
        assert told == "farm publish: name the concepts or say --all, one of the two."
    assert terminal.mistake("publish", "-c", config, "sepya").endswith("did you mean sepia?")
    for command in ("rollback", "unpublish", "history"):
        told = terminal.mistake(command, "-c", config, "sepya")
        assert told == f"'sepya' was never published in {registry.store.url}; did you mean sepia?"
    assert terminal.mistake("rollback", "-c", config, "sepia").endswith("there is nothing before it.")
    told = terminal.mistake("rollback", "-c", config, "sepia", "--to", 9)
    assert told == "sepia was never published as version 9: choose one of 1."
    registry.store.put("registry/sepia.json", b"{")
    for command in ("rollback", "unpublish", "history"):
        assert "registry/sepia.json is damaged" in terminal.mistake(command, "-c", config, "sepia")


def test_a_rollback_to_a_damaged_adapter_is_refused(terminal: Terminal, config: Path, registry: Registry) -> None:
    registry.publish("sepia", **put_adapter(registry.store, "sepia", "new"))
    key = f"{plan_of(registry.store.root).adapter('sepia').path}/text.safetensors"
    registry.store.put(key, registry.store.get(key)[:-1])
    told = terminal.mistake("rollback", "-c", config, "sepia")
    assert told.startswith("sepia is not rolled back to version 1: ") and f"{key} is not the file" in told
    entry = registry.get("sepia")
    assert entry is not None and entry.version == 2


def test_a_rollback_whose_answer_is_lost_says_how_to_go_on(
    terminal: Terminal, config: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Typed again as it was, it would roll back to where it began."""
    registry.publish("sepia", **put_adapter(registry.store, "sepia", "new"))

    class Lost(LocalStore):
        def replace_if_match(self, key: str, data: bytes, etag: str) -> bool:
            super().replace_if_match(key, data, etag)
            raise StoreError(f"{StoreUnreachableError(self.url)}: the same command goes on when it is back.")

    with monkeypatch.context() as patch:
        patch.setattr("farm.store.open_store", lambda url, patience: Lost(Path(url)))
        told = terminal.mistake("rollback", "-c", config, "sepia")
        assert told.endswith("when it is back; say --to 1 then, for it may have happened already.")
        assert terminal.mistake("rollback", "-c", config, "sepia", "--to", 2).endswith("goes on when it is back.")
    terminal.good("rollback", "-c", config, "sepia", "--to", 1)
    assert [(release.version, release.restores) for release in registry.record("sepia").releases] == [  # type: ignore[union-attr]
        (1, None),
        (2, None),
        (3, 1),
        (4, 2),
        (5, 1),
    ]
