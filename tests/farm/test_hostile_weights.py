"""Weights of a hostile store, whose manifests vouch for them: refused in a sentence, before a tensor is made."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tampered import replace_file
from terminal import Terminal
from tiny_farm import CONFIG, TinyFarm

from e2gan.config import GeneratorConfig
from e2gan.lora import adapter_shapes, new_adapter, thresholds
from e2gan.lora_peft import CONFIG_BYTES, largest_weights, load, save
from e2gan.model import Generator, blueprint, build_generator, generator_shapes
from e2gan.weights import HEADER_BYTES, save_weights
from farm.errors import IntegrityError, UserError
from farm.registry import Entry, Registry
from farm.serve.bank import Bank
from farm.serve.engines import Merging
from farm.serve.published import Published, UnknownConceptError
from farm.store import LocalStore
from farm.weights import read_adapter, read_base

GB = 1 << 30


@pytest.fixture
def farm(tmp_path: Path) -> TinyFarm:
    farm = TinyFarm(tmp_path / "store")
    farm.publish("ink", seed=1)
    return farm


@pytest.fixture
def entry(farm: TinyFarm) -> Entry:
    entry = farm.registry.get("ink")
    assert entry is not None
    return entry


@pytest.fixture
def no_tensors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(safetensors.torch, "load", lambda data: pytest.fail("tensors were made"))
    return None


def served(store: LocalStore) -> None:
    Bank(Published(store), Merging, byte_budget=GB).get("ink")


def header(file: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:end]), file[end:]


def changed(file: bytes, change: Callable[[dict[str, Any]], Any], more: bytes = b"") -> bytes:
    """The file with another header, which has no digest, and a longer body."""
    document, body = header(file)
    document.pop("__metadata__", None)
    change(document)
    text = json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text + body + more


def first(document: dict[str, Any], **fields: Any) -> None:
    next(iter(document.values())).update(fields)


WEIGHTS: dict[str, Callable[[bytes], bytes]] = {
    "a header of 2^60 bytes": lambda file: (2**60).to_bytes(8, "little") + file[8:],
    "cut short": lambda file: file[: len(file) // 2],
    "empty": lambda file: b"",
    "a huge shape": lambda file: changed(file, lambda d: first(d, shape=[2**40, 2**10])),
    "another type": lambda file: changed(file, lambda d: first(d, dtype="F64")),
    "a type of one byte": lambda file: changed(file, lambda d: first(d, dtype="U8")),
    "a tensor more": lambda file: changed(
        file,
        lambda d: d.update(x={"dtype": "F32", "shape": [1], "data_offsets": [size := len(header(file)[1]), size + 4]}),
        bytes(4),
    ),
    "another name": lambda file: changed(file, lambda d: d.update(x=d.pop(next(iter(d))))),
    "a tensor less": lambda file: changed(file, lambda d: d.pop(next(iter(d)))),
    "a header of 5 MB": lambda file: changed(file, lambda d: d.update(__metadata__={"x": 5_000_000 * "y"})),
}  # fmt: skip


@pytest.mark.parametrize("damage", WEIGHTS)
@pytest.mark.parametrize("name", ["generator.safetensors", "adapter_model.safetensors", "text.safetensors"])
def test_another_file_is_refused_before_a_tensor_is_made(
    farm: TinyFarm, entry: Entry, name: str, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"bases/{farm.base}" if name.startswith("generator") else entry.adapter
    replace_file(farm.store, path, name, WEIGHTS[damage](farm.store.get(f"{path}/{name}")))
    base = name.startswith("generator") or read_base(farm.store, f"bases/{farm.base}")
    made: list[bytes] = []
    really = safetensors.torch.load
    monkeypatch.setattr(safetensors.torch, "load", lambda data: made.append(data) or really(data))
    with pytest.raises(UserError, match=path) as caught:
        if base is True:
            read_base(farm.store, path)
        else:
            read_adapter(farm.store, path, farm.base, CONFIG)
    told = str(caught.value)
    assert told.endswith(".") and told.isprintable() and len(told) < 500
    assert len(made) == (name == "adapter_model.safetensors"), "its text is sound and read before"


@pytest.mark.parametrize(
    "change",
    [
        {"rank_pattern": {"stem": 10**12}},
        {"rank_pattern": {"stem": 2**63}},
        {"rank_pattern": {"stem": -1}},
        {"rank_pattern": {"stem": 0}},
        {"rank_pattern": {"stem": True}},
        {"rank_pattern": {"stem": 1.0}},
        {"rank_pattern": {"stem": "1"}},
        {"rank_pattern": {"residual.0.conv1": 1}},
        {"rank_pattern": {f"x{n}": 1 for n in range(1000)}},
        {"rank_pattern": []},
        {"rank_pattern": None},
        {"alpha_pattern": {}},
        {"lora_alpha": 1e308},
        {"lora_alpha": None},
        {"base_model_name_or_path": "x" * 10_000},
        {"base_model_name_or_path": ["x"]},
        {"more": "x" * CONFIG_BYTES},
    ],
    ids=lambda change: str(change)[:40],
)
def test_an_absurd_configuration_is_refused(farm: TinyFarm, entry: Entry, change: dict[str, Any]) -> None:
    config = json.loads(farm.store.get(f"{entry.adapter}/adapter_config.json")) | change
    replace_file(farm.store, entry.adapter, "adapter_config.json", json.dumps(config).encode())
    with pytest.raises(UserError, match=entry.adapter) as caught:
        served(farm.store)
    assert str(caught.value).endswith(".") and str(caught.value).isprintable() and len(str(caught.value)) < 2000


@pytest.mark.parametrize("data", [b"[" * 500_000, b'{"a":' * 100_000, b"9" * 100_000, b"{", b"", b"null", b"\xff"])
@pytest.mark.parametrize("name", ["adapter_config.json", "config.json", "manifest.json"])
def test_what_is_no_document_is_refused(farm: TinyFarm, entry: Entry, name: str, data: bytes) -> None:
    path = f"bases/{farm.base}" if name == "config.json" else entry.adapter
    if name == "manifest.json":
        farm.store.put(f"{path}/{name}", data)
    else:
        replace_file(farm.store, path, name, data)
    with pytest.raises(UserError, match=path):
        served(farm.store)


@pytest.mark.parametrize(
    "change",
    [
        {"channels": 10**9},
        {"residual_blocks": 10**9},
        {"transformer_blocks": 10**9},
        {"text_width": 10**12},
        {"text_tokens": 0},
        {"channels": "8"},
        {"channels": 8.0},
        {"channels": True},
        {"channels": 16},
        {"heads": 3},
        {"init": "pickle"},
        {"more": 1},
    ],
    ids=str,
)
def test_an_absurd_network_is_refused(farm: TinyFarm, no_tensors: None, change: dict[str, Any]) -> None:
    path = f"bases/{farm.base}"
    config = json.loads(farm.store.get(f"{path}/config.json")) | change
    replace_file(farm.store, path, "config.json", json.dumps(config).encode())
    with pytest.raises(IntegrityError, match=path):
        read_base(farm.store, path)


class Sparse(LocalStore):
    """No object of it may be read that is larger than a gigabyte."""

    def get(self, key: str, at_most: int | None = None) -> bytes:
        assert at_most is not None and at_most < GB, key
        return super().get(key, at_most)


@pytest.mark.parametrize(
    "name", ["generator.safetensors", "adapter_model.safetensors", "text.safetensors", "adapter_config.json"]
)
@pytest.mark.parametrize("listed", [True, False])
def test_a_file_of_a_terabyte_is_not_read(farm: TinyFarm, entry: Entry, name: str, listed: bool) -> None:
    """Whether its manifest vouches for a terabyte or not."""
    path = f"bases/{farm.base}" if name.startswith("generator") else entry.adapter
    if listed:
        replace_file(farm.store, path, name, b"", size=1 << 40)
    os.truncate(farm.store.path(f"{path}/{name}"), 1 << 40)
    with pytest.raises(UserError, match=rf"{path}/{name} (has 1,099,511,627,776 bytes|is not the file)"):
        served(Sparse(farm.store.root))


@pytest.mark.parametrize("key", ["manifest", "record"])
def test_a_document_of_a_terabyte_is_not_read(farm: TinyFarm, entry: Entry, key: str) -> None:
    key = f"{entry.adapter}/manifest.json" if key == "manifest" else "registry/ink.json"
    os.truncate(farm.store.path(key), 1 << 40)
    store = Sparse(farm.store.root)
    with pytest.raises(IntegrityError, match=rf"^The object {key} of the store .* has more than the 33,554,432 bytes"):
        Registry(store).record("ink")
        served(store)
    if key.startswith("registry/"):
        with pytest.raises(UnknownConceptError):  # a server goes on without it
            served(store)


def test_no_sound_file_is_too_large(farm: TinyFarm) -> None:
    """The paper's network and its largest adapter, at full precision."""
    config = GeneratorConfig()
    shapes = generator_shapes(config)
    assert shapes == {name: tuple(weight.shape) for name, weight in Generator(config).state_dict().items()}
    ranks = {name: max(shape[:2]) for name, shape in _weights(config).items()}
    assert adapter_shapes(blueprint(config), thresholds(blueprint(config)))
    adapter = new_adapter(build_generator(CONFIG, seed=0), dict.fromkeys(ranks, 2), seed=0)
    files = save(adapter, base="b")
    full = save_weights({f"base_model.model.{name}.weight": t for name, t in adapter.tensors.items()})
    assert len(full) < largest_weights(files["adapter_config.json"], CONFIG) < len(full) + 2 * HEADER_BYTES
    for weights in (full, files["adapter_model.safetensors"]):
        load({**files, "adapter_model.safetensors": weights}, base="b", model=CONFIG)


def _weights(config: GeneratorConfig) -> dict[str, torch.Size]:
    from e2gan.lora import crucial_layers

    return {name: layer.weight.shape for name, layer in crucial_layers(blueprint(config)).items()}  # type: ignore[union-attr, misc]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ranks_that_pass_make_the_tensors_they_say(data: st.DataObject) -> None:
    layers = _weights(CONFIG)
    ranks = data.draw(st.dictionaries(st.sampled_from(sorted(layers)), st.integers(-2, 40) | st.integers(), min_size=1))
    allowed = all(1 <= rank <= 4 * max(layers[name][:2]) for name, rank in ranks.items())
    try:
        shapes = adapter_shapes(blueprint(CONFIG), ranks)
    except ValueError:
        assert not allowed
    else:
        assert allowed
        made = new_adapter(blueprint(CONFIG), ranks, seed=0).tensors
        assert shapes == {name: tuple(tensor.shape) for name, tensor in made.items()}


def test_the_command_says_it_in_a_sentence(
    farm: TinyFarm, entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "farm.yaml"
    config.write_text(
        f"name: tiny\nstore: {farm.store.root}\nbase: {{concepts: [ink]}}\nranks: {{concepts: [fog]}}\n"
        "catalogue: [{id: ink, prompt: ink, editor: &p {kind: procedural}}, {id: fog, prompt: fog, editor: *p}]"
    )
    photo = tmp_path / "photo.png"
    PIL.Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(photo)
    replace_file(farm.store, entry.adapter, "text.safetensors", (2**60).to_bytes(8, "little"))
    terminal = Terminal(monkeypatch, capsys)
    told = terminal.mistake("edit", "-c", config, photo, tmp_path / "edited.png", "--concept", "ink")
    assert "text.safetensors: not a whole safetensors file: a header of 1,152,921,504,606,846,976 bytes" in told
    assert not (tmp_path / "edited.png").exists()
