from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from e2gan.pairs import Image
from farm.editors.base import Failed
from farm.quality import Measures, as_columns, measure, read_measures, write_measures
from farm.quality.structure import _correlate, misalignment


def photo(seed: int, height: int = 64, width: int = 64) -> Image:
    """Blobs of colour at a few scales, as photographs have."""
    import cv2

    rng = np.random.default_rng(seed)
    planes = [rng.uniform(-1, 1, (side, side, 3)) / side**0.5 for side in (4, 8, 16)]
    total = sum(cv2.resize(plane, (width, height), interpolation=cv2.INTER_CUBIC) for plane in planes)
    assert isinstance(total, np.ndarray)
    return np.rint((128 + 128 * total).clip(0, 255)).astype(np.uint8)


def flat(*colour: int, size: int = 64) -> Image:
    return np.broadcast_to(np.array(colour, np.uint8), (size, size, 3))


PANEL = [photo(100 + seed) for seed in range(20)]


def one(source: Image, edit: Image, panel: list[Image] = PANEL) -> Measures:
    (measured,) = measure(["a"], [source], [edit], panel)
    return measured


def test_an_even_change_is_its_size() -> None:
    found = one(flat(100, 100, 100), flat(126, 126, 126))
    assert found.distance == pytest.approx(26 / 255, abs=1e-6)
    assert found.change == pytest.approx(26 / 255, abs=1e-6)


def test_a_small_patch_moves_change_not_distance() -> None:
    edit = flat(50, 50, 50).copy()
    edit[8:16, 16:32] = 250  # two of the 8x8 blocks, of which the three most changed count
    found = one(flat(50, 50, 50), edit)
    assert found.distance == pytest.approx(2 / 64 * 200 / 255, abs=1e-6)
    assert found.change == pytest.approx(2 / 3 * 200 / 255, abs=1e-6)


def test_noise_and_jpeg_hardly_change_anything() -> None:
    import io

    from PIL import Image as PILImage

    source = photo(1, 128, 128)
    noisy = (source + np.random.default_rng(0).integers(-2, 3, source.shape)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    PILImage.fromarray(source).save(buffer, "JPEG", quality=70)
    assert 0 < one(source, noisy).change < 0.005
    assert 0 < one(source, np.asarray(PILImage.open(buffer))).change < 0.012


@pytest.mark.parametrize(
    ("colour", "lightness", "red_green", "yellow_blue", "monochrome"),
    [
        ((255, 0, 0), 0.299, 1, 0.5, 1),
        ((0, 255, 0), 0.587, -1, 0.5, 1),
        ((0, 0, 255), 0.114, 0, -1, 1),
        ((90, 90, 90), 90 / 255, 0, 0, 0),
        ((255, 200, 180), (0.299 * 255 + 0.587 * 200 + 0.114 * 180) / 255, 55 / 255, 47.5 / 255, 0),  # pale
    ],
)
def test_colours_of_flat_images(
    colour: tuple[int, int, int], lightness: float, red_green: float, yellow_blue: float, monochrome: float
) -> None:
    found = one(photo(0), flat(*colour))
    assert found.lightness == pytest.approx(lightness, abs=1e-5)
    assert found.red_green == pytest.approx(red_green, abs=1e-5)
    assert found.yellow_blue == pytest.approx(yellow_blue, abs=1e-5)
    assert found.monochrome == monochrome
    assert found.spread == pytest.approx(0, abs=1e-5)


def test_spread_and_monochrome_of_two_halves() -> None:
    halves = flat(255, 0, 0).copy()
    halves[:, 32:] = (0, 0, 0)
    found = one(photo(0), halves)
    assert found.monochrome == 0.5
    assert found.red_green_spread == pytest.approx(0.5, abs=1e-5)
    assert found.lightness_spread == pytest.approx(0.299 / 2, abs=1e-5)
    assert found.spread == pytest.approx(math.hypot(0.299 / 2, 0.5, 0.25), abs=1e-5)
    halves[:, 32:] = (255, 0, 255)
    assert one(photo(0), halves).monochrome == 0.5  # magenta is another hue


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), matrix=st.lists(st.floats(-1, 1), min_size=9, max_size=9))
def test_structure_survives_any_exchange_of_colours(seed: int, matrix: list[float]) -> None:
    """An edit whose colours are a linear function of the photo's is recognised, whatever the function."""
    source = photo(seed)
    mixed = (source.astype(np.float64) - 128) @ np.array(matrix).reshape(3, 3)
    strength = mixed.std()
    if strength < 5:
        return  # it has turned grey, up to rounding
    edit = np.rint(128 + mixed / strength * 35).clip(0, 255).astype(np.uint8)
    found = one(source, edit)
    stranger = one(photo(seed + 20_000), edit)
    assert found.match is not None and stranger.match is not None
    assert found.structure > stranger.structure + 0.25
    assert found.match > max(3.0, stranger.match)


def test_an_untouched_photo_keeps_everything() -> None:
    found = one(photo(3), photo(3))
    assert found.structure == pytest.approx(1, abs=1e-3)
    assert found.distance == found.change == 0
    assert found.misalignment < -0.2
    assert found.descriptor == found.source_descriptor
    assert len(found.descriptor) == 768


def test_the_negative_keeps_its_structure() -> None:
    assert one(photo(4), 255 - photo(4)).structure == pytest.approx(1, abs=1e-3)


def test_photos_of_the_panel_that_are_the_source_are_left_out() -> None:
    source, edit = photo(5), 255 - photo(5)
    brighter = np.minimum(source.astype(int) + 12, 255).astype(np.uint8)
    assert one(source, edit, [*PANEL[:10], source, brighter, *PANEL[10:]]) == one(source, edit, PANEL)


def test_too_few_other_photos_tell_nothing() -> None:
    assert one(photo(6), photo(7), PANEL[:7]).match is None
    assert one(photo(6), photo(7), [*PANEL[:7], photo(6)]).match is None
    assert one(photo(6), photo(7), []).match is None
    assert one(photo(6), photo(7), PANEL[:8]).match is not None


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    zoom=st.floats(1.15, 1.5),
    place=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_a_crop_blown_up_fits_elsewhere(seed: int, zoom: float, place: tuple[float, float]) -> None:
    import cv2

    source = photo(seed, 96, 96)
    side = round(96 / zoom)
    top, left = (round(share * (96 - side)) for share in place)
    cropped = cv2.resize(source[top : top + side, left : left + side], (96, 96), interpolation=cv2.INTER_CUBIC)
    assert misalignment(source, 255 - np.asarray(cropped)) > 0.1
    assert misalignment(source, 255 - source) < -0.1


def test_a_picture_pushed_aside_fits_elsewhere() -> None:
    source = photo(8)
    pushed = np.pad(source, ((0, 0), (12, 0), (0, 0)), mode="edge")[:, :64]
    assert misalignment(source, pushed) > 0.1


def test_correlation_is_the_dot_product_at_every_place() -> None:
    rng = np.random.default_rng(0)
    field, window = rng.standard_normal((2, 13, 17)), rng.standard_normal((2, 9, 9))
    expected = np.empty((5, 9))
    for y, x in np.ndindex(5, 9):
        part = field[:, y : y + 9, x : x + 9]
        expected[y, x] = (part * window).sum() / np.linalg.norm(part)
    np.testing.assert_allclose(_correlate(field, window), expected, atol=1e-5)


def test_failed_edits_keep_their_place_and_nothing_else() -> None:
    sources = [photo(seed) for seed in range(3)]
    edits: list[Image | Failed] = [255 - sources[0], Failed("the safety checker blanked it"), 255 - sources[2]]
    first, failed, last = measure(["a", "b", "c"], sources, edits, PANEL)
    assert failed == Measures(id="b", failed="the safety checker blanked it")
    assert (first, last) == (one(sources[0], 255 - sources[0]), dataclasses.replace(last, id="c"))
    assert (first.id, last.id) == ("a", "c")
    assert measure(["x"], sources[:1], [Failed("no")], PANEL) == [Measures(id="x", failed="no")]


def test_an_edit_is_measured_alike_alone_and_in_a_batch() -> None:
    sources = [photo(seed) for seed in range(5)]
    edits = [255 - source[..., ::-1] for source in sources]
    together = measure([*"abcde"], sources, edits, PANEL)
    for index, found in enumerate(together):
        alone = dataclasses.asdict(measure([found.id], sources[index : index + 1], edits[index : index + 1], PANEL)[0])
        for name, value in dataclasses.asdict(found).items():
            assert alone[name] == (pytest.approx(value, abs=1e-5) if isinstance(value, float) else value), name


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)),
    flatten=st.tuples(st.booleans(), st.booleans()),
)
def test_every_number_is_in_its_range(
    size: tuple[int, int], seeds: tuple[int, int], flatten: tuple[bool, bool]
) -> None:
    source, edit = (photo(seed, *size) // (255 if dull else 1) for seed, dull in zip(seeds, flatten, strict=True))
    found = one(source, edit)
    for name in ("distance", "change", "monochrome", "lightness", "structure"):
        assert 0 <= getattr(found, name) <= 1, name
    for name in ("red_green", "yellow_blue"):
        assert -1 <= getattr(found, name) <= 1, name
        assert 0 <= getattr(found, f"{name}_spread") <= 1.001, name
    assert 0 <= found.lightness_spread <= 0.501
    assert -1.001 <= found.misalignment <= 1.001
    assert found.match is not None and math.isfinite(found.match)


numbers = st.floats(allow_nan=False)
perhaps = st.none() | numbers


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(
        st.builds(
            Measures,
            id=st.text(),
            failed=st.none() | st.text(),
            distance=numbers,
            monochrome=numbers,
            match=perhaps,
            text_direction=perhaps,
            identity=perhaps,
            descriptor=st.binary(max_size=9),
        ),
        max_size=5,
    ),
)
def test_the_table_gives_back_what_it_was_given(rows: list[Measures]) -> None:
    data = write_measures(rows)
    assert read_measures(data) == rows
    assert write_measures(rows) == data


def test_the_table_can_be_read_by_others() -> None:
    import io

    import pyarrow.parquet as pq

    rows = measure(["a", "b"], [photo(0), photo(1)], [255 - photo(0), Failed("blanked")], PANEL)
    table = pq.read_table(io.BytesIO(write_measures(rows)))
    assert table["id"].to_pylist() == ["a", "b"]
    assert table["structure"].to_pylist() == [rows[0].structure, 0]
    assert table["failed"].to_pylist() == [None, "blanked"]
    assert table["text_direction"].type == "double"  # though there is none in it
    assert table.column_names == [field.name for field in dataclasses.fields(Measures)] == list(as_columns(rows))


@pytest.mark.parametrize("data", [b"", b"not parquet", b"PAR1" * 5])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a Parquet table of measures"):
        read_measures(data)


def test_another_table_is_refused() -> None:
    from e2gan.pairs import write_table

    with pytest.raises(ValueError, match="not a Parquet table of measures"):
        read_measures(write_table({"a": photo(0, 8, 8)}))


def test_the_thumbnails_are_means() -> None:
    source = photo(9)
    means: NDArray[np.float64] = source.reshape(16, 4, 16, 4, 3).mean((1, 3))
    found = np.frombuffer(one(source, source).descriptor, np.uint8).reshape(16, 16, 3)
    assert np.abs(found - means).max() <= 0.51
