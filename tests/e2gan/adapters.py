"""A tiny generator and adapters for it."""

import torch
from torch import Tensor, nn

from e2gan.config import GeneratorConfig
from e2gan.lora import Adapter, crucial_layers, new_adapter
from e2gan.model import Generator, build_generator
from e2gan.ranks import Ranks

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
