"""Whether an exported concept edits as the server does, measured on photos; the package is judged, not the exporter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from e2gan.infer import adapted_generator
from e2gan.lora import Adapter
from e2gan.model import Generator
from e2gan.pairs import to_bytes, to_unit

LIMITS = {"fp16": 40.0, "8bit": 40.0, "6bit": 34.0, "int8": 32.0, "4bit": 20.0}
"""Decibels that a concept's worst photo must reach, by the precision of the base; docs/phones.md has what they do."""
IDENTICAL = 100.0
"""What pictures without any difference are said to have, whose PSNR has no number."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Pictures held against the server's.

    psnr: dB of each. worst: number of the one that is furthest off. largest: difference of any channel, 0..255.
    """

    psnr: tuple[float, ...]
    largest: int

    @property
    def lowest(self) -> float:
        return min(self.psnr)

    @property
    def worst(self) -> int:
        return self.psnr.index(self.lowest)

    def document(self) -> dict[str, Any]:
        """For `certificate.json`."""
        mean = sum(self.psnr) / len(self.psnr)
        rounded = {"psnr_mean": round(mean, 2), "psnr_worst": round(self.lowest, 2), "worst_photo": self.worst}
        return {**rounded, "largest_difference": self.largest}


def parity(expected: Tensor, found: Tensor) -> Parity:
    """Compare uint8 pictures `[n, 3, h, w]`. ValueError when their shapes differ."""
    if expected.shape != found.shape:
        raise ValueError(f"pictures of shape {tuple(found.shape)} were to be of shape {tuple(expected.shape)}")
    differences = (expected.float() - found.float()).flatten(1)
    squares = differences.square().mean(1).double()
    psnr = tuple(min(IDENTICAL, float(10 * torch.log10(255**2 / s))) if s else IDENTICAL for s in squares)
    return Parity(psnr=psnr, largest=int(differences.abs().max()))


@torch.inference_mode()
def server_edits(base: Generator, adapter: Adapter | None, text: Tensor, photos: Tensor) -> Tensor:
    """What the server makes of uint8 photos `[n, 3, h, w]`, in float32 whatever the processor: one truth for all.

    Raises:
        ValueError: the adapter is not one for a generator of this shape.
    """
    generator = adapted_generator(base.config, base.state_dict(), adapter) if adapter else base
    return torch.cat([to_bytes(generator(to_unit(photo[None]), text[None])) for photo in photos])


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A concept in a package. pictures: photo, server's and phone's edit of the worst photo, and how they differ,
    sixteenfold, `[4, 3, h, w]`. reason: why it fails, None where it passes."""

    parity: Parity
    pictures: Tensor
    reason: str | None


def judge(edit: Callable[[Tensor], Tensor], expected: Tensor, photos: Tensor, *, limit: float) -> Judged:
    """Run what was exported, `edit`, on photos and hold it against what the server made of them."""
    found = edit(photos)
    measured = parity(expected, found)
    reason = None
    if not measured.lowest >= limit:
        reason = (
            f"its worst photo differs from the server's edit by {measured.lowest:.1f} dB PSNR, at least {limit:g} are "
            "asked for"
        )
    n = measured.worst
    difference = (expected[n].int() - found[n].int()).abs().mul(16).clamp(0, 255).byte()
    pictures = torch.stack([photos[n], expected[n], found[n], difference])
    return Judged(parity=measured, pictures=pictures, reason=reason)


def certificate(judged: Mapping[str, Judged], *, limit: float, photos: int, computed: str) -> dict[str, Any]:
    """`certificate.json`: every function's figures, and whether all of them pass.

    computed: how the package was run.
    """
    functions = {
        name: {**one.parity.document(), "passed": one.reason is None, "reason": one.reason}
        for name, one in judged.items()
    }
    return {
        "reference": "the server's network in float32, pictures rounded to 8 bits",
        "computed": computed,
        "limit_db": limit,
        "photos": photos,
        "passed": all(one.reason is None for one in judged.values()),
        "functions": functions,
    }


def shown(judged: Mapping[str, Judged]) -> list[Tensor]:
    """Rows of a picture sheet, a column a function: photos, the server's edits, the phone's, their differences x 16."""
    return list(torch.stack([one.pictures for one in judged.values()], dim=1))
