from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from e2gan.config import GeneratorConfig, pix2pix_nine_blocks
from e2gan.model import Discriminator, Generator, build_discriminator, build_generator, part_of

TINY = GeneratorConfig(channels=4, heads=2, text_tokens=3, text_width=5)
BARE = GeneratorConfig(channels=4, transformer_blocks=0)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def photos(n: int, height: int, width: int, seed: int = 0) -> Tensor:
    return noise(n, 3, height, width, seed=seed).clamp(-1, 1)


def parameters_by_hand(
    c: int, blocks: int, transformers: int, *, conv: bool = True, cross: bool = True, text_width: int = 768
) -> int:
    """Every layer's weights and biases, counted from the table of docs/method.md."""
    b = 4 * c
    count = (3 * 49 * c + c) + (c * 9 * 2 * c + 2 * c) + (2 * c * 9 * b + b)  # stem, down 1, down 2
    count += blocks * 2 * (b * 9 * b + b)
    count += (b * 9 * 2 * c + 2 * c) + (2 * c * 9 * c + c) + (c * 49 * 3 + 3)  # up 1, up 2, head
    for _ in range(transformers):
        if conv:
            count += 2 * (b * 9 * b + b)  # down, up
        count += 2 * 2 * b  # layer norms of self-attention and feed-forward
        count += 3 * b * b + (b * b + b)  # self-attention
        if cross:
            count += 2 * b + b * b + 2 * text_width * b + (b * b + b)  # cross-attention and its norm
        count += (b * 8 * b + 8 * b) + (4 * b * b + b)  # GEGLU feed-forward
    return count


def multiply_adds(config: GeneratorConfig, side: int) -> float:
    """PyTorch's counter for convolutions and linear layers, the attention products by hand."""
    with torch.device("meta"):
        generator = Generator(config)
        images, text = torch.empty(1, 3, side, side), torch.empty(1, config.text_tokens, config.text_width)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        generator(images, text)
    counts = counter.get_flop_counts()["Global"]
    # Attention is counted on some devices as bmm or as itself and on others not at all.
    layers = sum(n for op, n in counts.items() if "bmm" not in str(op) and "attention" not in str(op))
    queries, width = (side // 8) ** 2, 4 * config.channels
    keys = queries + (config.text_tokens if config.cross_attention else 0)
    return layers / 2 + config.transformer_blocks * 2 * queries * keys * width  # q.k and attention.v


@pytest.mark.parametrize(
    ("config", "parameters", "gmacs"),
    [
        (GeneratorConfig(), 7_055e3, 23.6),
        (GeneratorConfig(transformer_blocks=2), 9_812e3, 26.6),
        (pix2pix_nine_blocks(), 11.38e6, 49.6),
    ],
)
def test_size_and_cost_are_the_papers(config: GeneratorConfig, parameters: float, gmacs: float) -> None:
    assert size(config) == pytest.approx(parameters, rel=0.005)
    assert multiply_adds(config, 256) / 1e9 == pytest.approx(gmacs, rel=0.005)


@pytest.mark.parametrize(("sampling", "millions"), [("conv", 7.1), ("pool", 5.9)])
def test_sampling_without_weights_has_the_size_of_table_10(sampling: Any, millions: float) -> None:
    assert round(size(GeneratorConfig(transformer_sampling=sampling)) / 1e6, 1) == millions


def size(config: GeneratorConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Generator(config).parameters())


@pytest.mark.parametrize("channels", [64, 32, 2])
@pytest.mark.parametrize("blocks", [3, 9, 2])
@pytest.mark.parametrize("transformers", [0, 1, 2])
@pytest.mark.parametrize("sampling", ["conv", "pool"])
@pytest.mark.parametrize("cross", [True, False])
def test_parameter_count_by_hand(channels: int, blocks: int, transformers: int, sampling: Any, cross: bool) -> None:
    config = GeneratorConfig(
        channels=channels,
        residual_blocks=blocks,
        transformer_blocks=transformers,
        transformer_sampling=sampling,
        cross_attention=cross,
    )
    assert size(config) == parameters_by_hand(channels, blocks, transformers, conv=sampling == "conv", cross=cross)


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        BARE,
        replace(TINY, transformer_blocks=2, transformer_position=0),
        replace(TINY, transformer_sampling="pool", cross_attention=False),
    ],
)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (24, 40), (64, 16)])
def test_output_has_the_inputs_size_and_range(config: GeneratorConfig, height: int, width: int) -> None:
    generator = build_generator(config, seed=0)
    with torch.no_grad():
        generator.head.weight.mul_(1000)
        edited = generator(photos(2, height, width), noise(2, 3, 5))
    assert edited.shape == (2, 3, height, width)
    assert edited.abs().max() <= 1
    assert edited.abs().max() > 0.99  # the range is used, not shrunk


def note_order(generator: Generator, names: Iterable[str]) -> tuple[list[str], dict[str, torch.Size]]:
    """Names in order of execution and shapes of outputs, of one run over a 64x32 photo."""
    order: list[str] = []
    shapes: dict[str, torch.Size] = {}

    def note(name: str) -> None:
        def hook(_module: nn.Module, _inputs: object, out: Tensor) -> None:
            order.append(name)
            shapes[name] = out.shape

        generator.get_submodule(name).register_forward_hook(hook)

    for name in names:
        note(name)
    with torch.no_grad():
        generator(photos(1, 64, 32), noise(1, 3, 5))
    return order, shapes


@pytest.mark.parametrize("sampling", ["conv", "pool"])
def test_transformers_work_at_an_eighth_of_the_side(sampling: Any) -> None:
    generator = build_generator(replace(TINY, transformer_sampling=sampling), seed=0)
    names = ["residual.1", "transformer.0", "transformer.0.down", "transformer.0.up"]
    _, shapes = note_order(generator, names)
    assert shapes["transformer.0.down"] == (1, 16, 8, 4)
    assert shapes["transformer.0.up"] == shapes["transformer.0"] == shapes["residual.1"] == (1, 16, 16, 8)


@pytest.mark.parametrize("position", [0, 1, 2, 3])
@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_transformers_come_after_as_many_residual_blocks_as_asked_for(blocks: int, position: int) -> None:
    config = replace(TINY, transformer_blocks=blocks, transformer_position=position)
    residual, transformer = [f"residual.{i}" for i in range(3)], [f"transformer.{i}" for i in range(blocks)]
    order, _ = note_order(build_generator(config, seed=0), ["down2", *transformer, *residual, "up1"])
    assert order == ["down2", *residual[:position], *transformer, *residual[position:], "up1"]


def test_pooling_is_a_mean_of_four_pixels_and_their_repetition() -> None:
    generator = build_generator(replace(TINY, transformer_sampling="pool"), seed=0)
    block, x = generator.transformer[0], noise(1, 2, 4, 6)
    pooled = sum(x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
    torch.testing.assert_close(block.down(x), pooled)
    assert torch.equal(block.up(x), x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


def test_without_cross_attention_the_text_is_ignored() -> None:
    generator = build_generator(replace(TINY, cross_attention=False), seed=0)
    assert not [name for name, _ in generator.named_parameters() if "cross" in name or "norm2" in name]
    with torch.no_grad():
        images = photos(2, 16, 16)
        assert torch.equal(generator(images, noise(1, 3, 5)), generator(images))
        assert torch.equal(generator(images, noise(1, 9, 1)), generator(images))


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_every_weight_belongs_to_one_part(blocks: int) -> None:
    generator = build_generator(replace(TINY, transformer_blocks=blocks), seed=0)
    counts: Counter[str] = Counter()
    for name, parameter in generator.named_parameters():
        counts[part_of(name)] += parameter.numel()
    ends = (generator.stem, generator.down1, generator.down2, generator.up1, generator.up2, generator.head)
    assert counts["sampling"] == sum(p.numel() for layer in ends for p in layer.parameters())
    assert counts["residual"] == sum(p.numel() for p in generator.residual.parameters())
    assert counts["transformer"] == sum(p.numel() for p in generator.transformer.parameters())


def test_the_parts_of_some_names() -> None:
    names = {
        "stem.weight": "sampling",
        "up1.parametrizations.weight.0.a": "sampling",
        "up1.lora_A.default.weight": "sampling",
        "transformer.1.down.weight": "transformer",
        "transformer.0.self_attention.q": "transformer",
        "residual.2.conv1.bias": "residual",
    }
    assert {name: part_of(name) for name in names} == names


def test_text_matters_only_with_transformer() -> None:
    images = photos(1, 16, 16)
    with torch.no_grad():
        generator = build_generator(TINY, seed=0)
        assert not torch.allclose(
            generator(images, noise(1, 3, 5)), generator(images, noise(1, 3, 5, seed=1)), atol=1e-6
        )
        bare = build_generator(BARE, seed=0)
        assert torch.equal(bare(images, noise(1, 3, 5)), bare(images))
        with pytest.raises(AssertionError, match="needs the prompt's embedding"):
            generator(images)


def test_one_prompt_serves_a_batch() -> None:
    generator = build_generator(TINY, seed=0)
    images, text = photos(3, 16, 16), noise(1, 3, 5)
    with torch.no_grad():
        torch.testing.assert_close(generator(images, text), generator(images, text.repeat(3, 1, 1)))
        alone = torch.cat([generator(image[None], text) for image in images])
    torch.testing.assert_close(generator(images, text), alone)  # instance norm: no image sees its neighbours


def test_attention_by_its_formula() -> None:
    """softmax(q k / sqrt(d)) v, head by head, against the block's own."""
    attention = build_generator(TINY, seed=0).transformer[0].cross_attention
    x, context = noise(2, 7, 16), noise(2, 3, 5, seed=1)
    q, k, v = attention.q(x), attention.k(context), attention.v(context)
    heads = []
    for h in (slice(0, 8), slice(8, 16)):
        weights = torch.softmax(q[..., h] @ k[..., h].transpose(1, 2) / 8**0.5, dim=-1)
        heads.append(weights @ v[..., h])
    torch.testing.assert_close(attention(x, context), attention.out(torch.cat(heads, dim=-1)))


def test_feed_forward_by_its_formula() -> None:
    """(V x) times GELU(W x), projected back: the gate is the second half, as in Stable Diffusion's blocks."""
    layer = build_generator(TINY, seed=0).transformer[0].feed_forward
    x = noise(2, 7, 16)
    value, gate = (
        x @ layer.proj.weight.T[:, :64] + layer.proj.bias[:64],
        x @ layer.proj.weight.T[:, 64:] + layer.proj.bias[64:],
    )
    gelu = gate * 0.5 * (1 + torch.erf(gate / 2**0.5))
    torch.testing.assert_close(layer(x), layer.out(value * gelu))


def test_no_layer_pads_by_itself_but_with_zeros() -> None:
    for module in build_generator(TINY, seed=0).modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            assert module.padding_mode == "zeros"  # peft's branches would not reflect


def test_seed_alone_decides_the_weights() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, judge = build_generator(TINY, seed=5), build_discriminator(4, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = build_generator(TINY, seed=5), build_generator(TINY, seed=6)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    for name in ("residual.0.conv1", "transformer.0.down"):  # narrow as it is, the others are all identity
        assert not torch.equal(first.get_submodule(name).weight, other.get_submodule(name).weight)
    for a, b in zip(judge.parameters(), build_discriminator(4, seed=5).parameters(), strict=True):
        assert torch.equal(a, b)


def test_convolutions_start_as_in_pix2pix() -> None:
    generator = build_generator(GeneratorConfig(channels=16, init="normal"), seed=0)
    for name, module in generator.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert module.weight.mean().item() == pytest.approx(0, abs=2e-3), name
            assert module.bias is not None
            assert not module.bias.any(), name


def correlations(config: GeneratorConfig) -> Tensor:
    """Of the fresh generator's output with the photo, by photo and colour, `[n, 3]`.

    Correlation leaves out what instance norm takes away: each colour's mean and standard deviation.
    """
    images = scenes(4, 64, 48)
    text = noise(1, config.text_tokens, config.text_width)
    with torch.no_grad():
        edited = build_generator(config, seed=0)(images, text)
    a, b = (x.flatten(2) - x.flatten(2).mean(2, keepdim=True) for x in (edited, images))
    return (a * b).sum(2) / (a.norm(dim=2) * b.norm(dim=2))


def scenes(n: int, height: int, width: int) -> Tensor:
    """Blots of several sizes with edges and a little noise, unlike in every colour, `[n, 3, h, w]` in -1..1."""
    size = {"size": (height, width), "mode": "bilinear", "align_corners": False}
    blots = [F.interpolate(noise(n, 3, height // s, width // s, seed=s), **size) for s in (4, 8, 16)]
    edges = F.interpolate(noise(n, 3, height // 8, width // 8, seed=1).sign(), size=(height, width))
    return (0.2 * sum(blots) + 0.2 * edges + 0.05 * noise(n, 3, height, width)).clamp(-1, 1)


@pytest.mark.parametrize("channels", [32, 64])
@pytest.mark.parametrize("transformers", [0, 1, 2])
def test_a_generator_begins_by_passing_the_photo_on(channels: int, transformers: int) -> None:
    """Exposure aside, which the instance norms take away."""
    config = GeneratorConfig(channels=channels, transformer_blocks=transformers)
    assert config.init == "identity"
    assert correlations(config).min() > 0.95
    normal = replace(config, init="normal")
    assert correlations(normal).abs().mean() < 0.7


def test_a_fresh_generator_has_about_a_photos_contrast() -> None:
    images = scenes(4, 64, 48)
    with torch.no_grad():
        edited = build_generator(GeneratorConfig(channels=32), seed=0)(images, noise(1, 77, 768))
    assert 0.2 < edited.std() < 0.8


@pytest.mark.parametrize("channels", [2, 4, 8, 16])
def test_narrow_generators_begin_with_what_fits(channels: int) -> None:
    config = GeneratorConfig(channels=channels)
    with torch.no_grad():
        edited = build_generator(config, seed=0)(photos(1, 32, 32), noise(1, 77, 768))
    assert edited.isfinite().all()


def test_the_baseline_begins_as_in_pix2pix() -> None:
    assert pix2pix_nine_blocks().init == "normal"


@pytest.mark.parametrize(("height", "width"), [(24, 24), (64, 40), (256, 256)])
def test_discriminator_logits(height: int, width: int) -> None:
    judge = build_discriminator(2, seed=0)
    with torch.no_grad():
        logits = judge(photos(2, height, width), photos(2, height, width, seed=1))
    assert logits.shape == (2, 1, height // 8 - 2, width // 8 - 2)


def test_discriminator_sees_70_by_70_pixels_of_both_images() -> None:
    judge = Discriminator(4)
    for i, layer in enumerate(judge.layers):
        if isinstance(layer, nn.InstanceNorm2d):  # its mean and variance reach over the whole image
            judge.layers[i] = nn.Identity()
    source, target = photos(1, 128, 128).requires_grad_(), photos(1, 128, 128, seed=1).requires_grad_()
    judge(source, target)[0, 0, 7, 7].backward()
    for image in (source, target):
        assert image.grad is not None
        seen = image.grad[0].abs().sum(0) > 0
        rows, columns = seen.any(1).nonzero().flatten(), seen.any(0).nonzero().flatten()
        assert rows[-1] - rows[0] + 1 == 70
        assert columns[-1] - columns[0] + 1 == 70
        assert seen[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()


def test_discriminator_has_pix2pixs_size() -> None:
    with torch.device("meta"):
        judge = Discriminator()
    widths = [6, 64, 128, 256, 512, 1]
    assert sum(p.numel() for p in judge.parameters()) == sum(a * b * 16 + b for a, b in pairwise(widths))
