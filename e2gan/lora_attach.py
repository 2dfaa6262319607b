"""An adapter on its generator for training.

In weight space a layer's weight is W + B A, formed once a step; peft's branches compute B A x beside W x. It is the
same update, and the former trains faster (bench/train.py).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from e2gan.lora import Adapter, Kind, check_fit, crucial_layers, kind, product
from e2gan.model import Generator
from e2gan.ranks import Ranks


def attach(generator: Generator, adapter: Adapter, *, space: Literal["weights", "branches"] = "weights") -> None:
    """Put the adapter on the generator as trainable parameters, in place, and freeze everything else.

    space: `weights` forms W + scale B A once a forward pass; `branches` are peft's layers beside the base's.

    Raises:
        ValueError: the adapter is not one for a generator of this shape.
    """
    layers = crucial_layers(generator)
    check_fit(adapter, layers)
    if space == "branches":
        _attach_branches(generator, adapter)
        return
    generator.requires_grad_(False)
    for name in adapter.ranks:
        a, b = (adapter.tensors[f"{name}.lora_{side}"] for side in "AB")
        low_rank = LowRank(kind(layers[name]), a, b, adapter.scale).to(next(layers[name].parameters()).device)
        parametrize.register_parametrization(layers[name], "weight", low_rank, unsafe=True)


def extract(generator: Generator) -> Adapter:
    """The adapter that `attach` put on the generator, as it is now (a copy, on the CPU)."""
    found = {
        name.removesuffix(".parametrizations.weight.0"): module
        for name, module in generator.named_modules()
        if isinstance(module, LowRank)
    }
    if not found:
        return _extract_branches(generator)
    tensors = {}
    for name, update_of in found.items():
        tensors[f"{name}.lora_A"] = update_of.a.detach().cpu().clone().contiguous()
        tensors[f"{name}.lora_B"] = update_of.b.detach().cpu().clone().contiguous()
    scales = {update_of.scale for update_of in found.values()}
    assert len(scales) == 1, "attach gives every layer the adapter's one scale"
    ranks = {name: update_of.b.shape[1] for name, update_of in found.items()}
    return Adapter(ranks=ranks, scale=scales.pop(), tensors=tensors)


class LowRank(nn.Module):
    """A parametrization of a layer's weight: the frozen weight plus scale times B A."""

    def __init__(self, kind: Kind, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.kind, self.scale = kind, scale
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, weight: Tensor) -> Tensor:
        # In fp32: bf16 would round the update before it is added.
        with torch.autocast(weight.device.type, enabled=False):
            return weight + self.scale * product(self.kind, self.a, self.b)


def peft_config(adapter: Adapter) -> Any:
    """peft's configuration of the adapter."""
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


def _attach_branches(generator: Generator, adapter: Adapter) -> None:
    from peft import inject_adapter_in_model

    inject_adapter_in_model(peft_config(adapter), generator)
    with torch.no_grad():
        for name in adapter.ranks:
            layer: Any = generator.get_submodule(name)
            # Without this peft casts a bf16 input to fp32 for the branch, which autocast then casts back.
            layer.cast_input_dtype_enabled = False
            layer.scaling["default"] = adapter.scale  # peft's alpha over rank rounds
            layer.lora_A["default"].weight.copy_(adapter.tensors[f"{name}.lora_A"])
            layer.lora_B["default"].weight.copy_(adapter.tensors[f"{name}.lora_B"])


def _extract_branches(generator: Generator) -> Adapter:
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
