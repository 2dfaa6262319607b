"""Pictures that show what a stage made."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Pictures = tuple[Tensor, Tensor, Tensor]
"""Photos, the teacher's edits and the student's, each uint8 `[n, 3, h, w]`."""


GAP = 2
"""Pixels between the pictures of a sheet."""


def spread(pictures: Pictures, count: int) -> Pictures:
    """`count` pictures spread evenly over the split, so that several photographs are seen."""
    n = len(pictures[0])
    rows = torch.linspace(0, n - 1, min(count, n)).round().long()
    photos, targets, edited = pictures
    return photos[rows], targets[rows], edited[rows]


def picture_sheet(rows: Sequence[Tensor]) -> bytes:
    """Rows of uint8 pictures `[n, 3, h, w]` as one lossless WebP, small ones enlarged, 2 px apart."""
    from PIL import Image as PILImage

    height, width = rows[0].shape[2:]
    factor = max(1, 128 // height)
    gap = GAP
    columns = max(len(row) for row in rows)
    sheet = np.full(
        (len(rows) * (height * factor + gap) - gap, columns * (width * factor + gap) - gap, 3),
        255,
        dtype=np.uint8,
    )
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            image = PILImage.fromarray(picture.permute(1, 2, 0).numpy())
            large = np.asarray(image.resize((width * factor, height * factor), PILImage.Resampling.BICUBIC))
            top, left = r * (height * factor + gap), c * (width * factor + gap)
            sheet[top : top + height * factor, left : left + width * factor] = large
    buffer = io.BytesIO()
    PILImage.fromarray(sheet).save(buffer, format="WEBP", lossless=True)
    return buffer.getvalue()


def middle_column(sheet: bytes) -> bytes:
    """One column of a sheet of three rows of square pictures, with their gaps, as a small WebP."""
    from PIL import Image as PILImage

    picture = PILImage.open(io.BytesIO(sheet))
    side = (picture.height - 2 * GAP) // 3
    columns = (picture.width + GAP) // (side + GAP)
    left = columns // 2 * (side + GAP)
    buffer = io.BytesIO()
    picture.crop((left, 0, left + side, picture.height)).save(buffer, format="WEBP", quality=85)
    return buffer.getvalue()
