from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from adapters import LAYERS, TINY, assert_same, edit, mixed_ranks, noise, tiny, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from e2gan.batches import ConceptPairs
from e2gan.config import GeneratorConfig, TrainConfig
from e2gan.lora import crucial_layers, grow, lora_sizes, merge, new_adapter, searched_ranks, thresholds
from e2gan.lora_attach import attach, extract
from e2gan.model import Generator, build_generator
from e2gan.pairs import Pairs
from e2gan.ranks import Ranks, layer_threshold
from e2gan.train import train

SPACES = ["weights", "branches"]


# What is adapted, and how large it is


def test_crucial_layers_are_all_but_the_residual_blocks() -> None:
    attention = [
        f"transformer.0.{kind}_attention.{part}" for kind in ("self", "cross") for part in ("q", "k", "v", "out")
    ]
    assert sorted(LAYERS) == sorted(
        [
            "stem",
            "down1",
            "down2",
            "transformer.0.down",
            *attention,
            "transformer.0.feed_forward.proj",
            "transformer.0.feed_forward.out",
            "transformer.0.up",
            "up1",
            "up2",
            "head",
        ]
    )


def test_crucial_layers_without_transformer() -> None:
    bare = build_generator(GeneratorConfig(channels=2, transformer_blocks=0), seed=0)
    assert list(crucial_layers(bare)) == ["stem", "down1", "down2", "up1", "up2", "head"]


def test_crucial_layers_of_other_transformers() -> None:
    two = crucial_layers(build_generator(replace(TINY, transformer_blocks=2), seed=0))
    assert len(two) - len(LAYERS) == sum(name.startswith("transformer.0.") for name in LAYERS)
    assert {name.replace("transformer.1.", "transformer.0.") for name in two} == set(LAYERS)
    pool = build_generator(replace(TINY, transformer_sampling="pool", cross_attention=False), seed=0)
    gone = {name for name in LAYERS if name in ("transformer.0.down", "transformer.0.up") or "cross_attention" in name}
    assert set(crucial_layers(pool)) == set(LAYERS) - gone


@pytest.mark.parametrize("channels", [4, 64])
def test_thresholds_are_those_of_the_layers_sizes(channels: int) -> None:
    with torch.device("meta"):
        generator = Generator(GeneratorConfig(channels=channels))
    c, b = channels, 4 * channels
    ends = {"stem": (3, c), "down1": (c, 2 * c), "down2": (2 * c, b), "up1": (b, 2 * c), "up2": (2 * c, c)}
    convolutions = {**ends, "head": (c, 3), "transformer.0.down": (b, b), "transformer.0.up": (b, b)}
    limits = thresholds(generator)
    assert limits.keys() == crucial_layers(generator).keys()
    for name, limit in limits.items():
        expected = layer_threshold("conv", *convolutions[name]) if name in convolutions else 1
        assert limit == expected, name


def test_searched_ranks_give_the_papers_size() -> None:
    with torch.device("meta"):
        generator = Generator(GeneratorConfig())
    ranks = searched_ranks(generator)
    middle = {"down2": 8, "transformer.0.down": 8, "transformer.0.up": 8, "up1": 8}
    assert ranks == {name: {"down1": 4, **middle, "up2": 4}.get(name, 1) for name in crucial_layers(generator)}
    adapter = new_adapter(generator, ranks, seed=0)
    assert adapter.parameter_count() == 91_414
    whole = sum(p.numel() for p in generator.parameters())
    assert adapter.parameter_count() / whole == pytest.approx(0.0128, rel=0.02)


def test_sizes_are_what_a_rank_costs() -> None:
    sizes = lora_sizes(tiny())
    for ranks in (mixed_ranks(), {"up1": 3}):
        count = new_adapter(tiny(), ranks, seed=0).parameter_count()
        assert count == sum(rank * sizes[name] for name, rank in ranks.items())


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
    for name, fan_in in (("down2", 128 * 9), ("up1", 256 * 9), ("transformer.0.cross_attention.k", 768)):
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


@pytest.mark.parametrize("space", SPACES)
def test_a_new_adapter_changes_nothing(space: Any) -> None:
    generator = tiny()
    before = edit(generator)
    attach(generator, new_adapter(generator, mixed_ranks(), seed=0), space=space)
    torch.testing.assert_close(edit(generator), before, atol=1e-6, rtol=0)
    for name, weight in merge(tiny(), new_adapter(tiny(), mixed_ranks(), seed=0)).items():
        assert torch.equal(weight, tiny().state_dict()[name])


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("scale", [1.0, 0.1, 4.0])
@pytest.mark.parametrize("layers", [LAYERS, ("up1",), ("stem", "transformer.0.self_attention.out")])
def test_attached_equals_merged(layers: tuple[str, ...], scale: float, space: Any) -> None:
    adapter = trained({name: rank for name, rank in mixed_ranks().items() if name in layers}, scale=scale)
    attached, merged, base = tiny(), tiny(), tiny()
    attach(attached, adapter, space=space)
    weights = merge(base, adapter)
    assert weights.keys() == {f"{name}.weight" for name in layers}
    merged.load_state_dict(weights, strict=False)
    torch.testing.assert_close(edit(attached), edit(merged), atol=2e-5, rtol=0)
    assert not torch.allclose(edit(merged), edit(base), atol=1e-3)
    for name, weight in tiny().state_dict().items():
        assert torch.equal(base.state_dict()[name], weight), f"merge changed the base's {name}"


@settings(max_examples=15, deadline=None)
@given(
    st.dictionaries(st.sampled_from(LAYERS), st.integers(1, 4), min_size=1),
    st.sampled_from([0.1, 1.0, 3.0]),
    st.sampled_from([replace(TINY, transformer_blocks=2), TINY]),
)
def test_both_spaces_give_the_same_output_and_gradients(ranks: Ranks, scale: float, shape: GeneratorConfig) -> None:
    adapter = trained(ranks, scale=scale)
    outputs: dict[str, Tensor] = {}
    gradients: dict[str, dict[str, Tensor]] = {}
    for space in ("weights", "branches"):
        generator = build_generator(shape, seed=0).double()
        attach(generator, adapter, space=space)  # type: ignore[arg-type]
        generator.double()
        outputs[space] = generator(noise(2, 3, 16, 24).clamp(-1, 1).double(), noise(1, 3, 5).double())
        (outputs[space] * noise(2, 3, 16, 24, seed=1)).sum().backward()
        gradients[space] = {in_both(name): p.grad for name, p in generator.named_parameters() if p.grad is not None}
    torch.testing.assert_close(outputs["weights"], outputs["branches"], atol=1e-10, rtol=0)
    assert gradients["weights"].keys() == adapter.tensors.keys()
    largest = max(g.abs().max().item() for g in gradients["weights"].values())
    torch.testing.assert_close(gradients["weights"], gradients["branches"], atol=1e-8 * largest, rtol=0)


def in_both(parameter: str) -> str:
    """A trained parameter's name in an adapter, from its name in either space."""
    name = parameter.removesuffix(".default.weight")
    for side in "ab":
        name = name.replace(f".parametrizations.weight.0.{side}", f".lora_{side.upper()}")
    return name


def test_training_in_both_spaces_follows_the_same_losses() -> None:
    curves: dict[str, list[float]] = {}
    for space in ("weights", "branches"):
        generator, losses = tiny(), curves.setdefault(space, [])
        attach(generator, new_adapter(tiny(), mixed_ranks(), scale=2.0, seed=0), space=space)  # type: ignore[arg-type]
        train(
            generator,
            [inverted()],
            TrainConfig(epochs=20, batch_size=4, learning_rate=3e-3, adversarial_weight=0.0, precision="fp32"),
            seed=0,
            on_progress=lambda done, losses=losses: losses.append(done.losses["l1"]),  # type: ignore[misc]
            progress_every=1,
        )
    assert curves["weights"] == pytest.approx(curves["branches"], rel=2e-3)
    assert curves["weights"][-1] < 0.95 * curves["weights"][0]


def inverted() -> ConceptPairs:
    source = torch.randint(0, 256, (4, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pairs = Pairs(ids=tuple("abcd"), source=source, target=255 - source)
    return ConceptPairs(concept="x", text=noise(3, 5), pairs=pairs)


def test_the_update_is_not_rounded_in_bf16() -> None:
    """A weight plus a small update is formed in fp32, so under autocast as well the output is the merged weights'."""
    adapter = trained(mixed_ranks(), scale=0.01)
    attached, merged = tiny(), tiny()
    attach(attached, adapter)
    merged.load_state_dict(merge(tiny(), adapter), strict=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(edit(attached), edit(merged))


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


@pytest.mark.parametrize("space", SPACES)
def test_transposed_layer_by_brute_force(space: Any) -> None:
    generator, adapter = tiny(), trained({"up1": 3}, scale=0.7)
    base, bias = generator.up1.weight.clone(), noise(8)
    with torch.no_grad():
        generator.up1.bias.copy_(bias)  # type: ignore[union-attr]
    attach(generator, adapter, space=space)
    x = noise(16, 3, 4)
    low = scatter(x, adapter.tensors["up1.lora_A"], 2, 1, 1)
    wide = torch.einsum("or,rhw->ohw", adapter.tensors["up1.lora_B"][:, :, 0, 0], low)
    expected = scatter(x, base, 2, 1, 1) + bias[:, None, None] + 0.7 * wide
    assert expected.shape == (8, 6, 8)
    with torch.no_grad():
        torch.testing.assert_close(generator.up1(x[None])[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("space", SPACES)
def test_extract_returns_what_was_attached(space: Any) -> None:
    for scale in (1.0, 0.1, 0.3):  # 0.1 * 3 / 3 is not 0.1
        generator, adapter = tiny(), trained(mixed_ranks(), scale=scale)
        attach(generator, adapter, space=space)
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
    bare = build_generator(GeneratorConfig(channels=4, transformer_blocks=0), seed=0)
    with pytest.raises(ValueError, match="is not a crucial layer of this generator"):
        use(bare, trained(mixed_ranks()))


@pytest.mark.parametrize("space", SPACES)
def test_only_the_adapter_trains(space: Any) -> None:
    generator, adapter = tiny(), new_adapter(tiny(), mixed_ranks(), seed=0)
    attach(generator, adapter, space=space)
    trainable = {in_both(name) for name, p in generator.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.lora_{side}" for name in LAYERS for side in "AB"}
    config = TrainConfig(epochs=4, batch_size=4, learning_rate=1e-2, discriminator_channels=2, precision="fp32")
    train(generator, [inverted()], config, seed=0)
    learnt = extract(generator)
    for name in LAYERS:
        for side in "AB":
            key = f"{name}.lora_{side}"
            assert not torch.equal(learnt.tensors[key], adapter.tensors[key]), f"{key} did not train"
    untouched, kept = tiny().state_dict(), 0
    for name, weight in generator.state_dict().items():
        plain = name.replace(".base_layer", "").replace(".parametrizations.weight.original", ".weight")
        if plain in untouched:
            assert torch.equal(weight, untouched[plain]), f"{name} moved"
            kept += 1
    assert kept == len(untouched)


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
        rows = a.movedim(1, 0) if name in ("up1", "up2", "transformer.0.up") else a
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
