"""LoRA on the generator's crucial layers (section 4.2.2), through peft.

An `Adapter` is the low-rank update as plain tensors: it can be grown, attached for training (peft's branches),
merged into the base's weights without peft, and saved in peft's own format (`adapter_config.json`,
`adapter_model.safetensors`). peft adapts linear layers and convolutions but not transposed convolutions;
`attach` registers the missing layer, and because that registration is not stored in `adapter_config.json`,
published adapters are read through `load`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from e2gan.model import Generator
from e2gan.ranks import Ranks

_PREFIX = "base_model.model."  # peft's name for the adapted model inside its saved keys


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
        "transformer.down": 8,
        "transformer.up": 8,
        "up1": 8,
        "up2": 4,
        "head": 1,
    }
    return {name: by_layer.get(name, 1) for name in crucial_layers(generator)}


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


def attach(generator: Generator, adapter: Adapter) -> None:
    """Put the adapter on the generator as trainable peft branches, in place, and freeze everything else.

    Raises:
        ValueError: the adapter is not one for a generator of this shape.
    """
    from peft import inject_adapter_in_model

    _check_fit(adapter, crucial_layers(generator))
    inject_adapter_in_model(_peft_config(adapter), generator)
    with torch.no_grad():
        for name in adapter.ranks:
            layer: Any = generator.get_submodule(name)
            # Without this peft casts a bf16 input to fp32 for the branch, which autocast then casts back.
            layer.cast_input_dtype_enabled = False
            layer.scaling["default"] = adapter.scale  # peft's alpha over rank rounds
            layer.lora_A["default"].weight.copy_(adapter.tensors[f"{name}.lora_A"])
            layer.lora_B["default"].weight.copy_(adapter.tensors[f"{name}.lora_B"])


def extract(generator: Generator) -> Adapter:
    """The adapter that `attach` put on the generator, as it is now (a copy, on the CPU)."""
    from peft.tuners.lora import LoraLayer

    ranks: Ranks = {}
    scales: set[float] = set()
    tensors: dict[str, Tensor] = {}
    for name, layer in generator.named_modules():
        if isinstance(layer, LoraLayer):
            ranks[name] = layer.r["default"]
            scales.add(layer.scaling["default"])
            for side, branch in (("A", layer.lora_A), ("B", layer.lora_B)):
                weight = branch["default"].weight
                assert isinstance(weight, Tensor)
                tensors[f"{name}.lora_{side}"] = weight.detach().cpu().clone().contiguous()
    assert len(scales) == 1, "attach gives every layer the adapter's one scale"
    return Adapter(ranks=ranks, scale=scales.pop(), tensors=tensors)


def update(layer: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """B A as a tensor of the layer's weight shape (unscaled)."""
    if isinstance(layer, nn.Linear):
        return b @ a
    if isinstance(layer, nn.ConvTranspose2d):
        return torch.einsum("irkl,or->iokl", a, b[:, :, 0, 0])
    return torch.einsum("rikl,or->oikl", a, b[:, :, 0, 0])


def merge(generator: Generator, adapter: Adapter) -> dict[str, Tensor]:
    """Weights of the adapted layers with the update added, by `<layer>.weight`, for `load_state_dict(strict=False)`.

    `generator` is a plain base without peft branches; it is not changed.

    Raises:
        ValueError: the adapter is not one for a generator of this shape.
    """
    merged = {}
    layers = crucial_layers(generator)
    _check_fit(adapter, layers)
    for name, layer in layers.items():
        if name in adapter.ranks:
            delta = update(layer, adapter.tensors[f"{name}.lora_A"], adapter.tensors[f"{name}.lora_B"])
            weight = layer.weight
            assert isinstance(weight, Tensor)
            merged[f"{name}.weight"] = weight.detach() + adapter.scale * delta.to(weight)
    return merged


def save(adapter: Adapter, *, base: str) -> dict[str, bytes]:
    """The adapter in peft's format, tensors in fp16: `{"adapter_config.json": …, "adapter_model.safetensors": …}`.

    base: digest of the base it fits, written as `base_model_name_or_path`.
    """
    import safetensors.torch

    config = _peft_config(adapter).to_dict()
    config["base_model_name_or_path"] = base
    config["target_modules"] = sorted(config["target_modules"])
    keep = {key: value for key, value in config.items() if isinstance(value, _JSON)}
    tensors = {
        f"{_PREFIX}{name}.weight": tensor.half().contiguous() for name, tensor in sorted(adapter.tensors.items())
    }
    return {
        "adapter_config.json": (json.dumps(keep, indent=2, sort_keys=True) + "\n").encode(),
        "adapter_model.safetensors": safetensors.torch.save(tensors, metadata={"format": "pt"}),
    }


def load(files: Mapping[str, bytes], *, base: str) -> Adapter:
    """Read what `save` wrote.

    Raises:
        ValueError: the adapter names another base, or a file is damaged.
    """
    import safetensors
    import safetensors.torch

    try:
        config = json.loads(files["adapter_config.json"])
        state = safetensors.torch.load(files["adapter_model.safetensors"])
        fits = config["base_model_name_or_path"]
        adapter = _from_peft(config, state)
    except (AttributeError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"not an adapter in peft's format: {error!r}") from error
    if fits != base:
        raise ValueError(f"this adapter fits base {fits}, not base {base}: train it again on this base")
    return adapter


_JSON = (str, int, float, bool, list, dict, type(None))


def _check_ranks(ranks: Ranks, layers: Mapping[str, nn.Module]) -> None:
    unknown = sorted(set(ranks) - set(layers))
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not a crucial layer of this generator; those are {', '.join(layers)}")
    low = [name for name, rank in ranks.items() if rank < 1]
    if low:
        raise ValueError(f"rank of {low[0]} must be at least 1, not {ranks[low[0]]}")


def _check_fit(adapter: Adapter, layers: Mapping[str, nn.Module]) -> None:
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


def _peft_config(adapter: Adapter) -> Any:
    from peft import LoraConfig

    from e2gan.lora_transposed import LoraConvTranspose2d

    config = LoraConfig(
        r=1,
        lora_alpha=adapter.scale,  # type: ignore[arg-type]  # peft divides it by r, whole or not
        target_modules=list(adapter.ranks),
        rank_pattern=dict(adapter.ranks),
        alpha_pattern={name: adapter.scale * rank for name, rank in adapter.ranks.items()},
    )
    config._register_custom_module({nn.ConvTranspose2d: LoraConvTranspose2d})
    return config


def _from_peft(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Adapter:
    ranks: Ranks = config["rank_pattern"]
    scale: float = config["lora_alpha"]  # at r = 1
    other = [n for n, rank in ranks.items() if not math.isclose(config["alpha_pattern"][n], scale * rank)]
    if other:
        raise ValueError(f"an adapter has one scale (alpha over rank), {other[0]} has another than {scale}")
    tensors = {
        f"{name}.lora_{side}": state[f"{_PREFIX}{name}.lora_{side}.weight"].float() for name in ranks for side in "AB"
    }
    return Adapter(ranks=dict(ranks), scale=scale, tensors=tensors)
