import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import assert_same, edit, mixed_ranks, tiny, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from e2gan.config import GeneratorConfig
from e2gan.lora import Adapter, crucial_layers, merge, new_adapter, searched_ranks, update
from e2gan.lora_attach import attach, extract, peft_config
from e2gan.lora_peft import load, save
from e2gan.model import Generator
from e2gan.weights import load_weights, save_weights

REFUSED = "not an adapter in peft's format"


def test_pefts_own_merge_equals_ours() -> None:
    from peft.tuners.lora import LoraLayer

    adapter = trained(mixed_ranks(), scale=0.5)
    generator = tiny()
    attach(generator, adapter, space="branches")
    attached, ours = edit(generator), merge(tiny(), adapter)
    kinds = set()
    for name, base in crucial_layers(tiny()).items():
        layer = generator.get_submodule(name)
        assert isinstance(layer, LoraLayer)
        delta = 0.5 * update(base, adapter.tensors[f"{name}.lora_A"], adapter.tensors[f"{name}.lora_B"])
        torch.testing.assert_close(layer.get_delta_weight("default"), delta)
        before = layer.get_base_layer().weight.clone()
        layer.merge()
        torch.testing.assert_close(layer.get_base_layer().weight, ours[f"{name}.weight"])
        layer.unmerge()
        torch.testing.assert_close(layer.get_base_layer().weight, before)
        layer.merge()
        kinds.add(type(base))
    assert kinds == {nn.Conv2d, nn.ConvTranspose2d, nn.Linear}
    torch.testing.assert_close(edit(generator), attached, atol=2e-5, rtol=0)


def written(folder: Path, adapter: Adapter) -> None:
    for name, data in save(adapter, base="abc").items():
        (folder / name).write_bytes(data)


@pytest.mark.parametrize("scale", [1.0, 0.1, 2 / 3])
def test_files_round_trip_in_half_precision(scale: float) -> None:
    adapter = trained(mixed_ranks(), scale=scale)
    files = save(adapter, base="abc")
    assert files == save(adapter, base="abc")
    halved = {name: tensor.half().float() for name, tensor in adapter.tensors.items()}
    back = load(files, base="abc")
    assert_same(back, Adapter(ranks=adapter.ranks, scale=scale, tensors=halved))
    assert save(back, base="abc") == files


def test_peft_itself_loads_the_files(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel

    from e2gan.lora_transposed import LoraConvTranspose2d

    written(tmp_path, trained(mixed_ranks(), scale=0.4))
    config = LoraConfig.from_pretrained(tmp_path)
    assert config.base_model_name_or_path == "abc"
    config._register_custom_module({nn.ConvTranspose2d: LoraConvTranspose2d})
    model = PeftModel.from_pretrained(tiny(), tmp_path, config=config)
    ours = tiny()
    attach(ours, load(save(trained(mixed_ranks(), scale=0.4), base="abc"), base="abc"), space="branches")
    torch.testing.assert_close(edit(model), edit(ours), atol=1e-6, rtol=0)
    torch.testing.assert_close(edit(model.merge_and_unload()), edit(ours), atol=2e-5, rtol=0)


def test_peft_without_our_layer_says_so(tmp_path: Path) -> None:
    from peft import PeftModel

    written(tmp_path, trained({"up1": 1}))
    with pytest.raises(ValueError, match="ConvTranspose2d"):
        PeftModel.from_pretrained(tiny(), tmp_path)


def test_another_base_is_refused_naming_both() -> None:
    with pytest.raises(ValueError, match="fits base abc, not base xyz"):
        load(save(trained({"stem": 1}), base="abc"), base="xyz")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_truncated_files_are_refused(data: st.DataObject) -> None:
    files = save(trained({"stem": 1, "up1": 2}), base="abc")
    name = data.draw(st.sampled_from(sorted(files)))
    short = files[name].rstrip()[: data.draw(st.integers(0, len(files[name].rstrip()) - 1))]
    with pytest.raises(ValueError, match=REFUSED):
        load({**files, name: short}, base="abc")


@pytest.mark.parametrize(
    "damage",
    [
        {"rank_pattern": None},
        {"rank_pattern": {"stem": "three", "up1": 2}},
        {"rank_pattern": {"stem": 1, "up1": 2, "head": 1}},
        {"rank_pattern": {"stem": 4, "up1": 2}},
        {"alpha_pattern": {"stem": 1.0}},
        {"alpha_pattern": {"stem": 1.0, "up1": 3.0}},
        {"alpha_pattern": []},
        {"lora_alpha": "one"},
    ],
    ids=str,
)
def test_a_damaged_configuration_is_refused(damage: dict[str, object]) -> None:
    files = save(trained({"stem": 1, "up1": 2}), base="abc")
    config = json.loads(files["adapter_config.json"]) | damage
    with pytest.raises(ValueError, match=REFUSED):
        load({**files, "adapter_config.json": json.dumps(config).encode()}, base="abc")


@pytest.mark.parametrize("config", [b"", b"{}", b"[]", b"null", b"3", b"\xff\xfe"])
def test_another_file_in_place_of_the_configuration(config: bytes) -> None:
    files = save(trained({"stem": 1}), base="abc")
    with pytest.raises(ValueError, match=REFUSED):
        load({**files, "adapter_config.json": config}, base="abc")


def test_a_missing_file_is_named() -> None:
    files = save(trained({"stem": 1}), base="abc")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        load({"adapter_config.json": files["adapter_config.json"]}, base="abc")


def test_a_rank_that_the_tensors_do_not_have_is_refused_before_use() -> None:
    adapter = trained({"stem": 2})
    with pytest.raises(ValueError, match="does not fit the generator: stem"):
        merge(tiny(), Adapter(ranks={"stem": 1}, scale=1.0, tensors=adapter.tensors))


FILES = save(trained({"stem": 1, "up1": 2}), base="abc")


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(FILES["adapter_model.safetensors"]) - 1), st.integers(1, 255))
def test_tampered_weights_are_refused(place: int, change: int) -> None:
    """But for a byte in the digest's own name, without which the file looks like peft's: the tensors are then whole."""
    weights = bytearray(FILES["adapter_model.safetensors"])
    weights[place] ^= change
    tampered = {**FILES, "adapter_model.safetensors": bytes(weights)}
    start = FILES["adapter_model.safetensors"].index(b'"sha256"')
    if start < place < start + 7:
        with contextlib.suppress(ValueError):
            assert_same(load(tampered, base="abc"), load(FILES, base="abc"))
    else:
        with pytest.raises(ValueError, match=REFUSED):
            load(tampered, base="abc")


def test_files_that_peft_wrote_are_read(tmp_path: Path) -> None:
    """peft's own save of what we attached, fp32 and without a digest."""
    from peft import PeftModel

    written(tmp_path, trained(mixed_ranks()))
    model = PeftModel.from_pretrained(tiny(), tmp_path, config=peft_config(trained(mixed_ranks())))
    model.save_pretrained(tmp_path / "again")
    weights = (tmp_path / "again" / "adapter_model.safetensors").read_bytes()
    assert "sha256" not in load_weights(weights)[1]
    files = save(trained(mixed_ranks()), base="abc")
    assert_same(load({**files, "adapter_model.safetensors": weights}, base="abc"), load(files, base="abc"))


def test_weights_of_other_layers_are_refused() -> None:
    tensors, metadata = load_weights(FILES["adapter_model.safetensors"])
    tensors.pop("base_model.model.up1.lora_B.weight")
    with pytest.raises(ValueError, match=r"up1\.lora_B"):
        load({**FILES, "adapter_model.safetensors": save_weights(tensors, **metadata)}, base="abc")


def test_the_papers_adapter_is_a_small_file() -> None:
    with torch.device("meta"):
        generator = Generator(GeneratorConfig())
    files = save(new_adapter(generator, searched_ranks(generator), seed=0), base="b" * 64)
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert len(files["adapter_model.safetensors"]) <= 190_000


@pytest.mark.parametrize("space", ["weights", "branches"])
def test_what_was_trained_in_either_space_is_saved_alike(space: Any) -> None:
    generator = tiny()
    attach(generator, trained(mixed_ranks(), scale=0.3), space=space)
    assert save(extract(generator), base="abc") == save(trained(mixed_ranks(), scale=0.3), base="abc")
