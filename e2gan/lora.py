"""LoRA on the generator's crucial layers (section 4.2.2).

An `Adapter` is the low-rank update as plain tensors: it can be grown, merged into the base's weights, attached for
training (`e2gan.lora_attach`) and saved in peft's own format (`e2gan.lora_peft`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from e2gan.model import Generator
from e2gan.ranks import Ranks, layer_threshold

Kind = Literal["linear", "conv", "transposed"]
"""Of a crucial layer."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A low-rank update of a generator.

    ranks: rank of each layer by its module name.
    scale: factor on every update (peft's alpha over rank).
    tensors: `<layer>.lora_A` and `<layer>.lora_B`, float32, in the layouts peft trains: linear A `[r, in]`,
        B `[out, r]`; convolution A `[r, in, k, k]`, B `[out, r, 1, 1]`; transposed convolution A `[in, r, k, k]`,
        B `[out, r, 1, 1]`.
    """

    ranks: Ranks
    scale: float
    tensors: Mapping[str, Tensor]

    def parameter_count(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())


def crucial_layers(generator: Generator) -> dict[str, nn.Module]:
    """The layers the paper adapts (figure 4), by module name: every one but the residual blocks."""
    return {
        name: module
        for name, module in generator.named_modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) and not name.startswith("residual.")
    }


def searched_ranks(generator: Generator) -> Ranks:
    """The ranks the paper's search found for the full-width generator (section 4.2.2, docs/method.md)."""
    by_layer = {
        "stem": 1,
        "down1": 4,
        "down2": 8,
        "transformer.0.down": 8,
        "transformer.0.up": 8,
        "up1": 8,
        "up2": 4,
        "head": 1,
    }
    return {name: by_layer.get(name, 1) for name in crucial_layers(generator)}


def thresholds(generator: Generator) -> Ranks:
    """The highest rank of every crucial layer, from its size (`e2gan.ranks.layer_threshold`)."""
    limits: Ranks = {}
    for name, layer in crucial_layers(generator).items():
        if isinstance(layer, nn.Linear):
            limits[name] = layer_threshold("linear", layer.in_features, layer.out_features)
        else:
            assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
            limits[name] = layer_threshold("conv", layer.in_channels, layer.out_channels)
    return limits


def lora_sizes(generator: Generator) -> dict[str, int]:
    """LoRA parameters a unit of rank costs, by crucial layer."""
    layers = crucial_layers(generator)
    return {name: sum(math.prod(shape) for shape in _shapes(layer, 1)) for name, layer in layers.items()}


def new_adapter(generator: Generator, ranks: Ranks, *, scale: float = 1.0, seed: int) -> Adapter:
    """An adapter that changes nothing yet: A Kaiming-uniform as in peft, B zero.

    Raises:
        ValueError: a name in `ranks` is not a crucial layer, or a rank is below 1.
    """
    layers = crucial_layers(generator)
    _check_ranks(ranks, layers)
    random = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, rank in ranks.items():
        shape_a, shape_b = _shapes(layers[name], rank)
        tensors[f"{name}.lora_A"] = _kaiming(shape_a, layers[name], random)
        tensors[f"{name}.lora_B"] = torch.zeros(shape_b)
    return Adapter(ranks=dict(ranks), scale=scale, tensors=tensors)


def grow(adapter: Adapter, generator: Generator, ranks: Ranks, *, seed: int) -> Adapter:
    """The same update at higher ranks: new rows of A are random, new columns of B zero.

    So the output does not change, and the next training step moves the new columns.

    Raises:
        ValueError: a rank would shrink, or the layers differ.
    """
    if ranks.keys() != adapter.ranks.keys():
        raise ValueError("an adapter grows on its own layers: the names of the new ranks differ from the old ones")
    shrunk = [name for name in ranks if ranks[name] < adapter.ranks[name]]
    if shrunk:
        raise ValueError(
            f"an adapter's rank cannot shrink: {shrunk[0]} from {adapter.ranks[shrunk[0]]} to {ranks[shrunk[0]]}"
        )
    grown = new_adapter(generator, ranks, scale=adapter.scale, seed=seed)
    layers = crucial_layers(generator)
    for name, rank in adapter.ranks.items():
        rows = grown.tensors[f"{name}.lora_A"]
        if isinstance(layers[name], nn.ConvTranspose2d):  # the rank is A's second axis
            rows[:, :rank] = adapter.tensors[f"{name}.lora_A"]
        else:
            rows[:rank] = adapter.tensors[f"{name}.lora_A"]
        grown.tensors[f"{name}.lora_B"][:, :rank] = adapter.tensors[f"{name}.lora_B"]
    return grown


def adapter_shapes(generator: Generator, ranks: Ranks) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of an adapter of these ranks, by name, without making one.

    Raises:
        ValueError: a name in `ranks` is not a crucial layer, or a rank is below 1 or absurd.
    """
    layers = crucial_layers(generator)
    _check_ranks(ranks, layers)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, rank in ranks.items():
        limit = 4 * max(side for shape in _shapes(layers[name], 1) for side in shape[:2])
        if rank > limit:  # no update needs more than the layer's shorter side
            raise ValueError(f"rank of {name} must be at most {limit}, four times its layer's longer side, not {rank}")
        shapes[f"{name}.lora_A"], shapes[f"{name}.lora_B"] = _shapes(layers[name], rank)
    return shapes


def update(layer: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """B A as a tensor of the layer's weight shape (unscaled)."""
    return product(kind(layer), a, b)


def product(layer: Kind, a: Tensor, b: Tensor) -> Tensor:
    if layer == "linear":
        return b @ a
    if layer == "transposed":
        return torch.einsum("irkl,or->iokl", a, b[:, :, 0, 0])
    return torch.einsum("rikl,or->oikl", a, b[:, :, 0, 0])


def kind(layer: nn.Module) -> Kind:
    if isinstance(layer, nn.Linear):
        return "linear"
    return "transposed" if isinstance(layer, nn.ConvTranspose2d) else "conv"


def merge(generator: Generator, adapter: Adapter) -> dict[str, Tensor]:
    """Weights of the adapted layers with the update added, by `<layer>.weight`, for `load_state_dict(strict=False)`.

    `generator` is a plain base without peft branches; it is not changed.

    Raises:
        ValueError: the adapter is not one for a generator of this shape.
    """
    merged = {}
    layers = crucial_layers(generator)
    check_fit(adapter, layers)
    for name, layer in layers.items():
        if name in adapter.ranks:
            delta = update(layer, adapter.tensors[f"{name}.lora_A"], adapter.tensors[f"{name}.lora_B"])
            weight = layer.weight
            assert isinstance(weight, Tensor)
            merged[f"{name}.weight"] = weight.detach() + adapter.scale * delta.to(weight)
    return merged


def _check_ranks(ranks: Ranks, layers: Mapping[str, nn.Module]) -> None:
    unknown = sorted(set(ranks) - set(layers))
    if unknown:
        raise ValueError(f"{unknown[0][:80]!a} is not a crucial layer of this generator; those are {', '.join(layers)}")
    low = [name for name, rank in ranks.items() if rank < 1]
    if low:
        raise ValueError(f"rank of {low[0]} must be at least 1, not {ranks[low[0]]}")


def check_fit(adapter: Adapter, layers: Mapping[str, nn.Module]) -> None:
    _check_ranks(adapter.ranks, layers)
    for name, rank in adapter.ranks.items():
        shapes = tuple(tuple(adapter.tensors[f"{name}.lora_{side}"].shape) for side in "AB")
        if shapes != _shapes(layers[name], rank):
            raise ValueError(
                f"this adapter does not fit the generator: {name} has A and B of shapes {shapes}, "
                f"the layer takes {_shapes(layers[name], rank)}"
            )


def _shapes(layer: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if isinstance(layer, nn.Linear):
        return (rank, layer.in_features), (layer.out_features, rank)
    assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
    rows, columns = layer.kernel_size
    ends = (rank, layer.in_channels) if isinstance(layer, nn.Conv2d) else (layer.in_channels, rank)
    return (*ends, rows, columns), (layer.out_channels, rank, 1, 1)


def _kaiming(shape: tuple[int, ...], layer: nn.Module, random: torch.Generator) -> Tensor:
    """Kaiming-uniform with a = sqrt(5), peft's default for A: +-1/sqrt(fan in) of the base layer."""
    if isinstance(layer, nn.Linear):
        fan_in = layer.in_features
    else:
        assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
        fan_in = layer.in_channels * shape[2] * shape[3]
    return torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=random)
