import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import e2gan.fast
from e2gan.config import GeneratorConfig
from e2gan.fast import PlainAttention, RowConvolution, WinogradBlock, fast_generator
from e2gan.model import Attention, ResidualBlock, build_generator

TINY = GeneratorConfig(channels=4, heads=2, text_tokens=3, text_width=5)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 10), (6, 4)])
@torch.no_grad()
def test_winograd_is_the_residual_block(height: int, width: int) -> None:
    block = ResidualBlock(6).double()
    x = noise(2, 6, height, width).contiguous(memory_format=torch.channels_last)
    same(WinogradBlock(block)(x), block(x))


@pytest.mark.parametrize("k", [1, 3, 7])
@torch.no_grad()
def test_rows_are_the_convolution(k: int) -> None:
    layer = torch.nn.Conv2d(5, 3, k).double()
    x = noise(2, 5, 9, 11)
    same(RowConvolution(layer)(x), F.conv2d(x, layer.weight, layer.bias))


@pytest.mark.parametrize("stored", [0, 10**9])
@torch.no_grad()
def test_plain_attention_is_the_attention(stored: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(e2gan.fast, "_STORED_SCORES", stored)
    attention = Attention(8, 6, 2).double()
    x, context = noise(3, 10, 8), noise(3, 7, 6, seed=1)
    same(PlainAttention(attention)(x, context), attention(x, context))


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        GeneratorConfig(channels=4, residual_blocks=1, transformer_blocks=0),
        GeneratorConfig(channels=4, heads=2, transformer_blocks=2, cross_attention=False, transformer_sampling="pool"),
    ],
    ids=["default", "bare", "two pooled without text"],
)
@torch.no_grad()
def test_the_fast_generator_is_the_generator(config: GeneratorConfig) -> None:
    generator = build_generator(config, seed=0).double()
    generator.head.weight *= 20
    fast = fast_generator(generator)
    x, text = noise(2, 3, 16, 40), noise(2, config.text_tokens, config.text_width, seed=1)
    expected = generator(x, text)
    same(fast(x, text), expected)
    assert expected.std() > 0.3


def test_the_generator_is_not_changed_and_its_crucial_layers_are_shared() -> None:
    generator = build_generator(TINY, seed=0)
    names = generator.state_dict().keys()
    fast = fast_generator(generator)
    assert generator.state_dict().keys() == names
    assert all(p.requires_grad for p in generator.parameters())
    for name, tensor in generator.state_dict().items():
        if not name.startswith("residual."):
            assert fast.get_parameter(name).data_ptr() == tensor.data_ptr(), name
