"""What fits into so many bytes: fewer bits for the base, then lower ranks, then several packs.

Sizes are counted from shapes, before anything is converted; they are a little above what comes out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from e2gan.export.coreml import Precision
from e2gan.export.phone import concept_parameters, random_concept
from e2gan.lora import crucial_layers
from e2gan.model import Generator
from e2gan.ranks import Ranks

PROGRAM = 37_000
"""Bytes of one function's operations, whatever the width: 34 kB, and 36 kB where weights are decompressed."""
ALIGNED = 128
"""Bytes that a constant takes at most beside its content."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How much is kept of a pack's numbers. cap: the highest rank of any layer, None leaves the ranks as they are."""

    precision: Precision = "fp16"
    cap: int | None = None

    def ranks(self, ranks: Ranks) -> Ranks:
        return {name: rank if self.cap is None else min(rank, self.cap) for name, rank in ranks.items()}


LADDER = (Shape(), Shape(precision="8bit"), Shape(precision="6bit"), Shape(precision="6bit", cap=4))
"""What is tried in turn until everything fits into one pack. Ranks are not cut further: several packs lose less."""
ONNX_LADDER = (Shape(), Shape(precision="int8"), Shape(precision="int8", cap=4))
"""The same for ONNX models, whose weights have eight bits at the least."""
_BITS = {"fp16": 16, "int8": 8, "8bit": 8, "6bit": 6, "4bit": 4}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of a pack's parts: the base, and what every concept adds."""

    base: int
    concept: int

    def total(self, concepts: int) -> int:
        return self.base + concepts * self.concept


def sizes(base: Generator, ranks: Ranks, shape: Shape) -> Sizes:
    """Of a pack of adapters with these ranks."""
    concept = random_concept(base, shape.ranks(ranks), seed=0)
    folded = tuple(
        f"{name}." for name in crucial_layers(base) if name.endswith(("cross_attention.k", "cross_attention.v"))
    )
    total = 0
    for name, parameter in base.named_parameters():
        if not name.startswith(folded):
            bits = _BITS[shape.precision] if parameter.numel() >= 2048 and parameter.dim() > 1 else 16
            total += math.ceil(parameter.numel() * bits / 8) + ALIGNED
            if bits < 16:  # a scale a channel, or the values themselves
                total += 2 * (max(parameter.shape[:2]) if shape.precision == "int8" else 2**bits) + ALIGNED
    numbers = 2 * concept_parameters(concept) + ALIGNED * len(concept)
    return Sizes(base=total, concept=numbers + PROGRAM)


def fit(
    base: Generator,
    ranks: Ranks,
    *,
    concepts: int,
    budget: int,
    shape: Shape | None = None,
    ladder: tuple[Shape, ...] = LADDER,
) -> tuple[Shape, int]:
    """How to make packs of at most `budget` bytes of that many concepts: their shape, and concepts a pack.

    Where the whole ladder is too large, several packs are of its second step, or of one below that a concept fits with.

    shape: where it is decided already, so that only the number is left.

    Raises:
        ValueError: not even one concept fits; the sentence says how much it takes.
    """
    whole, split = (ladder, ladder[1:]) if shape is None else ((shape,), (shape,))
    for tried in whole:
        if sizes(base, ranks, tried).total(concepts) <= budget:
            return tried, concepts
    for tried in split:
        counted = sizes(base, ranks, tried)
        if (many := (budget - counted.base) // counted.concept) >= 1:
            return tried, many
    least = sizes(base, ranks, split[-1]).total(1)
    raise ValueError(f"a pack of one concept takes {least / 1e6:.1f} MB at the least, not {budget / 1e6:g}")
