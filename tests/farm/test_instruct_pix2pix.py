from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_diffusers
import torch
from edits import apart, noise, pixels
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from e2gan.pairs import Image
from farm.editors.base import Failed, Prompt
from farm.editors.instruct_pix2pix import InstructPix2PixFamily, InstructPix2PixSettings, open_editor
from farm.editors.loading import without_deprecations
from farm.errors import UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import StableDiffusionInstructPix2PixPipeline

    return tiny_diffusers.stable_diffusion(
        tmp_path_factory.mktemp("models") / "ip2p",
        pipeline=StableDiffusionInstructPix2PixPipeline,
        unet_in_channels=8,
        safety_checker=True,
    )


def chosen(folder: Path, **options: Any) -> InstructPix2PixSettings:
    cheap = {"dtype": "float32", "device": "cpu", "side": 64, "steps": 4}
    return InstructPix2PixSettings(model=str(folder), **{**cheap, **options})


def prompt(text: str) -> Prompt:
    return Prompt(instruction=text, before="not read", after="not read")


IMAGES = [noise(64, 64, 1), noise(64, 96, 2), noise(64, 64, 3), noise(64, 64, 4)]
SEEDS = [11, 12, 2**63 - 1, 0]


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 4, "image_guidance_scale": 1.2, "negative_prompt": "fog"}])
def test_it_is_the_bare_pipeline(saved: Path, options: dict[str, Any]) -> None:
    """One photo after another, as pixels, with the scheduler of the authors' sampler."""
    from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionInstructPix2PixPipeline

    bare = StableDiffusionInstructPix2PixPipeline.from_pretrained(saved, use_safetensors=True, local_files_only=True)
    bare.set_progress_bar_config(disable=True)
    edited = pixels(open_editor(chosen(saved, batch_size=3, **options)).edit(IMAGES, prompt("make it snow"), SEEDS))
    with without_deprecations():
        bare.scheduler = EulerAncestralDiscreteScheduler(**tiny_diffusers.NOISE_SCHEDULE)
        for image, seed, result in zip(IMAGES, SEEDS, edited, strict=True):
            expected = bare(
                "make it snow",
                image=torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255,
                num_inference_steps=4,
                generator=torch.Generator().manual_seed(seed),
                output_type="np",
                **{"guidance_scale": 7.5, "image_guidance_scale": 1.5, **options},
            ).images[0]
            assert apart(result, np.rint(expected * 255).astype(np.uint8)) <= 1
            assert apart(result, image) > 50


@pytest.fixture(scope="module")
def reference(saved: Path) -> tuple[Path, list[Image]]:
    return saved, pixels(open_editor(chosen(saved)).edit(IMAGES, prompt("make it snow"), SEEDS))


@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(4)), count=st.integers(1, 4), batch_size=st.sampled_from([1, 2, 4]))
def test_the_noise_of_every_step_is_the_images_own(
    reference: tuple[Path, list[Image]], order: list[int], count: int, batch_size: int
) -> None:
    folder, expected = reference
    picked = order[:count]
    editor = open_editor(chosen(folder, batch_size=batch_size))
    torch.manual_seed(count)  # PyTorch's own generator has no part in it
    edited = editor.edit([IMAGES[i] for i in picked], prompt("make it snow"), [SEEDS[i] for i in picked])
    for index, result in zip(picked, pixels(edited), strict=True):
        assert apart(result, expected[index]) <= 1
        if batch_size == 1:
            assert np.array_equal(result, expected[index])


def test_everything_that_should_matter_does(reference: tuple[Path, list[Image]]) -> None:
    folder, expected = reference

    def edit(text: str = "make it snow", image: Image = IMAGES[0], seed: int = SEEDS[0], **options: Any) -> Image:
        return pixels(open_editor(chosen(folder, **options)).edit([image], prompt(text), [seed]))[0]

    others = [
        edit(text="a desert"),
        edit(image=IMAGES[2]),
        edit(seed=2),
        edit(steps=7),
        edit(guidance_scale=2),
        edit(image_guidance_scale=4),
        edit(negative_prompt="a desert"),
    ]
    assert all(apart(expected[0], other) > 4 for other in others)


def test_the_scheduler_is_ancestral_whatever_the_folder_says(saved: Path) -> None:
    from diffusers import EulerAncestralDiscreteScheduler

    scheduler = InstructPix2PixFamily(chosen(saved))._model.pipeline.scheduler
    assert isinstance(scheduler, EulerAncestralDiscreteScheduler)
    assert {key: scheduler.config[key] for key in tiny_diffusers.NOISE_SCHEDULE} == tiny_diffusers.NOISE_SCHEDULE


def test_what_the_safety_checker_blanks_is_no_edit(tmp_path: Path) -> None:
    folder = tiny_diffusers.stable_diffusion(tmp_path, unet_in_channels=8, safety_checker=True, flags=True)
    edited = open_editor(chosen(folder)).edit(IMAGES[:2], prompt("make it snow"), SEEDS[:2])
    assert edited == [Failed("the safety checker blanked it")] * 2


def test_a_text_to_image_model_is_another_family(tmp_path: Path) -> None:
    folder = tiny_diffusers.stable_diffusion(tmp_path)
    with pytest.raises(UserError, match=r"UNet of 4 input channels \(text to image\).* wants one of 8") as caught:
        open_editor(chosen(folder, safety_checker=False))
    assert str(caught.value).startswith(f"editor.model: {folder} ")


@pytest.mark.parametrize(("text", "says"), [("", "instruction is empty"), ("snow " * 40, "would be cut off")])
def test_prompts_that_cannot_be_read(saved: Path, text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        open_editor(chosen(saved)).edit(IMAGES, prompt(text), SEEDS)


def test_settings() -> None:
    found = InstructPix2PixSettings()
    assert (found.model, found.steps) == ("timbrooks/instruct-pix2pix", 100)
    for wrong in ({"guidance_scale": 0.9}, {"image_guidance_scale": 0.9}, {"steps": 0}, {"strength": 0.5}):
        with pytest.raises(ValidationError):
            InstructPix2PixSettings(**wrong)
