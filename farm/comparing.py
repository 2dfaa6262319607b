"""Two published versions, or two concepts, beside each other in one picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
from PIL import ImageDraw, ImageFont

from farm.artifacts import find
from farm.editing import Photo, PhotoEditor, open_photo
from farm.errors import UserError
from farm.plan import Plan
from farm.registry import Registry, Release
from farm.serve.published import UnknownConceptError

SHOWN = 6
"""Test photos where none is given."""
SMALLEST = 128
"""Pictures narrower than this are enlarged by a whole factor."""
GAP, LETTERS = 4, 16
"""Pixels between pictures, and of a label's letters."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two: a concept in a published version."""

    concept: str
    release: Release

    @property
    def label(self) -> str:
        return f"{self.concept}@{self.release.version}"

    @property
    def metrics(self) -> dict[str, Any]:
        return self.release.metrics


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison:
    """The picture: a labelled column of photos, and one of each side's edits."""

    picture: PIL.Image.Image
    sides: tuple[Side, Side]

    def __repr__(self) -> str:
        return " and ".join(side.label for side in self.sides)

    def _repr_png_(self) -> bytes:
        """For notebooks."""
        from farm.editing import as_bytes

        return as_bytes(self.picture)


def find_side(editor: PhotoEditor, text: str) -> Side:
    """What `night` (the current version) or `night@3` means.

    Raises:
        UserError: there is no such concept, or it was never published, or not as that version.
    """
    concept, _, number = text.partition("@")
    editor.config.concept(concept)
    record = Registry(editor.store, editor.keys).record(concept)
    if number and not re.fullmatch("[1-9][0-9]*", number):
        raise UserError(f"{text}: a version is a number, as in {concept}@1; `farm history {concept}` lists them.")
    if record is None or not (number or record.published):
        raise UserError(f"{concept} is not published; `farm show {concept}` says why, and `farm history` what was.")
    if not number:
        return Side(concept=concept, release=record.releases[-1])
    for release in record.releases:
        if release.version == int(number) and release.action != "unpublished":
            return Side(concept=concept, release=release)
    raise UnknownConceptError(concept, version=int(number))


def compare(
    editor: PhotoEditor, plan: Plan | None, one: str, other: str, *, photo: Photo | None = None, side: int | None = None
) -> Comparison:
    """Edit the same photos with both: the one given, else some that nothing was trained on.

    plan: of the farm; not needed with a photo. side: longest side that the network works at.

    Raises:
        UserError: see `find_side`; or no photo is given and the farm's are not in the store.
    """
    sides = find_side(editor, one), find_side(editor, other)
    photos = [open_photo(photo)] if photo is not None else _test_photos(editor, plan)
    columns: list[tuple[str, list[PIL.Image.Image]]] = [(label, []) for label in ("photo", *(s.label for s in sides))]
    for picture in photos:
        edits = [editor.edit(picture, one.concept, version=one.release.version, side=side).image for one in sides]
        shown = [picture.resize(edits[0].size, PIL.Image.Resampling.LANCZOS), *edits]
        for (_, column), image in zip(columns, shown, strict=True):
            column.append(image)
    return Comparison(picture=labelled(columns), sides=sides)


def _test_photos(editor: PhotoEditor, plan: Plan | None) -> list[PIL.Image.Image]:
    from farm.stages.ingest import source_images
    from farm.stages.select import selected_ids

    assert plan is not None
    if find(editor.store, plan.selection.path) is None or find(editor.store, plan.sources.path) is None:
        raise UserError(f"the photos of {plan.config.name} are not in {editor.store.url}; give one with --photo.")
    ids = selected_ids(editor.store, plan)["test"]
    chosen = [ids[place] for place in np.linspace(0, len(ids) - 1, min(SHOWN, len(ids))).round().astype(int)]
    images = source_images(editor.store, plan.sources.path)
    return [PIL.Image.fromarray(images[image_id]) for image_id in chosen]


def labelled(columns: Sequence[tuple[str, Sequence[PIL.Image.Image]]]) -> PIL.Image.Image:
    """Columns of pictures of one size, each below its label, on white."""
    width, height = columns[0][1][0].size
    factor = max(1, -(-SMALLEST // width))
    width, height = width * factor, height * factor
    font, top = ImageFont.load_default(LETTERS), LETTERS + 2 * GAP
    rows = len(columns[0][1])
    size = len(columns) * (width + GAP) - GAP, top + rows * (height + GAP) - GAP
    sheet = PIL.Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for c, (label, pictures) in enumerate(columns):
        left = c * (width + GAP)
        while label and draw.textlength(label, font) > width:
            label = label[:-2].rstrip("…") + "…" if len(label) > 2 else ""
        draw.text((left, GAP), label, "black", font)
        for r, picture in enumerate(pictures):
            large = picture.resize((width, height), PIL.Image.Resampling.BICUBIC)
            sheet.paste(large, (left, top + r * (height + GAP)))
    return sheet
