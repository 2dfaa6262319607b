from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny_diffusers import stable_diffusion

from e2gan.pairs import Image
from farm.editors.base import Failed, Prompt
from farm.editors.diffusion import fingerprint
from farm.editors.instruct_diffusion import InstructDiffusionSettings, guided, open_editor
from farm.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # the bare scheduler's

PROMPT = Prompt(instruction="turn it into a zombie", before="not read", after="not read either")
STEPS, SEEDS = 4, [11, 7, 5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import StableDiffusionInstructPix2PixPipeline

    root = tmp_path_factory.mktemp("models") / "model"
    return stable_diffusion(root, pipeline=StableDiffusionInstructPix2PixPipeline, unet_in_channels=8)


def settings(folder: Path, **options: Any) -> InstructDiffusionSettings:
    small = {"dtype": "float32", "device": "cpu", "side": 64, "safety_checker": False, "steps": STEPS}
    return InstructDiffusionSettings(model=str(folder), **{**small, **options})


def photos(count: int = 3, height: int = 64, width: int = 64) -> list[Image]:
    small = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    large = torch.nn.functional.interpolate(small, (height, width), mode="bicubic").clamp(0, 1)
    return list((large * 255).round().byte().permute(0, 2, 3, 1).numpy())


def load(folder: Path) -> Any:
    from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionInstructPix2PixPipeline

    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="linspace"
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def levels_apart(image: Image | Failed, expected: np.ndarray[Any, Any]) -> float:
    """The largest difference, in levels of 255, to an image in 0..1."""
    assert not isinstance(image, Failed)
    return float(np.abs(image - expected * 255).max())


@torch.no_grad()
def edit_as_the_authors_do(
    pipeline: Any, photo: Image, instruction: str, seed: int, *, text_scale: float, photo_scale: float
) -> np.ndarray[Any, Any]:
    """One photo by k-diffusion's sampler written out: three separate passes, combined as clean images.

    k-diffusion's denoiser is z - sigma e(z / sqrt(sigma^2 + 1), t); its ancestral Euler steps to sigma_down along the
    line from the clean image and adds noise of sigma_up, so that the variances of the two make that of the next level.
    """

    def embed(text: str) -> torch.Tensor:
        tokens = pipeline.tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
        embedded: torch.Tensor = pipeline.text_encoder(tokens)[0]
        return embedded

    pixels = torch.from_numpy(photo).permute(2, 0, 1)[None] / 127.5 - 1
    source = pipeline.vae.encode(pixels).latent_dist.mode()
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, dim=0)
    levels = ((1 - kept) / kept).sqrt()
    times = np.linspace(999, 0, STEPS)
    log_sigmas = np.interp(times, np.arange(1000), levels.log().numpy())
    sigmas = [*np.exp(log_sigmas), 0.0]

    noise = torch.Generator().manual_seed(seed)
    z = torch.randn(source.shape, generator=noise) * sigmas[0]
    for time, sigma, following in zip(times, sigmas, sigmas[1:], strict=False):

        def clean(shown: torch.Tensor, text: str, z: Any = z, sigma: float = sigma, time: float = time) -> torch.Tensor:
            seen = torch.cat([z / (sigma**2 + 1) ** 0.5, shown], dim=1)
            predicted = pipeline.unet(seen, torch.tensor(time), encoder_hidden_states=embed(text)).sample
            result: torch.Tensor = z - sigma * predicted
            return result

        both, photo_alone, text_alone = (
            clean(source, instruction),
            clean(source, ""),
            clean(torch.zeros_like(source), instruction),
        )
        denoised = (
            0.5 * (photo_alone + text_alone) + text_scale * (both - photo_alone) + photo_scale * (both - text_alone)
        )
        up = min(following, (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5)
        down = (following**2 - up**2) ** 0.5
        z = z + (z - denoised) / sigma * (down - sigma)
        z = z + torch.randn(source.shape, generator=noise) * up
    image = pipeline.vae.decode(z / pipeline.vae.config.scaling_factor).sample[0]
    edited: np.ndarray[Any, Any] = (image / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
    return edited


@pytest.mark.parametrize(("text_scale", "photo_scale"), [(5.0, 1.25), (0.0, 2.0)])
def test_edits_are_those_of_the_authors_formula(folder: Path, text_scale: float, photo_scale: float) -> None:
    editor = open_editor(settings(folder, guidance_scale=text_scale, image_guidance_scale=photo_scale, batch_size=3))
    edited = editor.edit(photos(), PROMPT, SEEDS)
    pipeline = load(folder)
    for image, photo, seed in zip(edited, photos(), SEEDS, strict=True):
        expected = edit_as_the_authors_do(
            pipeline, photo, PROMPT.instruction, seed, text_scale=text_scale, photo_scale=photo_scale
        )
        assert levels_apart(image, expected) <= 1
        assert expected.std() > 0.02


def test_without_guidance_it_is_one_pass_of_instruct_pix2pix(folder: Path) -> None:
    """With both scales at 1/2 only the pass of text and photo has weight."""
    edited = open_editor(settings(folder, guidance_scale=0.5, image_guidance_scale=0.5)).edit(photos(), PROMPT, SEEDS)
    pipeline = load(folder)
    for image, photo, seed in zip(edited, photos(), SEEDS, strict=True):
        expected = pipeline(
            PROMPT.instruction,
            torch.from_numpy(photo).permute(2, 0, 1)[None] / 255,
            guidance_scale=1.0,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).images[0]
        assert levels_apart(image, expected) <= 1


@tries(max_examples=30, deadline=None)
@given(text_scale=st.floats(0, 15), photo_scale=st.floats(0, 15), sigma=st.floats(0.03, 15))
def test_combining_noises_is_combining_clean_images(text_scale: float, photo_scale: float, sigma: float) -> None:
    z, *noises = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    both, photo_alone, text_alone = (z - sigma * noise for noise in noises)
    combined = 0.5 * (photo_alone + text_alone) + text_scale * (both - photo_alone) + photo_scale * (both - text_alone)
    assert torch.allclose(z - sigma * guided(*noises, text_scale, photo_scale), combined)


def test_single_passes_come_out_of_guidance_alone() -> None:
    both, photo_alone, text_alone = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    for scales, expected in (((0.5, 0.5), both), ((-0.5, 0.5), photo_alone), ((0.5, -0.5), text_alone)):
        assert torch.allclose(guided(both, photo_alone, text_alone, *scales), expected, atol=1e-6)


def test_what_decides_an_edit(folder: Path) -> None:
    """Photo, instruction and seed do; the rest of the batch, and the prompt's other fields, do not."""
    first, second, third = photos()
    together = open_editor(settings(folder, batch_size=4)).edit([first, second, first, third], PROMPT, [1, 1, 2, 3])
    editor = open_editor(settings(folder, batch_size=1))
    other_fields = Prompt(instruction=PROMPT.instruction, before="x", after="y")
    alone = editor.edit([first], other_fields, [1])[0]

    def apart(other: Image | Failed) -> int:
        assert not isinstance(alone, Failed)
        assert not isinstance(other, Failed)
        return int(np.abs(alone.astype(int) - other).max())

    assert apart(together[0]) <= 1
    assert apart(together[1]) > 3
    assert apart(together[2]) > 3
    assert apart(editor.edit([first], PROMPT, [1])[0]) == 0
    assert apart(editor.edit([first], Prompt(instruction="a cat", before="", after=""), [1])[0]) > 3


def test_images_of_any_size_come_back_as_they_were(folder: Path) -> None:
    sizes = [(64, 100), (90, 50), (64, 64)]
    images = [photos(1, *size)[0] for size in sizes]
    edited = open_editor(settings(folder, dtype="bfloat16")).edit(images, PROMPT, SEEDS)
    for image, size in zip(edited, sizes, strict=True):
        assert not isinstance(image, Failed)
        assert image.shape == (*size, 3)
        assert image.std() > 2


def test_what_the_safety_checker_flags_is_no_edit(tmp_path: Path) -> None:
    from diffusers import StableDiffusionInstructPix2PixPipeline

    flagging = stable_diffusion(
        tmp_path / "model",
        pipeline=StableDiffusionInstructPix2PixPipeline,
        unet_in_channels=8,
        safety_checker=True,
        flags=True,
    )
    editor = open_editor(settings(flagging, safety_checker=True))
    assert editor.edit(photos(1), PROMPT, [1]) == [Failed("the safety checker blanked it")]


def test_text_to_image_models_are_refused(tmp_path: Path) -> None:
    plain = stable_diffusion(tmp_path / "plain")
    with pytest.raises(UserError, match="UNet of 4 input channels") as caught:
        open_editor(settings(plain))
    text = str(caught.value)
    assert str(plain) in text
    assert "\n" not in text
    assert text.endswith(".")


def test_a_model_must_be_named() -> None:
    with pytest.raises(ValidationError, match=r"model\n.*Field required"):
        InstructDiffusionSettings()  # type: ignore[call-arg]
    plain = InstructDiffusionSettings(model="somewhere")
    assert (plain.steps, plain.guidance_scale, plain.image_guidance_scale) == (100, 5.0, 1.25)


def test_the_fingerprint_follows_guidance(folder: Path) -> None:
    first = fingerprint(settings(folder))
    assert fingerprint(settings(folder, batch_size=3)) == first
    assert fingerprint(settings(folder, image_guidance_scale=1.5)) != first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", [{}, {"cpu_offload": "model"}, {"cpu_offload": "sequential"}])
def test_on_a_gpu(folder: Path, options: dict[str, Any]) -> None:
    expected = open_editor(settings(folder)).edit(photos(), PROMPT, SEEDS)
    edited = open_editor(settings(folder, **{"device": "cuda", **options})).edit(photos(), PROMPT, SEEDS)
    for image, other in zip(edited, expected, strict=True):
        assert not isinstance(other, Failed)
        assert levels_apart(image, other / 255) < 20
