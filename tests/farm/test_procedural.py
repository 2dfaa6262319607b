from __future__ import annotations

import itertools
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from e2gan.pairs import Image
from farm.editors import EditorSettings, Failed, ProceduralSettings, Prompt, edit_seed, editor_fingerprint, open_editor
from farm.editors.procedural import style_names
from farm.errors import UserError

STYLES = style_names()


def photo(package: str, inside: str, side: int) -> Image:
    spec = find_spec(package)
    assert spec and spec.submodule_search_locations
    picture = PIL.Image.open(Path(spec.submodule_search_locations[0]) / inside).convert("RGB")
    width, height = picture.size
    half = min(width, height) / 2
    box = (width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half)
    return np.asarray(picture.resize((side, side), PIL.Image.Resampling.LANCZOS, box=box))


def photos(side: int) -> list[Image]:
    return [photo("sklearn", "datasets/images/china.jpg", side), photo("skimage", "data/astronaut.png", side)]


PROMPT = Prompt(instruction="not read", before="a photo", after="a picture")


def edit(style: str, images: list[Image], seeds: list[int]) -> list[Image]:
    edits = open_editor(ProceduralSettings(), style).edit(images, PROMPT, seeds)
    return [edit for edit in edits if not isinstance(edit, Failed)]


def distance(first: Image, second: Image) -> float:
    """Mean absolute difference in the networks' range, -1..1."""
    return float(np.abs(first.astype(float) - second).mean() / 127.5)


def test_the_styles_asked_for_are_there() -> None:
    wanted = "charcoal watercolour oil-painting pop-art sepia night autumn winter fog pointillism comic pixel-art"
    assert set(wanted.split()) <= set(STYLES)
    assert len(STYLES) >= 16


@pytest.mark.parametrize("style", STYLES)
def test_a_style_is_strong_and_repeatable_and_does_not_see_the_batch(style: str) -> None:
    images = photos(64)
    before = [image.copy() for image in images]
    edited = edit(style, images, [1, 2])
    for image, untouched, result in zip(images, before, edited, strict=True):
        assert result.shape == image.shape
        assert result.dtype == np.uint8
        assert np.array_equal(image, untouched)
        assert distance(result, image) >= 0.2
        assert result.std() > 5, "the photograph must still be in it"
    again = edit(style, images, [1, 2])
    backwards = edit(style, images[::-1], [2, 1])[::-1]
    alone = [edit(style, [image], [seed])[0] for image, seed in zip(images, (1, 2), strict=True)]
    for others in (again, backwards, alone):
        assert all(np.array_equal(a, b) for a, b in zip(edited, others, strict=True))


@pytest.mark.parametrize("style", STYLES)
def test_another_seed_changes_little(style: str) -> None:
    """What is random cannot be learnt, so there must be little of it."""
    image = photos(64)[1]
    first, second = edit(style, [image, image], [3, 4])
    assert distance(first, second) < 0.06


@pytest.mark.parametrize("style", STYLES)
def test_a_style_looks_alike_at_every_size(style: str) -> None:
    """The edit of a small photograph is near the small version of a large one's edit."""
    small, large = (edit(style, [photos(side)[1]], [0])[0] for side in (64, 256))
    reduced = np.asarray(PIL.Image.fromarray(large).resize((64, 64), PIL.Image.Resampling.BOX))
    assert distance(small, reduced) < 0.5 * distance(small, photos(64)[1])


@pytest.mark.parametrize("style", STYLES)
def test_exposure_and_colour_cast_barely_change_an_edit(style: str) -> None:
    """The student's instance norm does not see them, so an edit that followed them could not be learned."""
    for image in photos(64):
        other = np.rint(image * np.array([0.6, 0.7, 0.5]) + np.array([0.2, 0.1, 0.4]) * 255).astype(np.uint8)
        assert other.min() > 0 and other.max() < 255, "nothing is clipped"
        first, second = edit(style, [image, other], [0, 0])
        assert distance(image, other) > 0.15
        assert distance(first, second) < 0.25 * distance(image, other)


def test_no_two_styles_are_alike() -> None:
    results = {style: edit(style, photos(64), [0, 0]) for style in STYLES}
    for first, second in itertools.combinations(STYLES, 2):
        apart = [distance(a, b) for a, b in zip(results[first], results[second], strict=True)]
        assert np.mean(apart) > 0.12, (first, second)


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=12, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    kind=st.sampled_from(["flat", "grey", "noise", "black", "white"]),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_image_can_be_edited(style: str, height: int, width: int, kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = np.empty((height, width, 3), np.uint8)
    match kind:
        case "flat":
            image[:] = rng.integers(0, 256, 3)
        case "grey":
            image[:] = rng.integers(0, 256, (height, width, 1))
        case "noise":
            image[:] = rng.integers(0, 256, image.shape)
        case _:
            image[:] = 0 if kind == "black" else 255
    (result,) = edit(style, [image], [seed])  # a NaN would raise a warning, and warnings are errors here
    assert result.shape == image.shape
    assert result.dtype == np.uint8


def test_an_explicit_style_wins_over_the_concept() -> None:
    image = photos(64)[0]
    (by_style,) = open_editor(ProceduralSettings(style="fog"), "sepia").edit([image], PROMPT, [0])
    assert np.array_equal(by_style, edit("fog", [image], [0])[0])


@pytest.mark.parametrize("call", [open_editor, editor_fingerprint])
def test_an_unknown_style_is_told_with_near_names(call: object) -> None:
    assert callable(call)
    with pytest.raises(UserError, match=r"^editor\.style: .*'water-color'.*watercolour"):
        call(ProceduralSettings(), "water-color")
    with pytest.raises(UserError, match=r"'zzz'; use one of autumn, "):
        call(ProceduralSettings(style="zzz"), "sepia")


def test_the_fingerprint_names_the_style_however_it_was_given() -> None:
    by_concept = editor_fingerprint(ProceduralSettings(), "sepia")
    assert by_concept == editor_fingerprint(ProceduralSettings(style="sepia"), "brown")
    assert by_concept != editor_fingerprint(ProceduralSettings(), "fog")


def test_settings_are_told_apart_by_kind_and_refuse_unknown_keys() -> None:
    adapter: TypeAdapter[EditorSettings] = TypeAdapter(EditorSettings)
    assert adapter.validate_python({"kind": "procedural"}) == ProceduralSettings()
    for wrong in ({"kind": "procedural", "stile": "fog"}, {"kind": "magic"}, {"kind": "onnx"}):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)


def test_edit_seeds_are_stable_and_apart() -> None:
    assert edit_seed(0, "sepia", "china-000") == 3845946109287129762
    seeds = {edit_seed(r, c, s) for r in range(3) for c in "abc" for s in ("1", "2", "11")}
    assert len(seeds) == 27
    assert all(0 <= seed < 2**63 for seed in seeds)
