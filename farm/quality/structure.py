"""What of a photo's structure an edit keeps, told without knowing the edit's colours, contrast or brush.

Two things survive most edits. Outlines keep their place and direction, though dark may become light: normalised
gradient fields (Haber & Modersitzki, "Intensity gradient based registration and fusion of multi-modal images", MICCAI
2006) see just that. And every colour of the photo tends to become one other colour: the share of the edit's local
contrast that a linear function of the photo's colours explains sees that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from e2gan.pairs import Image

Array = NDArray[np.floating[Any]]

SCALES = (64, 32)
"""Sides at which outlines are compared."""

COLOUR_SIDE = 32
"""Side at which colours are compared."""

ALIGN_SIDE = 48
"""Side at which an edit is moved over its photo."""

ZOOMS = (1.15, 1.25, 1.37, 1.5)
"""How much larger the photo may be than the edit shows it; half-way between two of them is within 5 % of both."""

MAX_SHIFT, MIN_SHIFT = 1 / 3, 0.07
"""How far an edit may have moved, as shares of its side: nearer than the least, a photo looks like itself."""

_NOISE = 0.3
"""Gradients of less than this share of the image's mean energy count less: they are grain, not outlines."""

_FLAT = 1e-5
"""Energy of a gradient of one level in 0..255: what an image without outlines is made of."""


def thumbnail(image: Image, width: int, height: int | None = None) -> Array:
    """uint8 `[h, w, 3]` to float64 `[height or width, width, 3]` in 0..1, every pixel the mean of what it covers.

    Float64, so that the order in which threads add up does not show in what is kept of a measure.
    """
    import cv2

    small = cv2.resize(image, (width, height or width), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.float64) / 255


def outlines(pixels: Array) -> Array:
    """`[h, w, 3]` to `[2, h, w]`: direction (its double angle, so that dark to light is light to dark) times clearness
    0..1 of the outline at every pixel.
    """
    import cv2

    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    across = (padded[1:-1, 2:] - padded[1:-1, :-2]) / 2
    down = (padded[2:, 1:-1] - padded[:-2, 1:-1]) / 2
    xx, yy, xy = ((a * b).sum(2) for a, b in ((across, across), (down, down), (across, down)))
    tensor = cv2.GaussianBlur(np.dstack([xx - yy, 2 * xy, xx + yy]), (0, 0), 1, borderType=cv2.BORDER_REFLECT)
    energy = tensor[..., 2]
    field: Array = tensor[..., :2] / (energy + _NOISE * energy.mean() + _FLAT)[..., None]
    return field.transpose(2, 0, 1)


class Structure:
    """What is compared of many images at once.

    outlines: `[n, d]`, rows of length 1 (0 for a flat image). colours: `[n, p, 3]`, local contrast of the three colour
    channels. basis: `[n, p, 3]`, orthonormal columns that span it; zero columns where there are fewer.
    """

    def __init__(self, images: Sequence[Image]) -> None:
        self.outlines = np.stack([_outline_row(image) for image in images])
        self.colours = np.stack([_local_contrast(image) for image in images])
        self.basis = np.stack([_orthonormal(one) for one in self.colours])

    def __len__(self) -> int:
        return len(self.outlines)


def likeness(edits: Structure, sources: Structure) -> Array:
    """How much of each source's structure each edit has, 0 (none) to 1 (all): `[edits, sources]`."""
    outline = edits.outlines @ sources.outlines.T
    scaled = edits.colours / (np.linalg.norm(edits.colours, axis=(1, 2), keepdims=True) + 1e-6)
    wide = scaled.transpose(0, 2, 1).reshape(-1, scaled.shape[1])  # [edits * 3, p]
    explained = np.stack([((wide @ basis) ** 2).sum(1).reshape(-1, 3).sum(1) for basis in sources.basis], axis=1)
    both: Array = (outline + np.sqrt(explained)) / 2
    return both.clip(0, 1)


def misalignment(source: Image, edit: Image) -> float:
    """How much better the edit fits a zoomed or moved photo than the photo as it is, -1..1.

    Below 0 for an edit in its place; a crop blown up to the image's size, or a picture pushed aside, is above.
    """
    edited = outlines(thumbnail(edit, ALIGN_SIDE))
    length = float(np.linalg.norm(edited)) + 1e-6
    here = outlines(thumbnail(source, ALIGN_SIDE))
    in_place = float((here * edited).sum()) / (length * (float(np.linalg.norm(here)) + 1e-6))
    reach = round(ALIGN_SIDE * MAX_SHIFT)
    moved = _correlate(np.pad(here, ((0, 0), (reach, reach), (reach, reach))), edited) / length
    offset = np.arange(-reach, reach + 1)
    moved[np.hypot(offset[:, None], offset) < MIN_SHIFT * ALIGN_SIDE] = -1
    elsewhere = float(moved.max())
    for zoom in ZOOMS:
        larger = outlines(thumbnail(source, round(ALIGN_SIDE * zoom)))
        elsewhere = max(elsewhere, float(_correlate(larger, edited).max()) / length)
    return elsewhere - in_place


def _correlate(field: Array, window: Array) -> Array:
    """Dot products of `window` `[2, s, s]` with every place in `field` `[2, h, w]`, over the length of the field there.

    Returns `[h - s + 1, w - s + 1]`.
    """
    from scipy import fft

    side = window.shape[1]
    size = [fft.next_fast_len(length, real=True) for length in field.shape[1:]]
    products = fft.irfft2((fft.rfft2(field, size) * fft.rfft2(window, size).conj()).sum(0), size)
    rows, columns = (length - side + 1 for length in field.shape[1:])
    energy = np.pad((field**2).sum(0), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    inside = energy[side:, side:] - energy[:-side, side:] - energy[side:, :-side] + energy[:-side, :-side]
    found: Array = products[:rows, :columns] / np.sqrt(inside.clip(0) + 1e-6)
    return found


def _outline_row(image: Image) -> Array:
    rows = [outlines(thumbnail(image, side)).ravel() for side in SCALES]
    joined: Array = np.concatenate([row / (np.linalg.norm(row) + 1e-6) for row in rows]) / len(SCALES) ** 0.5
    return joined


def _local_contrast(image: Image) -> Array:
    """`[p, 3]`: every pixel's difference from its surroundings."""
    import cv2

    pixels = thumbnail(image, COLOUR_SIDE)
    around = cv2.GaussianBlur(pixels, (0, 0), COLOUR_SIDE / 8, borderType=cv2.BORDER_REFLECT)
    local = (pixels - around).reshape(-1, 3)
    centred: Array = local - local.mean(0)
    return centred


def _orthonormal(columns: Array) -> Array:
    left, strength, _ = np.linalg.svd(columns, full_matrices=False)
    basis: Array = left * (strength > 0.05 * strength[0] + 1e-3)
    return basis
