import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from e2gan.config import GeneratorConfig, TrainConfig
from e2gan.lora import (
    Adapter,
    Ranks,
    attach,
    crucial_layers,
    extract,
    grow,
    load,
    merge,
    new_adapter,
    save,
    searched_ranks,
    update,
)
from e2gan.model import Generator, build_generator
from e2gan.pairs import Pairs
from e2gan.train import ConceptPairs, train

TINY = GeneratorConfig(channels=4, heads=2, text_tokens=3, text_width=5)
LAYERS = tuple(crucial_layers(build_generator(TINY, seed=0)))


def tiny() -> Generator:
    return build_generator(TINY, seed=0)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def edit(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(noise(2, 3, 16, 24).clamp(-1, 1), noise(1, 3, 5))
    return out


def mixed_ranks() -> Ranks:
    return {name: 1 + i % 3 for i, name in enumerate(LAYERS)}


def trained(ranks: Ranks, *, scale: float = 1.0, seed: int = 0) -> Adapter:
    """An adapter whose update is far from zero."""
    adapter = new_adapter(tiny(), ranks, scale=scale, seed=seed)
    tensors = {name: noise(*t.shape, seed=i) * 0.1 for i, (name, t) in enumerate(adapter.tensors.items())}
    return Adapter(ranks=adapter.ranks, scale=scale, tensors=tensors)


def assert_same(a: Adapter, b: Adapter) -> None:
    assert (a.ranks, a.scale) == (b.ranks, b.scale)
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        assert torch.equal(tensor, b.tensors[name]), name


# What is adapted, and how large it is


def test_crucial_layers_are_all_but_the_residual_blocks() -> None:
    attention = [
        f"transformer.{kind}_attention.{part}" for kind in ("self", "cross") for part in ("q", "k", "v", "out")
    ]
    assert sorted(LAYERS) == sorted(
        [
            "stem",
            "down1",
            "down2",
            "transformer.down",
            *attention,
            "transformer.feed_forward.proj",
            "transformer.feed_forward.out",
            "transformer.up",
            "up1",
            "up2",
            "head",
        ]
    )


def test_crucial_layers_without_transformer() -> None:
    bare = build_generator(GeneratorConfig(channels=2, transformer=False), seed=0)
    assert list(crucial_layers(bare)) == ["stem", "down1", "down2", "up1", "up2", "head"]


def test_searched_ranks_give_the_papers_size() -> None:
    with torch.device("meta"):
        generator = Generator(GeneratorConfig())
    ranks = searched_ranks(generator)
    convolutions = {"stem": 1, "down1": 4, "down2": 8, "transformer.down": 8, "transformer.up": 8, "up1": 8, "up2": 4}
    assert ranks == {name: {**convolutions, "head": 1}.get(name, 1) for name in ranks}
    adapter = new_adapter(generator, ranks, seed=0)
    assert adapter.parameter_count() == 91_414
    whole = sum(p.numel() for p in generator.parameters())
    assert adapter.parameter_count() / whole == pytest.approx(0.0128, rel=0.02)
    files = save(adapter, base="b" * 64)
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert len(files["adapter_model.safetensors"]) <= 190_000


def test_new_adapter_depends_on_its_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = new_adapter(tiny(), mixed_ranks(), seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(first, new_adapter(tiny(), mixed_ranks(), seed=3))
    other = new_adapter(tiny(), mixed_ranks(), seed=4)
    assert not torch.equal(first.tensors["stem.lora_A"], other.tensors["stem.lora_A"])


def test_a_starts_within_pefts_bound_and_b_at_zero() -> None:
    with torch.device("meta"):
        generator = Generator(GeneratorConfig())
    adapter = new_adapter(generator, searched_ranks(generator), seed=0)
    for name, fan_in in (("down2", 128 * 9), ("up1", 256 * 9), ("transformer.cross_attention.k", 768)):
        a = adapter.tensors[f"{name}.lora_A"]
        assert a.abs().max() <= fan_in**-0.5
        assert a.std().item() == pytest.approx(fan_in**-0.5 / 3**0.5, rel=0.1)  # of a uniform distribution
    assert not any(t.any() for name, t in adapter.tensors.items() if name.endswith("lora_B"))


@pytest.mark.parametrize(
    ("ranks", "sentence"),
    [
        ({"stem": 1, "residual.0.conv1": 1}, "'residual.0.conv1' is not a crucial layer"),
        ({"nonsense": 1}, "'nonsense' is not a crucial layer.*stem"),
        ({"stem": 1, "head": 0}, "rank of head must be at least 1, not 0"),
        ({"head": -2}, "rank of head"),
    ],
)
def test_wrong_ranks_are_named(ranks: Ranks, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        new_adapter(tiny(), ranks, seed=0)


# Attaching and merging


def test_a_new_adapter_changes_nothing() -> None:
    generator = tiny()
    before = edit(generator)
    attach(generator, new_adapter(generator, mixed_ranks(), seed=0))
    torch.testing.assert_close(edit(generator), before, atol=1e-6, rtol=0)
    for name, weight in merge(tiny(), new_adapter(tiny(), mixed_ranks(), seed=0)).items():
        assert torch.equal(weight, tiny().state_dict()[name])


@pytest.mark.parametrize("scale", [1.0, 0.1, 4.0])
@pytest.mark.parametrize("layers", [LAYERS, ("up1",), ("stem", "transformer.self_attention.out")])
def test_attached_equals_merged(layers: tuple[str, ...], scale: float) -> None:
    adapter = trained({name: rank for name, rank in mixed_ranks().items() if name in layers}, scale=scale)
    attached, merged, base = tiny(), tiny(), tiny()
    attach(attached, adapter)
    weights = merge(base, adapter)
    assert weights.keys() == {f"{name}.weight" for name in layers}
    merged.load_state_dict(weights, strict=False)
    torch.testing.assert_close(edit(attached), edit(merged), atol=2e-5, rtol=0)
    assert not torch.allclose(edit(merged), edit(base), atol=1e-3)
    for name, weight in tiny().state_dict().items():
        assert torch.equal(base.state_dict()[name], weight), f"merge changed the base's {name}"


def test_pefts_own_merge_equals_ours() -> None:
    from peft.tuners.lora import LoraLayer

    adapter = trained(mixed_ranks(), scale=0.5)
    generator = tiny()
    attach(generator, adapter)
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


def scatter(x: Tensor, weight: Tensor, stride: int, padding: int, output_padding: int) -> Tensor:
    """A transposed convolution by its definition: every input pixel adds its kernel to the output."""
    channels, height, width = x.shape
    kernel = weight.shape[2]
    full = torch.zeros(weight.shape[1], stride * (height - 1) + kernel + 1, stride * (width - 1) + kernel + 1)
    for i in range(height):
        for j in range(width):
            for c in range(channels):
                y, z = stride * i, stride * j
                full[:, y : y + kernel, z : z + kernel] += x[c, i, j] * weight[c]
    size = [stride * (side - 1) - 2 * padding + kernel + output_padding for side in (height, width)]
    return full[:, padding : padding + size[0], padding : padding + size[1]]


def test_transposed_layer_by_brute_force() -> None:
    generator, adapter = tiny(), trained({"up1": 3}, scale=0.7)
    base, bias = generator.up1.weight.clone(), noise(8)
    with torch.no_grad():
        generator.up1.bias.copy_(bias)  # type: ignore[union-attr]
    attach(generator, adapter)
    x = noise(16, 3, 4)
    low = scatter(x, adapter.tensors["up1.lora_A"], 2, 1, 1)
    wide = torch.einsum("or,rhw->ohw", adapter.tensors["up1.lora_B"][:, :, 0, 0], low)
    expected = scatter(x, base, 2, 1, 1) + bias[:, None, None] + 0.7 * wide
    assert expected.shape == (8, 6, 8)
    with torch.no_grad():
        torch.testing.assert_close(generator.up1(x[None])[0], expected, atol=1e-5, rtol=1e-4)


def test_extract_returns_what_was_attached() -> None:
    for scale in (1.0, 0.1, 0.3):  # 0.1 * 3 / 3 is not 0.1
        generator, adapter = tiny(), trained(mixed_ranks(), scale=scale)
        attach(generator, adapter)
        taken = extract(generator)
        assert_same(taken, adapter)
        taken.tensors["stem.lora_A"].zero_()
        assert_same(extract(generator), adapter)


@pytest.mark.parametrize("use", [attach, merge])
def test_an_adapter_for_another_shape_is_refused(use: object) -> None:
    assert callable(use)
    wide = build_generator(GeneratorConfig(channels=8, heads=2, text_tokens=3, text_width=5), seed=0)
    with pytest.raises(ValueError, match="does not fit the generator: stem"):
        use(wide, trained(mixed_ranks()))
    bare = build_generator(GeneratorConfig(channels=4, transformer=False), seed=0)
    with pytest.raises(ValueError, match="is not a crucial layer of this generator"):
        use(bare, trained(mixed_ranks()))


def test_only_the_adapter_trains() -> None:
    generator, adapter = tiny(), new_adapter(tiny(), mixed_ranks(), seed=0)
    attach(generator, adapter)
    trainable = {name for name, p in generator.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.lora_{side}.default.weight" for name in LAYERS for side in "AB"}
    source = torch.randint(0, 256, (4, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pairs = Pairs(ids=tuple("abcd"), source=source, target=255 - source)
    config = TrainConfig(epochs=4, batch_size=4, learning_rate=1e-2, discriminator_channels=2, precision="fp32")
    train(generator, [ConceptPairs(concept="x", text=noise(3, 5), pairs=pairs)], config, seed=0)
    learnt = extract(generator)
    for name in LAYERS:
        for side in "AB":
            key = f"{name}.lora_{side}"
            assert not torch.equal(learnt.tensors[key], adapter.tensors[key]), f"{key} did not train"
    untouched = tiny().state_dict()
    for name, weight in generator.state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(weight, untouched[name.replace(".base_layer", "")]), f"{name} moved"


# Growing

growth = st.dictionaries(st.sampled_from(LAYERS), st.tuples(st.integers(1, 4), st.integers(0, 4)), min_size=1)


@settings(max_examples=30, deadline=None)
@given(growth, st.sampled_from([0.1, 1.0, 3.0]), st.integers(0, 2**31))
def test_growing_keeps_the_update(ranks: Mapping[str, tuple[int, int]], scale: float, seed: int) -> None:
    generator = tiny()
    small = trained({name: rank for name, (rank, _) in ranks.items()}, scale=scale)
    wanted = {name: rank + more for name, (rank, more) in ranks.items()}
    grown = grow(small, generator, wanted, seed=seed)
    assert (grown.ranks, grown.scale) == (wanted, scale)
    before = merge(generator, small)
    for name, weight in merge(generator, grown).items():
        torch.testing.assert_close(weight, before[name], atol=1e-6, rtol=1e-5)
    for name, (rank, more) in ranks.items():
        a, b = grown.tensors[f"{name}.lora_A"], grown.tensors[f"{name}.lora_B"]
        rows = a.movedim(1, 0) if name in ("up1", "up2", "transformer.up") else a
        assert rows.shape[0] == b.shape[1] == rank + more
        assert not b[:, rank:].any()
        assert all(row.any() for row in rows)  # else the new ranks could never learn


def test_growing_keeps_the_output() -> None:
    small = trained(mixed_ranks())
    before, after = tiny(), tiny()
    attach(before, small)
    attach(after, grow(small, tiny(), {name: 2 * rank for name, rank in small.ranks.items()}, seed=1))
    torch.testing.assert_close(edit(after), edit(before), atol=1e-5, rtol=0)


def test_growing_leaves_the_old_adapter_alone() -> None:
    small = trained(mixed_ranks())
    grown = grow(small, tiny(), small.ranks, seed=1)
    assert_same(grown, small)
    for tensor in grown.tensors.values():
        tensor.zero_()
    assert_same(small, trained(mixed_ranks()))


def test_an_adapter_only_grows_and_on_its_layers() -> None:
    small = trained({"stem": 2, "head": 1})
    with pytest.raises(ValueError, match="rank cannot shrink: stem from 2 to 1"):
        grow(small, tiny(), {"stem": 1, "head": 4}, seed=0)
    for ranks in ({"stem": 2}, {"stem": 2, "head": 1, "up1": 1}):
        with pytest.raises(ValueError, match="grows on its own layers"):
            grow(small, tiny(), ranks, seed=0)


# Files


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
    attach(ours, load(save(trained(mixed_ranks(), scale=0.4), base="abc"), base="abc"))
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
    with pytest.raises(ValueError, match="not an adapter in peft's format"):
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
    with pytest.raises(ValueError, match="not an adapter in peft's format"):
        load({**files, "adapter_config.json": json.dumps(config).encode()}, base="abc")


@pytest.mark.parametrize("config", [b"", b"{}", b"[]", b"null", b"3", b"\xff\xfe"])
def test_another_file_in_place_of_the_configuration(config: bytes) -> None:
    files = save(trained({"stem": 1}), base="abc")
    with pytest.raises(ValueError, match="not an adapter in peft's format"):
        load({**files, "adapter_config.json": config}, base="abc")


def test_a_missing_file_is_named() -> None:
    files = save(trained({"stem": 1}), base="abc")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        load({"adapter_config.json": files["adapter_config.json"]}, base="abc")


def test_a_rank_that_the_tensors_do_not_have_is_refused_before_use() -> None:
    adapter = trained({"stem": 2})
    with pytest.raises(ValueError, match="does not fit the generator: stem"):
        merge(tiny(), Adapter(ranks={"stem": 1}, scale=1.0, tensors=adapter.tensors))
