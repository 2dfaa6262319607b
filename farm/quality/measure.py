"""What is measured of every edit at once, beside its worker: small numbers, kept as a Parquet table with the images."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from farm.editors.base import Failed, Prompt
from farm.quality.structure import Array, Structure, likeness, misalignment, thumbnail

if TYPE_CHECKING:
    from e2gan.pairs import Image
    from farm.quality.clip import ClipJudge

CELLS, BLOCKS = 32, 8
"""Sides of the thumbnails that differences and colours are measured on."""

DESCRIPTOR_SIDE = 16
"""Side of the thumbnail that duplicates are found by."""

MIN_PANEL = 8
"""Fewer other photos than this do not tell how alike an edit is to any photo."""

SAME_PHOTO = 0.6
"""A photo of the panel that has this much of the source's structure is that photo, or another of the same moment."""


DECIMALS = 6
"""Kept of a measure: what follows depends on the order in which a machine's threads add up."""


@dataclass(frozen=True, kw_only=True)
class Measures:
    """One edit in numbers. An edit that `failed` has 0, None and empty bytes for them.

    failed: why there is no edit, or None.
    distance: mean absolute difference from its source, of 32x32 thumbnails, 0..1.
    change: the same of the most changed twentieth of 8x8 thumbnails, 0..1: what grain and JPEG do not move, and a small
        local edit does.
    monochrome: share of the 32x32 thumbnail that is of one strong hue, 0..1.
    lightness, red_green, yellow_blue: its mean colour: 0..1 (white); -1 (green) to 1 (red); -1 (blue) to 1 (yellow).
    lightness_spread, red_green_spread, yellow_blue_spread: their standard deviations, 0..0.5, 0..1 and 0..1.
    structure: how much of its source's structure the edit keeps, 0..1 (see `structure.likeness`).
    match: how many standard deviations `structure` lies above what the edit shares with other photos: about 0, seldom
        above 2, for the edit of another photo; None when there are fewer than 8 others.
    misalignment: how much better it fits its source zoomed or moved than in place, -1..1; above 0 it may be a crop.
    text_direction: CLIP's directional similarity to the prompt, -1..1; None without CLIP or prompt.
    identity: cosine of the CLIP embeddings of source and edit, -1..1; None without CLIP.
    descriptor, source_descriptor: 16x16 RGB thumbnails of edit and source, 768 bytes.
    """

    id: str
    failed: str | None = None
    distance: float = 0.0
    change: float = 0.0
    monochrome: float = 0.0
    lightness: float = 0.0
    red_green: float = 0.0
    yellow_blue: float = 0.0
    lightness_spread: float = 0.0
    red_green_spread: float = 0.0
    yellow_blue_spread: float = 0.0
    structure: float = 0.0
    match: float | None = None
    misalignment: float = 0.0
    text_direction: float | None = None
    identity: float | None = None
    descriptor: bytes = b""
    source_descriptor: bytes = b""

    @property
    def spread(self) -> float:
        """How much the edit's colours vary, 0 (one flat colour) to 1.5."""
        return math.hypot(self.lightness_spread, self.red_green_spread, self.yellow_blue_spread)


def measure(
    ids: Sequence[str],
    sources: Sequence[Image],
    edits: Sequence[Image | Failed],
    panel: Sequence[Image],
    clip: ClipJudge | None = None,
    prompt: Prompt | None = None,
) -> list[Measures]:
    """Measure edits of one concept, uint8 `[h, w, 3]` RGB as their sources.

    panel: other photos of the farm, up to 64 spread over it; sources among them are left out where they are compared
    with themselves.
    """
    present = [(index, edit) for index, edit in enumerate(edits) if not isinstance(edit, Failed)]
    pairs = [(sources[index], edit) for index, edit in present]
    structures = _structures(pairs, panel) if pairs else []
    measured = {}
    for (index, edit), (source, _), (kept, match) in zip(present, pairs, structures, strict=True):
        assert source.shape == edit.shape
        numbers: dict[str, Any] = {
            "structure": kept,
            "match": match,
            "misalignment": misalignment(source, edit),
            "text_direction": clip.direction(source, edit, prompt.before, prompt.after) if clip and prompt else None,
            "identity": clip.similarity(source, edit) if clip else None,
            **_changes(source, edit),
            **_colours(thumbnail(edit, CELLS)),
        }
        descriptors: dict[str, Any] = {"descriptor": _descriptor(edit), "source_descriptor": _descriptor(source)}
        rounded: dict[str, Any] = {name: x if x is None else round(x, DECIMALS) for name, x in numbers.items()}
        measured[index] = Measures(id=ids[index], **descriptors, **rounded)
    for index, missing in enumerate(edits):
        if isinstance(missing, Failed):
            measured[index] = Measures(id=ids[index], failed=missing.reason)
    return [measured[index] for index in range(len(ids))]


def as_columns(measures: Sequence[Measures]) -> dict[str, Any]:
    """A PyArrow array a field of `Measures`."""
    import pyarrow as pa

    kinds = {"str": pa.string(), "float": pa.float64(), "bytes": pa.binary()}
    return {
        field.name: pa.array([getattr(one, field.name) for one in measures], kinds[str(field.type).partition(" ")[0]])
        for field in fields(Measures)
    }


def write_measures(measures: Sequence[Measures]) -> bytes:
    """One Parquet file, a row an edit in the order given. The same measures give the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.table(as_columns(measures)), sink, compression="none")
    return sink.getvalue()


def read_measures(data: bytes) -> list[Measures]:
    """What `write_measures` wrote.

    Raises:
        ValueError: the bytes are not such a table.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(data), columns=[field.name for field in fields(Measures)])
        return [Measures(**row) for row in table.to_pylist()]
    except (pa.ArrowException, KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"not a Parquet table of measures: {error}") from error


def _structures(pairs: Sequence[tuple[Image, Image]], panel: Sequence[Image]) -> list[tuple[float, float | None]]:
    """Every edit's `structure` and `match`."""
    sources, edits = (Structure(images) for images in zip(*pairs, strict=True))
    own = np.diagonal(likeness(edits, sources))
    if not panel:
        return [(float(one), None) for one in own]
    others = Structure(panel)
    alike = likeness(edits, others)
    same = likeness(sources, others) > SAME_PHOTO
    found: list[tuple[float, float | None]] = []
    for mine, row, left_out in zip(own, alike, same, strict=True):
        rest = row[~left_out]
        match = float((mine - rest.mean()) / (rest.std() + 0.01)) if len(rest) >= MIN_PANEL else None
        found.append((float(mine), match))
    return found


def _changes(source: Image, edit: Image) -> dict[str, Any]:
    fine, coarse = (np.abs(thumbnail(edit, side) - thumbnail(source, side)).mean(2).ravel() for side in (CELLS, BLOCKS))
    return {"distance": float(fine.mean()), "change": float(np.sort(coarse)[-(len(coarse) // 20) :].mean())}


def _colours(pixels: Array) -> dict[str, Any]:
    """Of `[h, w, 3]` in 0..1."""
    lightness = pixels @ np.array([0.299, 0.587, 0.114])
    red_green = pixels[..., 0] - pixels[..., 1]
    yellow_blue = (pixels[..., 0] + pixels[..., 1]) / 2 - pixels[..., 2]
    found: dict[str, Any] = {"monochrome": _one_hue(pixels)}
    for name, plane in (("lightness", lightness), ("red_green", red_green), ("yellow_blue", yellow_blue)):
        found |= {name: float(plane.mean()), f"{name}_spread": float(plane.std())}
    return found


def _one_hue(pixels: Array) -> float:
    """The largest share of pixels that are saturated and within 30 degrees of hue."""
    strongest = pixels.max(2)
    chroma = strongest - pixels.min(2)
    vivid = pixels[(chroma > 0.3) & (chroma > 0.6 * strongest)]
    hue = np.arctan2(np.sqrt(3) * (vivid[:, 1] - vivid[:, 2]), 2 * vivid[:, 0] - vivid[:, 1] - vivid[:, 2])
    shares = np.histogram(hue, bins=36, range=(-np.pi, np.pi))[0] / chroma.size
    return float((shares + np.roll(shares, 1) + np.roll(shares, 2)).max())


def _descriptor(image: Image) -> bytes:
    return np.rint(thumbnail(image, DESCRIPTOR_SIDE) * 255).astype(np.uint8).tobytes()
