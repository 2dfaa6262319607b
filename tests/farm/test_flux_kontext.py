from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edits import one_sentence, without
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_diffusers import stable_diffusion
from tiny_transformers import flux_kontext, qwen_image_edit

from e2gan.pairs import Image
from farm.editors.base import Prompt
from farm.editors.diffusion import DiffusionSettings, load_pipeline
from farm.editors.flux_kontext import FluxKontextFamily, FluxKontextSettings, open_editor
from farm.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flux_kontext(tmp_path_factory.mktemp("models") / "kontext")


@pytest.fixture(scope="module")
def bare(folder: Path) -> Any:
    """The pipeline as diffusers gives it."""
    from diffusers import FluxKontextPipeline

    pipeline = FluxKontextPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny(folder: Path, **changes: Any) -> FluxKontextSettings:
    return FluxKontextSettings(
        **{"model": str(folder), "dtype": "float32", "device": "cpu", "side": 64, "steps": 2, **changes}
    )


def prompt(instruction: str) -> Prompt:
    return Prompt(instruction=instruction, before="a face", after="a blue face")


def photo(height: int, width: int, seed: int = 0) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def by_the_pipeline(bare: Any, image: Image, text: str, seed: int, **changes: Any) -> Image:
    """What diffusers makes of a photo whose sides are multiples of 16, told to leave its size alone."""
    import PIL.Image

    height, width = image.shape[:2]
    return bare(
        image=PIL.Image.fromarray(image),
        prompt=text,
        height=height,
        width=width,
        max_area=height * width,
        _auto_resize=False,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
        **{"guidance_scale": 2.5, **changes},
    ).images[0]


def difference(one: Image, other: Image) -> float:
    """The largest, in levels of 255."""
    return float(np.abs(one.astype(float) - other.astype(float)).max())


def test_an_edit_is_the_pipelines(folder: Path, bare: Any) -> None:
    image = photo(64, 96)
    for changes in ({}, {"guidance_scale": 9.0}):
        (edited,) = open_editor(tiny(folder, **changes)).edit([image], prompt("make it blue"), [7])
        assert difference(edited, by_the_pipeline(bare, image, "make it blue", 7, **changes) * 255) < 1


@settings(max_examples=8, deadline=None)
@given(height=st.sampled_from(range(64, 112, 8)), width=st.sampled_from(range(64, 112, 8)))
def test_sides_are_reflected_to_what_the_model_takes_and_cut_back(
    folder: Path, bare: Any, height: int, width: int
) -> None:
    image = photo(height, width)
    family = FluxKontextFamily(tiny(folder))
    edited, reasons = family.edit(torch.from_numpy(image).permute(2, 0, 1)[None] / 255, prompt("make it blue"), [7])
    padded = np.pad(image, ((0, -height % 16), (0, -width % 16), (0, 0)), mode="reflect")
    expected = by_the_pipeline(bare, padded, "make it blue", 7)[:height, :width]
    assert edited.dtype == torch.float32
    assert edited.shape == (1, 3, height, width)
    assert difference(edited[0].permute(1, 2, 0).numpy() * 255, expected * 255) < 1
    assert reasons == [None]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_edit_does_not_depend_on_what_is_edited_with_it(folder: Path, dtype: str) -> None:
    editor = open_editor(tiny(folder, dtype=dtype, batch_size=3))
    images, seeds = [photo(64, 64, seed) for seed in range(3)], [11, 12, 13]
    together = editor.edit(images, prompt("make it blue"), seeds)
    reversed_ = editor.edit(images[::-1], prompt("make it blue"), seeds[::-1])[::-1]
    for image, seed, one, other in zip(images, seeds, together, reversed_, strict=True):
        (alone,) = editor.edit([image], prompt("make it blue"), [seed])
        assert np.array_equal(alone, one)
        assert np.array_equal(alone, other)


def test_any_size_comes_back_and_photo_instruction_and_seed_show(folder: Path) -> None:
    editor = open_editor(tiny(folder))
    images = [photo(40, 65), photo(72, 40), photo(64, 64), photo(200, 120)]
    edited = editor.edit(images, prompt("make it blue"), [1, 2, 3, 4])
    assert [one.shape for one in edited] == [one.shape for one in images]
    (again,) = editor.edit(images[:1], prompt("make it blue"), [1])
    assert difference(again, edited[0]) == 0
    for changed in (
        editor.edit([photo(40, 65, seed=1)], prompt("make it blue"), [1]),
        editor.edit(images[:1], prompt("a zombie"), [1]),
        editor.edit(images[:1], prompt("make it blue"), [2]),
    ):
        assert difference(changed[0], edited[0]) > 1


def test_an_instruction_is_read_once(folder: Path) -> None:
    family = FluxKontextFamily(tiny(folder))
    read = []
    family._pipeline.text_encoder_2.register_forward_hook(lambda *_: read.append(1))
    images = torch.rand(1, 3, 64, 64)
    first, second, again = (
        family.edit(images, prompt(text), [1])[0] for text in ("make it blue", "a zombie", "make it blue")
    )
    assert len(read) == 2
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert torch.equal(second, FluxKontextFamily(tiny(folder)).edit(images, prompt("a zombie"), [1])[0])


def test_slices_and_tiles_change_nothing_to_speak_of(folder: Path) -> None:
    image = photo(64, 64)
    (plain,) = open_editor(tiny(folder)).edit([image], prompt("make it blue"), [1])
    frugal = open_editor(tiny(folder, attention_slicing=True, vae_tiling=True))
    assert difference(frugal.edit([image], prompt("make it blue"), [1])[0], plain) <= 1


def test_a_longer_instruction_than_is_read_is_refused(folder: Path) -> None:
    """The tiny tokenizer counts letters, words and an end."""
    editor = open_editor(tiny(folder, max_sequence_length=16))
    editor.edit([photo(64, 64)], prompt("make it bluest"), [1])
    with pytest.raises(UserError, match=r"has 23 tokens and .* reads 16, so 'of all' would be cut") as caught:
        editor.edit([photo(64, 64)], prompt("make it bluest of all"), [1])
    one_sentence(caught.value)
    with pytest.raises(UserError, match="instruction is empty") as caught:
        editor.edit([photo(64, 64)], prompt(" "), [1])
    one_sentence(caught.value)


def test_models_of_other_families_are_refused(folder: Path, bare: Any, tmp_path: Path) -> None:
    from diffusers import FluxPipeline, StableDiffusionImg2ImgPipeline

    FluxPipeline(**bare.components).save_pretrained(tmp_path / "dev")  # the same parts, not trained to edit
    others = {
        "FluxPipeline": tmp_path / "dev",
        "StableDiffusionPipeline": stable_diffusion(tmp_path / "sd"),
        "QwenImageEditPlusPipeline": qwen_image_edit(tmp_path / "qwen"),
    }
    for name, other in others.items():
        with pytest.raises(UserError, match=f"is a {name}.*wants a FluxKontextPipeline") as caught:
            open_editor(tiny(other))
        one_sentence(caught.value)
        assert str(other) in str(caught.value)
    with pytest.raises(UserError, match="is a FluxKontextPipeline") as caught:
        load_pipeline(StableDiffusionImg2ImgPipeline, DiffusionSettings(model=str(folder), device="cpu"))
    one_sentence(caught.value)


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2", "text_encoder_2", "transformer", "model_index.json"])
def test_a_folder_with_a_part_missing_is_refused(folder: Path, tmp_path: Path, part: str) -> None:
    copy = without(folder, tmp_path / "copy", part)
    with pytest.raises(UserError, match=part) as caught:
        open_editor(tiny(copy))
    one_sentence(caught.value)
    assert str(copy) in str(caught.value)
