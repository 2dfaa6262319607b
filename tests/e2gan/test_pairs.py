import io
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from e2gan.pairs import Image, Pairs, read_table, to_bytes, to_tensor, to_unit, write_table


def photo(seed: int, height: int = 5, width: int = 7) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


PHOTOS = {"b": photo(0), "a": photo(1, 3, 4), "ü/c": photo(2)}


def test_table_round_trip_in_the_order_given() -> None:
    back = read_table(write_table(PHOTOS))
    assert list(back) == ["b", "a", "ü/c"]
    for row_id, image in back.items():
        np.testing.assert_array_equal(image, PHOTOS[row_id])
        assert image.dtype == np.uint8


def test_same_images_same_bytes() -> None:
    assert write_table(PHOTOS) == write_table({row_id: image.copy() for row_id, image in PHOTOS.items()})
    assert write_table(PHOTOS) != write_table(dict(reversed(PHOTOS.items())))


def test_empty_table() -> None:
    assert read_table(write_table({})) == {}


def test_pandas_opens_a_table(tmp_path: Path) -> None:
    (tmp_path / "part.parquet").write_bytes(write_table(PHOTOS))
    table = pd.read_parquet(tmp_path / "part.parquet")
    assert list(table.columns) == ["id", "image"]
    assert list(table["id"]) == list(PHOTOS)
    with PILImage.open(io.BytesIO(table["image"][1])) as image:
        np.testing.assert_array_equal(np.asarray(image), PHOTOS["a"])


def parquet(**columns: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no table",
        b"PAR1" + bytes(100) + b"PAR1",
        write_table(PHOTOS)[:-10],
        write_table(PHOTOS)[: len(write_table(PHOTOS)) // 2],
        parquet(id=["a"]),
        parquet(image=[b"x"]),
        parquet(id=["a"], image=[b"no image"]),
        parquet(id=["a"], image=[None]),
        parquet(id=["a"], image=[3]),
    ],
    ids=lambda data: repr(data[:8]) + str(len(data)),
)
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a Parquet table of images"):
        read_table(data)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_table_is_refused_or_read(data: st.DataObject) -> None:
    table = bytearray(write_table({"a": photo(0), "b": photo(1)}))
    table[data.draw(st.integers(0, len(table) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        read_table(bytes(table))
    except ValueError as error:
        assert "not a Parquet table of images" in str(error)


def test_tensor_layout() -> None:
    stacked = to_tensor([photo(0), photo(2)])
    assert stacked.shape == (2, 3, 5, 7)
    assert stacked.dtype == torch.uint8
    assert stacked[1, 2, 4, 6] == photo(2)[4, 6, 2]


def test_unit_range_round_trips_every_value() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    unit = to_unit(values)
    assert unit.dtype == torch.float32
    assert (unit[0], unit[255]) == (-1, 1)
    torch.testing.assert_close(unit.double(), torch.linspace(-1, 1, 256, dtype=torch.float64), atol=1e-6, rtol=0)
    assert torch.equal(to_bytes(unit), values)
    assert torch.equal(values, torch.arange(256, dtype=torch.uint8))  # the input is left alone


def test_to_bytes_clips_and_rounds_to_nearest() -> None:
    level = 2 / 255
    given_ = torch.tensor([-7.0, 7.0, -1 + 0.4 * level, -1 + 0.6 * level, 1 - 0.4 * level])
    assert to_bytes(given_).tolist() == [0, 255, 0, 1, 255]


def test_pairs_match_by_id() -> None:
    source = {row_id: photo(i) for i, row_id in enumerate("abcd")}
    target = {row_id: 255 - source[row_id] for row_id in "dcba"}
    pairs = Pairs.from_images(source, target, ["c", "a"])
    assert pairs.ids == ("c", "a")
    assert len(pairs) == 2
    np.testing.assert_array_equal(pairs.source[0].permute(1, 2, 0), source["c"])
    assert torch.equal(pairs.target, 255 - pairs.source)


def test_failed_edits_are_left_out() -> None:
    source = {row_id: photo(i) for i, row_id in enumerate("abc")}
    assert Pairs.from_images(source, {"b": photo(9)}, "abc").ids == ("b",)
    with pytest.raises(ValueError, match="no pair is left"):
        Pairs.from_images(source, {}, "abc")


def test_missing_source_is_named() -> None:
    with pytest.raises(ValueError, match="1 edits have no source image, first 'z'"):
        Pairs.from_images({"a": photo(0)}, {"a": photo(1), "z": photo(2)}, ["a", "z"])


@pytest.mark.parametrize("wrong", ["source", "target"])
def test_sizes_that_differ_are_named(wrong: str) -> None:
    sides = {"source": {"a": photo(0), "b": photo(1)}, "target": {"a": photo(2), "b": photo(3)}}
    sides[wrong]["b"] = photo(4, 6, 7)
    with pytest.raises(ValueError, match=r"pair 'b'.*\(6, 7\)"):
        Pairs.from_images(sides["source"], sides["target"], ["a", "b"])
