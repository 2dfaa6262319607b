"""`farm export`: packs of a small real farm's adapters; without Ray."""

from __future__ import annotations

import json
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from stage_farm import CONCEPTS, copied, plan_of, write_config
from terminal import Terminal

from e2gan.export import libraries
from e2gan.export.builders import PACKAGE
from e2gan.export.mlpackage import function_names, read_model
from e2gan.export.update import apply_update
from farm.artifacts import Spec, commit, find, open_artifact, verify
from farm.garbage import find_garbage
from farm.registry import Registry
from farm.store import LocalStore


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    monkeypatch.setenv("COLUMNS", "200")
    return Terminal(monkeypatch, capsys, "export")


def republish(store: LocalStore, concept: str, **changes: bytes) -> None:
    """Publish the concept's adapter with some of its files changed, as another one."""
    registry = Registry(store)
    entry = registry.get(concept)
    assert entry is not None
    old = open_artifact(store, entry.adapter)
    files = {name: changes.get(name.partition(".")[0], old.read(name)) for name in old.manifest.files}
    spec = Spec(stage="adapter", version=1, folder=f"adapters/{concept}", inputs={"base": entry.base}, seed=len(files))
    made = commit(store, spec, files, wall_seconds=0)
    registry.publish(concept, adapter=made.path, digest=made.digest, base=entry.base, metrics=entry.metrics)


def other_weights(store: LocalStore, concept: str, factor: float) -> bytes:
    entry = Registry(store).get(concept)
    assert entry is not None
    weights = safetensors.torch.load(store.get(f"{entry.adapter}/adapter_model.safetensors"))
    return safetensors.torch.save({n: t * factor if "lora_B" in n else t for n, t in weights.items()}, {"format": "pt"})


@pytest.fixture(scope="module")
def exported(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A store with a pack of all concepts, its configuration, and what the command printed."""
    folder = tmp_path_factory.mktemp("exported")
    store = copied(root, folder / "store")
    config = write_config(folder / "farm.yaml", store.root)
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *given, **_: printed.append(" ".join(map(str, given))))
        patch.setattr(sys, "argv", ["farm", "export", "-c", str(config), "--all", "--json"])
        from farm import cli

        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 0
    return store.root, config, json.loads("\n".join(printed))


def test_a_pack_is_an_artifact_with_its_proof(exported: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    store, (row,) = LocalStore(exported[0]), exported[2]["packs"]
    manifest = find(store, row["path"])
    assert manifest is not None and not verify(store, row["path"]) and exported[2]["failures"] == []
    adapters = {concept: plan_of(store.root).adapter(concept).digest for concept in CONCEPTS}
    assert {c["concept"]: c["adapter"] for c in row["concepts"]} == adapters and row["left_out"] == {}
    assert {name: d for name, d in manifest.inputs.items() if name.startswith("adapters/")} == {
        f"adapters/{concept}": digest for concept, digest in adapters.items()
    }
    artifact = open_artifact(store, row["path"])
    proof = json.loads(artifact.read("certificate.json"))
    assert proof["passed"] and proof["functions"].keys() == set(CONCEPTS) and proof["limit_db"] == 40
    assert all(one["psnr_worst"] >= 40 for one in proof["functions"].values())
    assert row["bytes"] == sum(f.size for n, f in manifest.files.items() if n.startswith(PACKAGE))
    assert sum(row["parts"].values()) == row["bytes"]
    assert artifact.read("parity.webp")[8:12] == b"WEBP"
    # It keeps what it was made of, and nothing takes it away.
    bare = shutil.copytree(store.root, tmp_path / "bare")
    for folder in ("registry", "runs"):
        shutil.rmtree(bare / folder, ignore_errors=True)
    garbage = find_garbage(LocalStore(bare), [], before=datetime.now(UTC))
    kept = {row["path"], *(f"adapters/{concept}/{digest}" for concept, digest in adapters.items())}
    assert not kept & garbage.artifacts.keys()


def test_the_same_command_finds_it(
    exported: tuple[Path, Path, dict[str, Any]], terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farm.stages.export._build", None)
    with pytest.raises(TypeError):  # another order is another pack
        terminal.farm("-c", exported[1], "--concepts", ",".join(reversed(CONCEPTS)), "--concepts", "sepia")
    status, out, _ = terminal.farm("-c", exported[1], "--all", "--out", tmp_path / "out")
    assert status == 0 and "4 concepts, coreml, 32 px, base fp16" in out and "furthest from the server" in out
    (folder,) = (tmp_path / "out").iterdir()
    assert f"written to {folder}" in out
    assert function_names(read_model(folder / PACKAGE)) == list(CONCEPTS)
    assert {path.name for path in folder.iterdir()} == {PACKAGE, "pack.json", "certificate.json", "parity.webp"}


def test_an_update_is_small_and_complete(
    exported: tuple[Path, Path, dict[str, Any]], terminal: Terminal, tmp_path: Path
) -> None:
    store = copied(exported[0], tmp_path / "store")
    config = write_config(tmp_path / "farm.yaml", store.root)
    old = exported[2]["packs"][0]
    republish(store, "sepia", adapter_model=other_weights(store, "sepia", 0.5))
    out = tmp_path / "out"
    status, text, _ = terminal.farm("-c", config, "--all", "--since", old["pack"][:10], "--out", out, "--json")
    (row,) = json.loads(text)["packs"]
    assert status == 0 and [c["concept"] for c in row["concepts"] if c["new"]] == ["sepia"]
    assert row["since"] == old["pack"] and row["parts"]["base"] > 0
    folder = Path(row["out"])
    assert {path.name for path in folder.iterdir()} == {
        *("update.json", "weights.append", "model.mlmodel", "Manifest.json"),
        *("pack.json", "certificate.json", "parity.webp"),
    }
    before = sum(path.stat().st_size for path in (store.root / old["path"] / PACKAGE).rglob("*.bin"))
    assert (folder / "weights.append").stat().st_size < before / 4
    apply_update(store.root / old["path"] / PACKAGE, folder, tmp_path / "applied.mlpackage")
    for path in (store.root / row["path"] / PACKAGE).rglob("*"):
        if path.is_file():
            inside = path.relative_to(store.root / row["path"] / PACKAGE)
            assert (tmp_path / "applied.mlpackage" / inside).read_bytes() == path.read_bytes(), inside
    with pytest.raises(ValueError, match="this update is not for"):
        apply_update(store.root / row["path"] / PACKAGE, folder, tmp_path / "twice.mlpackage")
    told = terminal.mistake("-c", config, "--all", "--since", old["pack"], "--precision", "int8")
    assert told.startswith(f"--since: pack {old['pack']} has precision fp16, this one has int8")


def test_what_cannot_be_exported_is_left_out(root: Path, terminal: Terminal, tmp_path: Path) -> None:
    store = copied(root, tmp_path / "store")
    config = write_config(tmp_path / "farm.yaml", store.root)
    # Finite in float32 and in the file, but not where a phone multiplies it: only running the pack shows that.
    republish(store, "charcoal", adapter_model=other_weights(store, "charcoal", 3e4))
    entry = Registry(store).get("night")
    assert entry is not None
    other = json.loads(store.get(f"{entry.adapter}/adapter_config.json")) | {"base_model_name_or_path": "0123"}
    republish(store, "night", adapter_config=json.dumps(other).encode())
    damaged = f"{plan_of(store.root).adapter('sepia').path}/text.safetensors"
    store.put(damaged, store.get(damaged)[:-1])
    status, out, _ = terminal.farm("-c", config, "--all", "--json")
    (row,) = json.loads(out)["packs"]
    assert status == 1 and [c["concept"] for c in row["concepts"]] == ["cyanotype"]
    assert row["left_out"].keys() == {"charcoal", "night", "sepia"}
    assert "differs from the server's edit by" in row["left_out"]["charcoal"]
    assert "this adapter fits base 0123, not base " in row["left_out"]["night"]
    assert "text.safetensors is not the file that was put there" in row["left_out"]["sepia"]
    proof = json.loads(store.get(f"{row['path']}/certificate.json"))
    assert proof["passed"] and list(proof["functions"]) == ["cyanotype"]
    status, out, _ = terminal.farm("-c", config, "--concepts", "night")
    assert status == 1 and out.startswith("no pack is published, for none of its concepts can be exported: night: ")


def test_onnx(root: Path, terminal: Terminal, tmp_path: Path) -> None:
    store = copied(root, tmp_path / "store")
    config = write_config(tmp_path / "farm.yaml", store.root)
    arguments = ("-c", config, "--all", "--format", "onnx", "--precision", "int8", "--out", tmp_path / "out")
    status, out, _ = terminal.farm(*arguments, "--json")
    (row,) = json.loads(out)["packs"]
    folder = Path(row["out"])
    assert status == 0 and sum(row["parts"].values()) == row["bytes"]
    assert {path.name for path in folder.glob("*.onnx")} == {f"{c}.onnx" for c in CONCEPTS}
    assert row["parts"]["base"] == (folder / "base.bin").stat().st_size
    republish(store, "sepia", adapter_model=other_weights(store, "sepia", 0.5))
    status, out, _ = terminal.farm(*arguments, "--since", row["pack"], "--json")
    (new,) = json.loads(out)["packs"]
    assert status == 0 and {path.name for path in Path(new["out"]).glob("*.*")} == {
        *("sepia.onnx", "pack.json", "certificate.json", "parity.webp")
    }
    # A new model works beside the base that the phone has.
    assert store.get(f"{new['path']}/base.bin") == (folder / "base.bin").read_bytes()


def test_mistakes(
    root: Path, terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: tuple[Path, Path, Any]
) -> None:
    config = write_config(tmp_path / "farm.yaml", root)
    for arguments in ([], ["--all", "--concepts", "sepia"]):
        told = terminal.mistake("-c", config, *arguments)
        assert told == "farm export: name concepts with --concepts or say --all, one of the two."
    assert terminal.mistake("-c", config, "--concepts", "sepya").endswith("did you mean sepia?")
    assert terminal.mistake("-c", config, "--all", "--side", 36).endswith("which the network needs; take 32.")
    told = terminal.mistake("-c", config, "--all", "--max-mb", 0.05)
    assert told.startswith("--max-mb: a pack of one concept takes 0.") and told.endswith("not 0.05; allow more.")
    assert terminal.mistake("-c", config, "--all", "--max-mb", 0).startswith("--max-mb: 0 is no size")
    told = terminal.mistake("-c", config, "--all", "--format", "coreml-single", "--max-mb", 5)
    assert told.endswith("which --precision makes smaller; use that.")
    told = terminal.mistake("-c", config, "--all", "--format", "onnx", "--precision", "6bit")
    assert told.endswith("ONNX models have fp16 or int8 weights; take one of these.")
    assert "holds no one pack 123" in terminal.mistake("-c", config, "--all", "--since", "123")
    (tmp_path / "file").write_text("")
    told = terminal.mistake("-c", config, "--all", "--out", tmp_path / "file" / "out")
    assert "cannot be made a folder" in told
    empty = write_config(tmp_path / "empty.yaml", tmp_path / "empty")
    assert "nothing is published in" in terminal.mistake("-c", empty, "--all")
    bare = copied(root, tmp_path / "bare", "adapters", "bases", "registry")
    told = terminal.farm("-c", write_config(tmp_path / "bare.yaml", bare.root), "--all")[1]
    assert "packs are judged on its photographs; run `farm run`." in told
    # Without the extra, nothing can be done and one sentence says so.
    for library, format in (("coremltools", "coreml"), ("onnxscript", "onnx")):
        getattr(libraries, library.removesuffix("script")).cache_clear()
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, library, None)
            status, out, err = terminal.farm("-c", config, "--concepts", "sepia", "--format", format)
        assert status == 1 and library in out and "pip install 'e2gan-farm[export]'" in out and "Traceback" not in err


def test_a_budget_makes_several_packs(root: Path, tmp_path: Path) -> None:
    from e2gan.export.budget import LADDER, sizes
    from e2gan.infer import base_generator
    from farm.packs import plan_packs
    from farm.weights import read_adapter, read_base

    store = copied(root, tmp_path / "store")
    entries = list(Registry(store).list().values())
    base = base_generator(*read_base(store, f"bases/{entries[0].base}"))
    ranks = read_adapter(store, entries[0].adapter, entries[0].base, base.config)[0].ranks
    counted = {shape: sizes(base, ranks, shape) for shape in LADDER}
    common: dict[str, Any] = {"format": "coreml", "side": 32, "sources": "sources/x/y"}
    for shape in LADDER:
        (pack,) = plan_packs(store, entries, budget=counted[shape].total(4), **common)
        assert counted[pack.shape].total(4) <= counted[shape].total(4)
    packs = plan_packs(store, entries, budget=counted[LADDER[-1]].total(4) - 1, **common)
    assert len(packs) > 1 and [m.concept for pack in packs for m in pack.members] == list(CONCEPTS)
    assert len({pack.spec.digest for pack in packs}) == len(packs)
