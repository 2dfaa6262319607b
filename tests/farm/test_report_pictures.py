"""Pictures that share what bytes a page has."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farm.report.pictures import GAP, LEAST_SIDE, Album, _fair


def sheet(rows: int, columns: int, side: int, seed: int = 0) -> bytes:
    """Of flat pictures: red says the row, green the column."""
    whole = np.full((rows * (side + GAP) - GAP, columns * (side + GAP) - GAP, 3), 255, np.uint8)
    noise = np.random.default_rng(seed)
    for row in range(rows):
        for column in range(columns):
            top, left = row * (side + GAP), column * (side + GAP)
            picture = whole[top : top + side, left : left + side]
            picture[...] = (20 + 20 * row, 20 + 20 * column, 128)
            picture[..., 2] = noise.integers(0, 255, (side, side))
    buffer = io.BytesIO()
    PIL.Image.fromarray(whole).save(buffer, format="WEBP", lossless=True)
    return buffer.getvalue()


def seen(picture: object, rows: int) -> list[list[int]]:
    """The columns of the sheet that are shown, row by row, by their green."""
    pixels = np.asarray(picture.image).astype(int)  # type: ignore[attr-defined]
    side = (pixels.shape[0] + GAP) / rows
    shown = round((pixels.shape[1] + GAP) / side)
    middles = [(int((n + 0.5) * side)) for n in range(max(rows, shown))]
    return [[round((pixels[y, x, 1] - 20) / 20) for x in middles[:shown]] for y in middles[:rows]]


def test_all_columns_where_there_is_room_and_some_spread_evenly_where_there_is_not() -> None:
    (whole,) = Album(10, 3_000_000).add(sheet(3, 6, 96), rows=3)
    assert (whole.width, whole.height) == (6 * 98 - 2, 3 * 98 - 2)  # never enlarged
    assert seen(whole, 3) == [[0, 1, 2, 3, 4, 5]] * 3
    (few,) = Album(400, 3_000_000).add(sheet(3, 6, 96), rows=3)
    assert seen(few, 3) == [[0, 2, 5]] * 3
    assert LEAST_SIDE - 4 <= few.width / 3 <= 96


def test_a_sheet_is_cut_by_concept() -> None:
    parts = Album(10, 3_000_000).add(sheet(6, 4, 200), rows=6, parts=2)
    assert [(picture.width, picture.height) for picture in parts] == [(800, 600)] * 2
    assert [round((np.asarray(p.image)[20, 20, 0] - 20) / 20) for p in parts] == [0, 3]


@settings(deadline=None, max_examples=8)
@given(budget=st.integers(2_000, 120_000), count=st.integers(1, 5))
def test_no_more_bytes_than_there_are(budget: int, count: int) -> None:
    album = Album(count, 500_000)
    pictures = [album.add(sheet(3, 3, 48, seed), rows=3)[0] for seed in range(count)]
    album.develop(budget)
    assert sum(len(picture.data) for picture in pictures) <= budget
    for picture in pictures:
        with PIL.Image.open(io.BytesIO(picture.data)) as opened:
            assert opened.size == (picture.width, picture.height)
        assert picture.uri.startswith("data:image/webp;base64,")


@given(sizes=st.lists(st.integers(0, 1000), max_size=20), budget=st.integers(0, 5000))
def test_what_one_does_not_need_is_the_others(sizes: list[int], budget: int) -> None:
    most = _fair(sizes, budget)
    given_ = [min(size, most) for size in sizes]
    assert sum(given_) <= max(budget, 0)
    if sum(sizes) <= budget:
        assert given_ == sizes
    else:  # nobody could have a byte more and leave everybody theirs
        assert sum(min(size, most + 1) for size in sizes) > budget


def test_the_same_pictures_make_the_same_bytes_in_any_order() -> None:
    def made(order: list[int]) -> dict[int, bytes]:
        album = Album(3, 100_000)
        pictures = {seed: album.add(sheet(3, 3, 48, seed), rows=3)[0] for seed in order}
        album.develop(20_000)
        return {seed: picture.data for seed, picture in pictures.items()}

    assert made([0, 1, 2]) == made([2, 0, 1])


@pytest.mark.parametrize("side", [1, 2, 16])
def test_tiny_sheets(side: int) -> None:
    (picture,) = Album(1, 1000).add(sheet(3, 1, side), rows=3)
    assert picture.width >= 1 and picture.height >= 1
