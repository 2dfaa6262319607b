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
from farm.editors import latent
from farm.editors.base import Failed, Prompt
from farm.editors.diffusion import DiffusionEditor
from farm.editors.latent import LatentDiffusion
from farm.editors.stable_diffusion import StableDiffusionFamily, StableDiffusionSettings, open_editor
from farm.errors import UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_diffusers.stable_diffusion(tmp_path_factory.mktemp("models") / "sd", safety_checker=True)


@pytest.fixture(scope="module")
def bare(saved: Path) -> Any:
    """The pipeline as anyone would use it."""
    from diffusers import StableDiffusionImg2ImgPipeline

    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(saved, use_safetensors=True, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def chosen(folder: Path, **options: Any) -> StableDiffusionSettings:
    cheap = {"dtype": "float32", "device": "cpu", "side": 64, "steps": 5}
    return StableDiffusionSettings(model=str(folder), **{**cheap, **options})


def prompt(text: str) -> Prompt:
    return Prompt(instruction="not read", before="not read", after=text)


def levels(image: torch.Tensor) -> Image:
    """`[3, h, w]` in 0..1 as an image."""
    return (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


def tensor(image: Image) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255


IMAGES = [noise(64, 64, 1), noise(64, 96, 2), noise(64, 64, 3), noise(64, 64, 4), noise(64, 96, 5)]
SEEDS = [11, 12, 13, 2**63 - 1, 0]


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 3, "negative_prompt": "a blur"}, {"guidance_scale": 1}])
def test_it_is_the_bare_pipeline(saved: Path, bare: Any, options: dict[str, Any]) -> None:
    """One image after another, from texts and from latents that the bare VAE makes."""
    edited = pixels(open_editor(chosen(saved, batch_size=4, **options)).edit(IMAGES, prompt("a zombie"), SEEDS))
    for image, seed, result in zip(IMAGES, SEEDS, edited, strict=True):
        with torch.no_grad():
            mode = bare.vae.encode(tensor(image) * 2 - 1).latent_dist.mode() * bare.vae.config.scaling_factor
        expected = bare(
            "a zombie",
            image=mode,
            strength=0.6,
            num_inference_steps=5,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
            **{"guidance_scale": 7.5, **options},
        ).images[0]
        assert apart(result, levels(expected)) <= 1
        assert apart(result, image) > 50


def test_hardly_any_strength_gives_back_what_the_vae_keeps(saved: Path, bare: Any) -> None:
    """Five training steps of noise of a thousand, which one step of the sampler takes away."""
    edited = pixels(
        open_editor(chosen(saved, strength=0.005, steps=200, guidance_scale=1)).edit(IMAGES, prompt("a zombie"), SEEDS)
    )
    for image, result in zip(IMAGES, edited, strict=True):
        with torch.no_grad():
            kept = bare.vae(tensor(image) * 2 - 1, sample_posterior=False).sample
        difference = result.astype(float) - levels((kept[0] / 2 + 0.5).clamp(0, 1))
        assert np.abs(difference).mean() < 5  # between two of the images it is over 20


@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(5)), count=st.integers(1, 5), batch_size=st.sampled_from([1, 2, 4]))
def test_an_edit_depends_on_its_image_and_seed_alone(
    reference: tuple[Path, list[Image]], order: list[int], count: int, batch_size: int
) -> None:
    folder, expected = reference
    picked = order[:count]
    editor = open_editor(chosen(folder, batch_size=batch_size))
    edited = editor.edit([IMAGES[i] for i in picked], prompt("a zombie"), [SEEDS[i] for i in picked])
    for index, result in zip(picked, pixels(edited), strict=True):
        assert apart(result, expected[index]) <= 1
        if batch_size == 1:
            assert np.array_equal(result, expected[index])


@pytest.fixture(scope="module")
def reference(saved: Path) -> tuple[Path, list[Image]]:
    return saved, pixels(open_editor(chosen(saved)).edit(IMAGES, prompt("a zombie"), SEEDS))


def test_everything_that_should_matter_does(saved: Path) -> None:
    def edit(text: str = "a zombie", image: Image = IMAGES[0], seed: int = 1, **options: Any) -> Image:
        return pixels(open_editor(chosen(saved, **options)).edit([image], prompt(text), [seed]))[0]

    first = edit()
    assert np.array_equal(edit(), first)
    others = [
        edit(text="a winter"),
        edit(image=IMAGES[2]),
        edit(seed=2),
        edit(strength=0.9),
        edit(steps=9),
        edit(guidance_scale=2),
        edit(negative_prompt="a winter"),
        edit(side=128),
    ]
    assert all(apart(first, other) > 4 for other in others)


def test_a_caption_for_the_next_concept_does_not_encode_the_sources_again(saved: Path) -> None:
    family = StableDiffusionFamily(chosen(saved))
    editor = DiffusionEditor(chosen(saved), family)
    vae, encoder = family._model.pipeline.vae, family._model.pipeline.text_encoder
    encoded, read = [], []
    encode = vae.encode
    vae.encode = lambda images: (encoded.append(len(images)), encode(images))[1]
    encoder.register_forward_hook(lambda *_: read.append(1))
    editor.edit(IMAGES, prompt("a zombie"), SEEDS)
    assert (sum(encoded), len(read)) == (5, 2)  # the caption and the empty text
    second = editor.edit(IMAGES, prompt("a winter"), SEEDS)
    assert (sum(encoded), len(read)) == (5, 3)
    fresh = open_editor(chosen(saved)).edit(IMAGES, prompt("a winter"), SEEDS)
    assert all(np.array_equal(a, b) for a, b in zip(second, fresh, strict=True))


# The parts that other families share


@pytest.fixture(scope="module")
def parts(saved: Path) -> LatentDiffusion:
    return StableDiffusionFamily(chosen(saved))._model


@pytest.mark.parametrize("text", ["", "a zombie", "Ein Bild, 9 x"])
def test_a_text_is_embedded_as_the_pipeline_does(parts: LatentDiffusion, bare: Any, text: str) -> None:
    with torch.no_grad():
        expected, _ = bare.encode_prompt(text, "cpu", 1, False)
    assert parts.embed(text).shape == (1, 77, tiny_diffusers.TEXT_WIDTH)
    assert torch.equal(parts.embed(text), expected)


def test_latents_are_the_mode_and_decode_to_what_the_vae_makes(parts: LatentDiffusion, bare: Any) -> None:
    images = torch.cat([tensor(IMAGES[0]), tensor(IMAGES[2])])
    with torch.no_grad():
        mode = bare.vae.encode(images * 2 - 1).latent_dist.mode()
        decoded = bare.vae.decode(mode).sample
    factor = bare.vae.config.scaling_factor
    for _ in range(2):  # made, then kept
        assert torch.allclose(parts.encode(images, scaled=False), mode, atol=1e-5)
        assert torch.allclose(parts.encode(images), mode * factor, atol=1e-5)
    assert torch.allclose(parts.decode(mode * factor), (decoded / 2 + 0.5).clamp(0, 1), atol=1e-5)


def test_what_is_kept_is_bounded(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent, "KEPT_LATENTS", 2)
    monkeypatch.setattr(latent, "KEPT_TEXTS", 2)
    model = StableDiffusionFamily(chosen(saved))._model
    encoded: list[int] = []
    encode = model.pipeline.vae.encode
    model.pipeline.vae.encode = lambda images: (encoded.append(1), encode(images))[1]
    for index in (0, 2, 0, 3, 0, 2):  # the least recently used one, the third image, makes room for the fourth
        model.encode(tensor(IMAGES[index]))
        model.embed(f"image {index}")
    assert len(encoded) == 4
    assert len(model._latents) == len(model._texts) == 2


def test_two_images_of_the_same_bytes_but_not_the_same_shape(parts: LatentDiffusion) -> None:
    flat = torch.zeros(1, 3, 64, 128)
    assert parts.encode(flat).shape == (1, 4, 8, 16)
    assert parts.encode(flat.reshape(1, 3, 128, 64)).shape == (1, 4, 16, 8)


# The safety checker


def test_what_the_safety_checker_blanks_is_no_edit(tmp_path: Path) -> None:
    folder = tiny_diffusers.stable_diffusion(tmp_path, safety_checker=True, flags=True)
    edited = open_editor(chosen(folder, batch_size=2)).edit(IMAGES, prompt("a zombie"), SEEDS)
    assert edited == [Failed("the safety checker blanked it")] * 5
    unchecked = open_editor(chosen(folder, safety_checker=False)).edit(IMAGES[:1], prompt("a zombie"), SEEDS[:1])
    assert pixels(unchecked)[0].std() > 10


def test_the_safety_checker_sees_what_the_pipeline_shows_it(parts: LatentDiffusion, bare: Any) -> None:
    """Thresholds between two images' scores: one is flagged, and the same one by the pipeline itself."""
    images = torch.cat([torch.zeros(1, 3, 64, 64), tensor(IMAGES[0])])
    for model in (parts.pipeline, bare):
        checker = model.safety_checker
        inputs = model.feature_extractor(list((images * 255).to(torch.uint8)), return_tensors="pt").pixel_values
        with torch.no_grad():
            seen = checker.visual_projection(checker.vision_model(inputs)[1])
            cosines = torch.nn.functional.cosine_similarity(seen[:, None], checker.concept_embeds[None], dim=-1)
        between = torch.full_like(checker.concept_embeds_weights, 2)
        concept = int((cosines[0] - cosines[1]).abs().argmax())
        between[concept] = cosines[:, concept].mean()
        checker.concept_embeds_weights.data.copy_(between)
    _, flagged = bare.run_safety_checker(images * 2 - 1, "cpu", torch.float32)
    assert sorted(flagged) == [False, True]
    assert [reason is not None for reason in parts.check_safety(images)] == flagged
    parts.pipeline.safety_checker.concept_embeds_weights.data.fill_(2)
    bare.safety_checker.concept_embeds_weights.data.fill_(2)


def test_a_model_without_a_safety_checker(tmp_path: Path) -> None:
    folder = tiny_diffusers.stable_diffusion(tmp_path)
    with pytest.raises(UserError, match=r"without a safety checker; .* editor.safety_checker: false\.") as caught:
        open_editor(chosen(folder))
    assert str(folder) in str(caught.value)
    assert pixels(open_editor(chosen(folder, safety_checker=False)).edit(IMAGES[:1], prompt("a zombie"), [1]))


# What is refused


@pytest.mark.parametrize(("text", "says"), [(" ", "caption 'after' is empty"), ("winter " * 30, "would be cut off")])
def test_prompts_that_cannot_be_read(saved: Path, text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        open_editor(chosen(saved)).edit(IMAGES, prompt(text), SEEDS)


@pytest.mark.parametrize(("channels", "task"), [(8, "editing by instruction"), (9, "inpainting")])
def test_another_tasks_unet(tmp_path: Path, channels: int, task: str) -> None:
    folder = tiny_diffusers.stable_diffusion(tmp_path, unet_in_channels=channels)
    with pytest.raises(UserError, match=rf"UNet of {channels} input channels \({task}\).* wants one of 4"):
        open_editor(chosen(folder, safety_checker=False))


def test_settings() -> None:
    assert StableDiffusionSettings().model == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert StableDiffusionSettings().safety_checker
    for wrong in ({"strength": 0}, {"strength": 1.1}, {"strength": 0.1, "steps": 9}, {"guidance_scale": 0.5}):
        with pytest.raises(ValidationError):
            StableDiffusionSettings(**wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "options", [{}, {"cpu_offload": "model"}, {"cpu_offload": "sequential"}, {"device": "balanced"}]
)
def test_on_a_gpu(reference: tuple[Path, list[Image]], options: dict[str, Any]) -> None:
    folder, expected = reference
    editor = open_editor(chosen(folder, **{"device": "cuda", **options}))
    edited = pixels(editor.edit(IMAGES, prompt("a zombie"), SEEDS))
    for result, other in zip(edited, expected, strict=True):
        assert np.abs(result.astype(float) - other).mean() < 1
