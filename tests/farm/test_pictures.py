from __future__ import annotations

import io

import numpy as np
import PIL.Image
import pytest
import torch

from farm.stages.pictures import middle_column, picture_sheet


@pytest.mark.parametrize(("count", "middle"), [(1, 0), (2, 1), (5, 2), (6, 3)])
@pytest.mark.parametrize("side", [64, 128, 256])
def test_a_middle_column_is_three_pictures_of_one_photo(count, middle, side):
    colours = np.random.default_rng(0).integers(0, 256, (3, count, 3))
    rows = [torch.from_numpy(np.tile(row[..., None, None], (side, side)).astype(np.uint8)) for row in colours]
    column = middle_column(picture_sheet(rows))
    assert len(column) < 10_000
    pixels = np.asarray(PIL.Image.open(io.BytesIO(column)).convert("RGB")).astype(int)
    edge = max(side, 128)
    assert pixels.shape == (3 * edge + 4, edge, 3)
    for row in range(3):
        cell = pixels[row * (edge + 2) : row * (edge + 2) + edge]
        assert np.abs(cell[8:-8] - colours[row, middle]).max() <= 4
