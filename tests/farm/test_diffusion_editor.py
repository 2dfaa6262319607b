from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import pytest
import torch
from edits import noise
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny_diffusers import clip_tokenizer
from torch import Tensor

from e2gan.pairs import Image
from farm.editors.base import Failed, Prompt
from farm.editors.diffusion import (
    DiffusionEditor,
    DiffusionSettings,
    LatentSettings,
    check_prompt_length,
    fingerprint,
    generators,
    prompt_text,
    working_size,
)
from farm.errors import UserError

PROMPT = Prompt(instruction="make it winter", before="a photo of a lake", after="a photo of a lake in winter")


class Arithmetic:
    """A family that needs no weights: `make` is applied to a batch and its seeds."""

    def __init__(self, make: Callable[[Tensor, Sequence[int]], tuple[Tensor, list[str | None]]]) -> None:
        self.make = make
        self.seen: list[Tensor] = []

    def edit(self, images: Tensor, prompt: Prompt, seeds: Sequence[int]) -> tuple[Tensor, list[str | None]]:
        assert prompt is PROMPT
        assert images.dtype == torch.float32
        assert images.shape[0] == len(seeds)
        self.seen.append(images)
        return self.make(images, seeds)


def editor(
    make: Callable[[Tensor, Sequence[int]], Tensor | tuple[Tensor, list[str | None]]], **options: Any
) -> DiffusionEditor:
    def complete(images: Tensor, seeds: Sequence[int]) -> tuple[Tensor, list[str | None]]:
        made = make(images, seeds)
        return made if isinstance(made, tuple) else (made, [None] * len(seeds))

    return DiffusionEditor(DiffusionSettings(model="arithmetic", device="cpu", **options), Arithmetic(complete))


def smooth(height: int, width: int) -> Image:
    """A picture without edges: what can be resized there and back."""
    y, x = np.mgrid[:height, :width]
    channels = [128 + 100 * np.sin(3 * x / width), 128 + 100 * np.cos(4 * y / height), 255 * (x + y) / (height + width)]
    return np.rint(np.stack(channels, -1)).astype(np.uint8)


def pixels(result: Image | Failed) -> Image:
    assert isinstance(result, np.ndarray)
    return result


def told(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(32, 90), st.integers(32, 90)), max_size=7),
    batch_size=st.none() | st.integers(1, 4),
)
def test_every_image_gets_its_own_edit_at_its_own_size(sizes: list[tuple[int, int]], batch_size: int | None) -> None:
    sevens = editor(
        lambda images, seeds: torch.ones_like(images) * torch.tensor([s / 255 for s in seeds])[:, None, None, None],
        side=64,
        batch_size=batch_size,
    )
    seeds = [7 * i for i in range(len(sizes))]
    edited = sevens.edit([noise(*size) for size in sizes], PROMPT, seeds)
    for size, seed, result in zip(sizes, seeds, edited, strict=True):
        assert np.array_equal(pixels(result), np.full((*size, 3), seed, np.uint8))


def test_batches_hold_images_of_one_working_size() -> None:
    family = Arithmetic(lambda images, seeds: (images, [None] * len(seeds)))
    teacher = DiffusionEditor(DiffusionSettings(model="m", device="cpu", side=64, batch_size=2), family)
    images = [noise(40, 40), noise(40, 80), noise(50, 50), noise(80, 160), noise(64, 64)]
    teacher.edit(images, PROMPT, range(5))
    assert [tuple(batch.shape) for batch in family.seen] == [(2, 3, 64, 64), (1, 3, 64, 64), (2, 3, 64, 128)]


@given(st.integers(32, 3000), st.floats(1, 4), st.integers(8, 256), st.booleans())
def test_the_working_size(short: int, aspect: float, eighths: int, upright: bool) -> None:
    long, side = int(short * aspect), 8 * eighths
    height, width = (long, short) if upright else (short, long)
    working = working_size(height, width, side)
    assert min(working) == side
    assert all(number % 8 == 0 for number in working)
    assert abs(max(working) - long * side / short) <= 4
    assert (working[0] >= working[1]) == upright or working[0] == working[1]


def test_an_image_read_from_a_table_cannot_be_written_to() -> None:
    image = noise(64, 64)
    image.flags.writeable = False
    (result,) = editor(lambda images, seeds: images, side=64).edit([image], PROMPT, [0])
    np.testing.assert_array_equal(pixels(result), image)


def test_an_image_of_the_working_size_is_not_touched() -> None:
    images = [noise(64, 64), noise(64, 128), noise(72, 64)]
    for image, result in zip(images, editor(lambda x, _: x, side=64).edit(images, PROMPT, [0, 1, 2]), strict=True):
        assert np.array_equal(pixels(result), image)


@pytest.mark.parametrize(("height", "width"), [(200, 200), (48, 60), (150, 64)])
def test_resizing_is_that_of_pillow(height: int, width: int) -> None:
    """Pillow's bicubic smooths before it shrinks; it rounds to levels between rows and columns, we do not."""
    seen: list[Tensor] = []
    image = smooth(height, width)
    editor(lambda x, _: (seen.append(x), x)[1], side=64).edit([image], PROMPT, [0])
    given = seen[0][0].permute(1, 2, 0).numpy() * 255
    size = working_size(height, width, 64)
    expected = np.asarray(PIL.Image.fromarray(image).resize(size[::-1], PIL.Image.Resampling.BICUBIC))
    assert np.abs(given - expected).max() < 1.01


@pytest.mark.parametrize(("height", "width"), [(200, 200), (48, 60), (150, 70)])
def test_an_edit_comes_back_to_where_it_was(height: int, width: int) -> None:
    image = smooth(height, width)
    (result,) = editor(lambda x, _: 1 - x, side=64).edit([image], PROMPT, [0])
    assert np.abs(pixels(result).astype(int) - (255 - image.astype(int))).max() <= 6


def test_values_are_clipped_and_rounded() -> None:
    values = torch.tensor([-0.3, 0.4 / 255, 0.6 / 255, 100.5001 / 255, 1.7])
    (result,) = editor(lambda x, _: values[torch.arange(64) % 5].expand_as(x), side=64).edit(
        [noise(64, 64)], PROMPT, [0]
    )
    assert pixels(result)[0, :5, 0].tolist() == [0, 0, 1, 101, 255]


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ((31, 64), "64x31 pixels .* too small .* at least 32 pixels"),
        ((64, 8), "8x64 pixels .* too small"),
        ((33, 133), "133x33 pixels .* too long .* at most 4 times"),
    ],
)
def test_a_hopeless_image_is_refused(size: tuple[int, int], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        editor(lambda x, _: x).edit([noise(64, 64), noise(*size)], PROMPT, [0, 1])
    assert "sources.size" in told(caught)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_pixel_fails_its_image_alone(bad: float) -> None:
    def make(images: Tensor, seeds: Sequence[int]) -> Tensor:
        images = images.clone()
        images[1, 2, 5, 9] = bad
        return images

    images = [noise(64, 64, seed) for seed in range(3)]
    first, second, third = editor(make, side=64, batch_size=3).edit(images, PROMPT, [0, 1, 2])
    assert second == Failed("the teacher gave NaN pixels")
    assert np.array_equal(pixels(first), images[0])
    assert np.array_equal(pixels(third), images[2])


def test_the_familys_reasons_are_kept() -> None:
    teacher = editor(lambda x, seeds: (x, [f"seed {s}" if s % 2 else None for s in seeds]), batch_size=4, side=64)
    first, second = teacher.edit([noise(64, 64), noise(64, 64)], PROMPT, [2, 3])
    assert np.array_equal(pixels(first), noise(64, 64))
    assert second == Failed("seed 3")


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(UserError, match=r"turned \(1, 3, 64, 64\) into \(1, 3, 32, 64\)") as caught:
        editor(lambda x, _: x[:, :, ::2], side=64).edit([noise(64, 64)], PROMPT, [0])
    assert told(caught).startswith("editor.model: arithmetic ")


def test_too_large_batches_are_halved() -> None:
    sizes = []

    def make(images: Tensor, seeds: Sequence[int]) -> Tensor:
        sizes.append(len(seeds))
        if len(seeds) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return images

    images = [noise(64, 64, seed) for seed in range(5)]
    edited = editor(make, side=64, batch_size=5).edit(images, PROMPT, range(5))
    assert sizes == [5, 2, 2, 1]
    assert all(np.array_equal(pixels(a), b) for a, b in zip(edited, images, strict=True))


def test_seeds_make_the_same_noise_wherever_they_stand() -> None:
    first, second = (torch.randn(3, generator=g) for g in generators([5, 2**63 - 1]))
    (again,) = (torch.randn(3, generator=g) for g in generators([2**63 - 1]))
    assert torch.equal(second, again)
    assert not torch.equal(first, second)


# Settings and fingerprints


def test_settings_exclude_what_does_not_go_together() -> None:
    DiffusionSettings(model="m", device="balanced")
    with pytest.raises(ValidationError, match="exclude each other"):
        DiffusionSettings(model="m", device="balanced", cpu_offload="model")
    for wrong in ({"side": 100}, {"side": 32}, {"batch_size": 0}, {"dtype": "int8"}, {"model": ""}, {"steps": 3}):
        with pytest.raises(ValidationError):
            DiffusionSettings(**{"model": "m", **wrong})


def test_the_fingerprint_is_what_changes_pixels(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for folder, text in ((first, "{}"), (second, "{}"), (tmp_path / "c", "[]")):
        folder.mkdir()
        (folder / "model_index.json").write_text(text)
    base = LatentSettings(model=str(first))
    same: list[dict[str, Any]] = [
        {"model": str(second)},
        {"batch_size": 3},
        {"cpu_offload": "model"},
        {"attention_slicing": True},
        {"device": "cpu"},
        {"download": True},
    ]
    other: list[dict[str, Any]] = [
        {"model": str(tmp_path / "c")},
        {"side": 256},
        {"dtype": "bfloat16"},
        {"variant": "fp16"},
        {"vae_tiling": True},
        {"safety_checker": False},
    ]

    def changed(options: dict[str, Any]) -> dict[str, Any]:
        return fingerprint(base.model_copy(update=options))

    assert all(changed(options) == fingerprint(base) for options in same)
    assert len({str(changed(options)) for options in other} | {str(fingerprint(base))}) == len(other) + 1


def test_every_setting_of_a_teacher_has_its_place() -> None:
    """A new setting must be thought about: does it change pixels?"""
    by_content = {"side", "dtype", "variant", "vae_tiling"}
    elsewhere = {"model", "revision", "download", "device", "batch_size", "attention_slicing", "cpu_offload"}
    assert set(DiffusionSettings.model_fields) == by_content | elsewhere


def test_settings_do_not_cost_the_import_of_torch() -> None:
    modules = "farm.editors.stable_diffusion, farm.editors.instruct_pix2pix, farm.editors.weights"
    code = f"import sys, {modules}; assert not {{'torch', 'diffusers', 'huggingface_hub'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# Prompts


@pytest.mark.parametrize("field", ["instruction", "before", "after"])
def test_an_empty_prompt_is_refused(field: Literal["instruction", "before", "after"]) -> None:
    assert prompt_text(PROMPT, field) == getattr(PROMPT, field)
    for empty in ("", " \n"):
        with pytest.raises(UserError, match=f"{field}.* is empty") as caught:
            prompt_text(Prompt(**{**vars(PROMPT), field: empty}), field)
        told(caught)


WORDS = st.lists(st.text("abcdeé9,.'", min_size=1, max_size=9), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def spelling() -> Any:
    return clip_tokenizer()


@settings(max_examples=60, deadline=None)
@given(words=WORDS, limit=st.integers(3, 40))
def test_what_a_too_long_prompt_loses(spelling: Any, words: list[str], limit: int) -> None:
    text = " ".join(words)
    tokens = len(spelling(text).input_ids)
    if tokens <= limit:
        check_prompt_length(spelling, text, limit)
        return
    with pytest.raises(UserError) as caught:
        check_prompt_length(spelling, text, limit, teacher="some/model")
    said = told(caught)
    assert f"has {tokens} tokens and some/model reads {limit}, so " in said
    # Brute force: the words that survive are the longest beginning of the text that fits.
    kept = max(n for n in range(len(words) + 1) if len(spelling(" ".join(words[:n])).input_ids) <= limit)
    assert f"so {' '.join(words[kept:])!r} would be cut off" in said


def test_what_clips_own_vocabulary_cuts_off() -> None:
    data = Path(os.environ.get("FARM_TEST_DATA", Path(__file__).parents[3] / "shared/data"))
    folder = data / "clip_bpe"
    if not folder.is_dir():
        pytest.skip(f"no CLIP vocabulary at {folder}; set FARM_TEST_DATA")
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    assert len(tokenizer) == 49408
    short = " ".join(["zombie"] * 75)
    check_prompt_length(tokenizer, short, 77)
    with pytest.raises(UserError, match=re.escape("so 'in deep Snow, please' would be cut off")):
        check_prompt_length(tokenizer, f"{short} in deep Snow, please", 77)
