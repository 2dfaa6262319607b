"""Everything a store refers to is read again: whatever is changed is told, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sound_adapters import put_adapter
from stage_farm import contents, copied, plan_of, write_config
from terminal import Terminal

from farm.artifacts import dump
from farm.plan import Plan
from farm.registry import Registry
from farm.store import LocalStore
from farm.verify import Verified, verify


@pytest.fixture
def store(root: Path, tmp_path: Path) -> LocalStore:
    return copied(root, tmp_path / "store")


@pytest.fixture
def plan(root: Path) -> Plan:
    return plan_of(root)


def silent(*told: object) -> None:
    pass


def look(store: LocalStore, *plans: Plan) -> Verified:
    return verify(store, plans, silent)


def test_a_sound_farm_has_no_problems(store: LocalStore, plan: Plan) -> None:
    told: list[tuple[int, int, str]] = []
    found = verify(store, [plan], lambda *progress: told.append(progress))
    manifests = [json.loads(path.read_text()) for path in store.root.rglob("manifest.json")]
    sizes = [file["size"] for manifest in manifests for file in manifest["files"].values()]
    assert found == Verified(concepts=4, artifacts=len(manifests), files=len(sizes), size=sum(sizes))
    assert [done for done, _, _ in told] == list(range(1, len(sizes) + 1)) and told[0][1] == len(sizes)
    assert look(store) == found, "what is published was made from all of it"


def test_a_flipped_byte_of_any_file_is_told(store: LocalStore, plan: Plan) -> None:
    before = contents(store.root)
    checked = 0
    for key, data in before.items():
        if "/receipts/" in key:
            continue
        store.put(key, data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
        problems = look(store, plan).problems
        assert [problem for problem in problems if key in problem], key
        assert all(problem.endswith(".") and "\n" not in problem for problem in problems)
        if not key.endswith("manifest.json") and not key.startswith("registry/"):
            [problem] = problems
            assert problem.startswith(f"{store.url}/{key} is not the file that was put there")
        store.put(key, data)
        checked += 1
    assert checked > 50 and look(store, plan).problems == []


def test_a_missing_file_of_any_kind_is_told(store: LocalStore, plan: Plan) -> None:
    keys = (
        f"{plan.adapter('sepia').path}/adapter_model.safetensors",
        f"{plan.sources.path}/part-00000.parquet",
        f"{plan.adapter('sepia').path}/manifest.json",
        f"{plan.base.path}/manifest.json",
        f"{plan.edits('night').path}/manifest.json",
    )
    for key in keys:
        data = store.get(key)
        store.delete(key)
        folder = key.rpartition("/")[0] if key.endswith("manifest.json") else key
        problems = look(store, plan).problems
        assert problems and all(folder.rpartition("/")[2] in problem for problem in problems)
        store.put(key, data)
    assert look(store, plan).problems == []


def test_older_releases_and_runs_are_read_too(store: LocalStore, plan: Plan) -> None:
    registry = Registry(store)
    old = registry.publish("ink", **put_adapter(store, "ink", "old"))
    registry.publish("ink", **put_adapter(store, "ink", "new"))
    registry.unpublish("ink")
    run = put_adapter(store, "fog", "of a run")["adapter"]
    alone = put_adapter(store, "fog", "of nobody")["adapter"]
    store.put("runs/1/plan.json", json.dumps([run, "adapters/fog/never-made"]).encode())
    for path in (old.adapter, run, alone):
        store.put(f"{path}/metrics.json", b"other")
    first, second = sorted(look(store).problems)
    assert run in first and old.adapter in second
    store.put("runs/1/plan.json", b"[")
    assert any("runs/1/plan.json is damaged" in problem for problem in look(store).problems)


def test_a_record_that_does_not_fit_is_told(store: LocalStore, plan: Plan) -> None:
    record = Registry(store).get("night")
    assert record is not None
    for changes, says in (
        ({"version": 3}, "has the versions 3: restore it."),
        (
            {"adapter": "adapters/night/" + 32 * "0", "digest": 32 * "0"},
            "which is not there: copy it from another store",
        ),
        (
            {"adapter": plan.adapter("sepia").path},
            f"names '{plan.adapter('sepia').path}', not {record.adapter}): restore",
        ),
        ({"base": 32 * "0"}, f"version 1 needs bases/{32 * '0'}, which is not there"),
        ({"base": 32 * "0"}, f"version 1 does not say what {record.adapter} is"),
    ):
        store.put("registry/night.json", dump(record.model_copy(update=changes)))
        assert any("registry/night.json" in problem and says in problem for problem in look(store).problems)


def test_the_command(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal(monkeypatch, capsys, "verify")
    store = copied(root, tmp_path / "store")
    config = write_config(tmp_path / "farm.yaml", store.root)
    status, out, err = terminal.farm("-c", config)
    assert status == 0 and out.startswith("4 concepts, 16 artifacts, 44 files, ") and out.endswith(": no problems\n")
    assert "verify     44/44" in err
    key = f"{plan_of(root).base.path}/generator.safetensors"
    store.put(key, store.get(key)[:-1])
    status, out, _ = terminal.farm("-c", config)
    assert status == 1 and out.splitlines()[0].startswith(f"{store.url}/{key} is not the file")
    assert out.endswith(": 1 problem\n")
    status, out, _ = terminal.farm("-c", config, "--json")
    told = json.loads(out)
    assert status == 1 and (told["concepts"], told["artifacts"], told["files"]) == (4, 16, 44)
    assert len(told["problems"]) == 1 and told["size"] > 10**6
