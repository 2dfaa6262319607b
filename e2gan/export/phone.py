"""The generator as a phone runs it: one concept, one image of a fixed size, 0..255 in and out.

Base and concept stay apart, so that many concepts share one base: an adapted layer computes W x and B A x side by side,
and the prompt is folded into keys and values, with which the text itself and the projections from it drop out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e2gan.fast import share
from e2gan.lora import Adapter, check_fit, crucial_layers, update
from e2gan.model import Attention, Generator, TransformerBlock

Concept = Mapping[str, Tensor]
"""What a concept adds to its base, float32, by name: `<layer>.a` and `<layer>.b`, the scale in b, laid out as in
`e2gan.lora.Adapter`; `<attention>.keys` and `<attention>.values`, `[1, heads, tokens, channels of a head]`."""


def concept_tensors(base: Generator, adapter: Adapter | None, text: Tensor) -> dict[str, Tensor]:
    """An adapter (None: the base itself) and its prompt's embedding `[77, 768]` as a phone has them.

    Raises:
        ValueError: the adapter is not one for a generator of this shape.
    """
    layers = crucial_layers(base)
    if adapter is not None:
        check_fit(adapter, layers)
    ranks = adapter.ranks if adapter else {}
    folded = {f"{name}.{side}" for name in _attentions(base) for side in "kv"}
    tensors = {}
    for name in ranks:
        if name not in folded:
            a, b = _sides(adapter, name)
            tensors[f"{name}.a"], tensors[f"{name}.b"] = a.clone(), b
    for name, attention in _attentions(base).items():
        for side, kind in (("k", "keys"), ("v", "values")):
            layer = cast("nn.Linear", getattr(attention, side))
            weight = layer.weight.detach().float()
            if f"{name}.{side}" in ranks:
                weight = weight + update(layer, *_sides(adapter, f"{name}.{side}"))
            projected = (text.float() @ weight.T).view(1, len(text), attention.heads, -1)
            tensors[f"{name}.{kind}"] = projected.transpose(1, 2).contiguous()
    return tensors


def random_concept(base: Generator, ranks: Mapping[str, int], *, seed: int) -> dict[str, Tensor]:
    """Tensors of the shapes that an adapter of these ranks has, no two of them alike.

    Raises:
        ValueError: a name in `ranks` is not a crucial layer.
    """
    from e2gan.lora import new_adapter

    random = torch.Generator().manual_seed(seed)
    adapter = new_adapter(base, dict(ranks), seed=seed)
    text = torch.zeros(base.config.text_tokens, base.config.text_width)
    shapes = {name: tensor.shape for name, tensor in concept_tensors(base, adapter, text).items()}
    return {name: torch.randn(shape, generator=random) * 0.1 for name, shape in shapes.items()}


class PhoneGenerator(nn.Module):
    """forward(image): `[1, 3, h, w]` in 0..255 to the same in whole numbers, h and w multiples of 8 and at least 16.

    base: a plain generator; it is not changed and its weights are shared, unless they are merged already.
    """

    def __init__(self, base: Generator, concept: Concept) -> None:
        super().__init__()
        self.generator = share(base).eval()
        for name in _attentions(base):
            attention = cast("Attention", self.generator.get_submodule(name))
            folded = FoldedAttention(attention, concept[f"{name}.keys"], concept[f"{name}.values"])
            self.generator.set_submodule(name, folded)
        for name in sorted(key.removesuffix(".a") for key in concept if key.endswith(".a")):
            layer = cast("nn.Conv2d | nn.ConvTranspose2d | nn.Linear", self.generator.get_submodule(name))
            self.generator.set_submodule(name, Branched(layer, concept[f"{name}.a"], concept[f"{name}.b"]))

    def forward(self, image: Tensor) -> Tensor:
        # Scaled and shifted here and not by the package's preprocessing, so that no caller can leave it out.
        unit = image * (1 / 127.5) - 1.0
        nothing = unit.new_zeros(1, 1, 1)  # where the prompt was
        return torch.round((self.generator(unit, nothing) + 1.0) * 127.5)


class Branched(nn.Module):
    """A layer and a concept's low-rank update beside it."""

    def __init__(self, layer: nn.Conv2d | nn.ConvTranspose2d | nn.Linear, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.a, self.b = nn.Parameter(a, requires_grad=False), nn.Parameter(b, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return cast("Tensor", layer(x) + F.linear(F.linear(x, self.a), self.b))
        if isinstance(layer, nn.ConvTranspose2d):
            padding, more = cast("tuple[int, int]", layer.padding), cast("tuple[int, int]", layer.output_padding)
            y = F.conv_transpose2d(x, self.a, None, layer.stride, padding, more)
        else:
            y = F.conv2d(x, self.a, None, layer.stride, cast("tuple[int, int]", layer.padding))
        return cast("Tensor", layer(x) + F.conv2d(y, self.b))


class FoldedAttention(nn.Module):
    """Attention of `[1, queries, c]` over constant keys and values."""

    def __init__(self, attention: Attention, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.q, self.out, self.heads = attention.q, attention.out, attention.heads
        self.keys, self.values = nn.Parameter(keys, requires_grad=False), nn.Parameter(values, requires_grad=False)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, self.keys, self.values)
        return cast("Tensor", self.out(y.transpose(1, 2).flatten(2)))


def concept_parameters(concept: Concept) -> int:
    """Numbers that a concept adds to its base."""
    return sum(math.prod(tensor.shape) for tensor in concept.values())


def _attentions(generator: Generator) -> dict[str, Attention]:
    """The attentions to the prompt, by module name."""
    return {
        f"{name}.cross_attention": module.cross_attention
        for name, module in generator.named_modules()
        if isinstance(module, TransformerBlock) and module.attends_to_text
    }


def _sides(adapter: Adapter | None, name: str) -> tuple[Tensor, Tensor]:
    """A, and B times the scale."""
    assert adapter is not None
    return adapter.tensors[f"{name}.lora_A"], adapter.tensors[f"{name}.lora_B"] * adapter.scale
