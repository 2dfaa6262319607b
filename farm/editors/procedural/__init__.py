"""The teacher that needs no weights: image filters, each with the look of a concept.

It stands in for a diffusion editor in the embedded default. A style changes a photograph strongly and depends
on local content, so that a small network can learn it, and every radius is a fraction of the image's shorter
side, so that a style looks alike at 64 and at 256 pixels. The prompt is not read.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from farm.editors.base import Failed, Prompt
from farm.errors import UserError

if TYPE_CHECKING:
    from e2gan.pairs import Image

VERSION = 1
"""Raised whenever a style's pixels change, so that edits made before are made again."""


class ProceduralSettings(BaseModel):
    """`style`: one of `style_names()`; the concept's id when left out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seeded: ClassVar[bool] = False  # some styles draw noise, but a filter that spoils an image does so with any

    kind: Literal["procedural"] = "procedural"
    style: str | None = None


class ProceduralEditor:
    """An `Editor` that applies one style.

    Raises:
        UserError: there is no such style.
    """

    def __init__(self, settings: ProceduralSettings, concept_id: str) -> None:
        from farm.editors.procedural.styles import STYLES

        self._style = STYLES[_style_name(settings, concept_id)]

    def edit(self, images: Sequence[Image], prompt: Prompt, seeds: Sequence[int]) -> list[Image | Failed]:
        """See `Editor.edit`."""
        from farm.editors.procedural.filters import auto_levels

        edited: list[Image | Failed] = []
        for image, seed in zip(images, seeds, strict=True):
            levelled = auto_levels(image.astype(np.float32) / 255)
            pixels = self._style(levelled, np.random.default_rng(seed))
            edited.append(np.rint(pixels.clip(0, 1) * 255).astype(np.uint8))
        return edited


def style_names() -> list[str]:
    """The names of all styles, sorted."""
    from farm.editors.procedural.styles import STYLES

    return sorted(STYLES)


def fingerprint(settings: ProceduralSettings, concept_id: str) -> dict[str, Any]:
    """The style and the version of this package's filters.

    Raises:
        UserError: there is no such style.
    """
    return {"kind": settings.kind, "style": _style_name(settings, concept_id), "version": VERSION}


def _style_name(settings: ProceduralSettings, concept_id: str) -> str:
    name = concept_id if settings.style is None else settings.style
    names = style_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(names)}."
        raise UserError(f"editor.style: there is no procedural style {name!r}; {hint}")
    return name
