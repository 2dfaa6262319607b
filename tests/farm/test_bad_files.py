"""Files that are damaged, gone or another's: each command says so in a sentence, fails, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from sound_adapters import put_adapter
from stage_farm import contents, copied, plan_of, write_config
from tampered import edit_manifest
from terminal import Terminal

from farm.registry import Registry
from farm.store import LocalStore

CONCEPT = "night"


@pytest.fixture
def store(root: Path, tmp_path: Path) -> LocalStore:
    return copied(root, tmp_path / "store", "bases", "adapters", "registry", "ranks", "quality", "selections")


@pytest.fixture
def path(root: Path) -> str:
    """The folder of the adapter that is to be damaged."""
    return plan_of(root).adapter(CONCEPT).path


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    monkeypatch.setenv("HF_TOKEN", "")
    return Terminal(monkeypatch, capsys)


def wrong_hash(store: LocalStore, path: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["files"]["adapter_model.safetensors"]["sha256"] = 64 * "0"

    edit_manifest(store, path, change)


def truncated(store: LocalStore, path: str) -> None:
    key = f"{path}/adapter_model.safetensors"
    store.put(key, store.get(key)[:-10])


def file_gone(store: LocalStore, path: str) -> None:
    store.delete(f"{path}/adapter_model.safetensors")


def all_gone(store: LocalStore, path: str) -> None:
    for key in store.list(f"{path}/"):
        store.delete(key)


def manifest_gone(store: LocalStore, path: str) -> None:
    store.delete(f"{path}/manifest.json")


def of_another(store: LocalStore, path: str) -> None:
    store.put(f"registry/{CONCEPT}.json", store.get("registry/sepia.json"))


DAMAGES = [wrong_hash, truncated, file_gone, all_gone, manifest_gone, of_another]


def sentences(lines: list[str], about: tuple[str, ...]) -> None:
    assert lines and all(line[-1] == "." and line.isprintable() for line in lines), lines
    assert any(word in line for line in lines for word in about), lines


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["publish", "rollback", "edit", "push-hub", "sync", "verify"])
def test_it_is_a_sentence_and_changes_nothing(
    terminal: Terminal, store: LocalStore, path: str, tmp_path: Path, command: str, damage: Callable[..., None]
) -> None:
    config, photo, there = write_config(tmp_path / "farm.yaml", store.root), tmp_path / "photo.png", tmp_path / "there"
    PIL.Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(photo)
    if command in ("publish", "rollback"):  # to the damaged one, from another that is sound
        Registry(store).publish(CONCEPT, **put_adapter(store, CONCEPT, "new"))
    damage(store, path)
    before = contents(store.root)
    arguments: dict[str, list[object]] = {
        "publish": ["-c", config, CONCEPT],
        "rollback": ["-c", config, CONCEPT],
        "edit": ["-c", config, photo, tmp_path / "edited.png", "--concept", CONCEPT],
        "push-hub": ["-c", config, CONCEPT, "--repo", "you/night"],
        "sync": [store.root, there],
        "verify": ["-c", config],
    }
    status, out, err = terminal.farm(command, *arguments[command])
    assert status in (1, 2)
    if status == 2:
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    told = [err.rstrip()] if status == 2 else out.splitlines()
    if command in ("sync", "verify"):
        told.pop()  # how much was read
    sentences(told, (path, f"registry/{CONCEPT}.json", f"{CONCEPT} is not published"))
    assert contents(store.root) == before and not (tmp_path / "edited.png").exists()
    if command == "sync":
        assert Registry(LocalStore(there)).record(CONCEPT) is None
        assert set(Registry(LocalStore(there)).list()) == {"charcoal", "cyanotype", "sepia"}


@pytest.mark.parametrize("command", ["publish", "rollback", "edit"])
def test_an_artifact_deleted_under_a_reader(
    terminal: Terminal, store: LocalStore, path: str, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifest has been read when its files go."""
    config, photo = write_config(tmp_path / "farm.yaml", store.root), tmp_path / "photo.png"
    PIL.Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(photo)
    if command != "edit":
        Registry(store).publish(CONCEPT, **put_adapter(store, CONCEPT, "new"))
    record = store.get(f"registry/{CONCEPT}.json")

    class Vanishing(LocalStore):
        def get(self, key: str, at_most: int | None = None) -> bytes:
            data = super().get(key, at_most)
            if key == f"{path}/manifest.json":
                for name in ("adapter_model.safetensors", "adapter_config.json", "text.safetensors"):
                    self.delete(f"{path}/{name}")
            return data

    for opened in ("farm.store.open_store", "farm.editing.open_store"):
        monkeypatch.setattr(opened, lambda *_: Vanishing(store.root))
    rest = [photo, tmp_path / "edited.png", "--concept", CONCEPT] if command == "edit" else [CONCEPT]
    status, out, err = terminal.farm(command, "-c", config, *rest)
    told = out + err
    assert status in (1, 2) and told.count("\n") == 1 and "is missing: delete the folder" in told
    assert store.get(f"registry/{CONCEPT}.json") == record and not (tmp_path / "edited.png").exists()
