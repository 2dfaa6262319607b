from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_diffusers
import tiny_transformers
import torch
from edits import apart, noise, pixels
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

import farm.editors
from e2gan.pairs import Image
from farm.editors.base import Prompt
from farm.editors.loading import without_deprecations
from farm.editors.stable_diffusion_xl import StableDiffusionXLFamily, StableDiffusionXLSettings, open_editor
from farm.errors import UserError

POOLED = 24
"""Width of what the tiny second text encoder makes of a whole text."""

SIZES = 8
"""Width of each of the six numbers, image sizes and crops, that the tiny UNet is told."""


def second_text_model(seed: int = 0) -> Any:
    """A CLIPTextModelWithProjection of two layers that fits `tiny_diffusers.clip_tokenizer`."""
    from transformers import CLIPTextModelWithProjection

    config = tiny_diffusers.clip_text_model().config
    config.projection_dim = POOLED
    torch.manual_seed(seed)
    return CLIPTextModelWithProjection(config).eval()


def second_tokenizer() -> Any:
    """As SDXL's: it fills up with exclamation marks."""
    tokenizer = tiny_diffusers.clip_tokenizer()
    tokenizer.pad_token = "!"
    return tokenizer


def unet(*, in_channels: int = 4, seed: int = 0) -> Any:
    """A UNet2DConditionModel of SDXL's kind, with cross-attention below the first level."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    model = UNet2DConditionModel(
        in_channels=in_channels,
        out_channels=4,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=(1, 2),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=2 * tiny_diffusers.TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZES,
        projection_class_embeddings_input_dim=POOLED + 6 * SIZES,
    )
    return tiny_transformers.attentive(model)


def stable_diffusion_xl(folder: Path, **components: Any) -> Path:
    """Save a StableDiffusionXLPipeline folder, as the hub has them, and return it."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    parts = {
        "vae": tiny_diffusers.autoencoder(),
        "text_encoder": tiny_diffusers.clip_text_model(seed=1),
        "text_encoder_2": second_text_model(seed=2),
        "tokenizer": tiny_diffusers.clip_tokenizer(),
        "tokenizer_2": second_tokenizer(),
        "unet": unet(seed=3),
        "scheduler": EulerDiscreteScheduler(**tiny_diffusers.NOISE_SCHEDULE, timestep_spacing="leading"),
    }
    StableDiffusionXLPipeline(**{**parts, **components}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion_xl(tmp_path_factory.mktemp("models") / "sdxl")


def bare(folder: Path) -> Any:
    """The pipeline as anyone would use it."""
    from diffusers import StableDiffusionXLImg2ImgPipeline

    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def chosen(folder: Path, **options: Any) -> StableDiffusionXLSettings:
    cheap = {"dtype": "float32", "device": "cpu", "side": 64, "steps": 5}
    return StableDiffusionXLSettings(model=str(folder), **{**cheap, **options})


def prompt(text: str) -> Prompt:
    return Prompt(instruction="not read", before="not read", after=text)


def tensor(image: Image) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255


@without_deprecations()
def made(family: StableDiffusionXLFamily, images: torch.Tensor, text: str) -> torch.Tensor:
    edited, reasons = family.edit(images, prompt(text), range(len(images)))
    assert reasons == [None] * len(images)
    return edited


def one_sentence(error: UserError) -> None:
    assert "\n" not in str(error)
    assert str(error).endswith(".")


IMAGES = [noise(64, 64, 1), noise(64, 96, 2), noise(64, 64, 3), noise(64, 64, 4), noise(72, 64, 5)]
SEEDS = [11, 12, 13, 2**63 - 1, 0]


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"guidance_scale": 3, "negative_prompt": "a blur", "strength": 0.9}, {"guidance_scale": 1}]
)
def test_it_is_the_bare_pipeline(tmp_path: Path, options: dict[str, Any], zeros: bool) -> None:
    """One photo after another, as pixels and texts; zeros: what the model wants for no negative prompt."""
    folder = stable_diffusion_xl(tmp_path, force_zeros_for_empty_prompt=zeros)
    pipeline = bare(folder)
    images = [noise(64, 64, 1), noise(64, 96, 2), noise(64, 64, 3)]
    edited = pixels(open_editor(chosen(folder, batch_size=4, **options)).edit(images, prompt("a zombie"), SEEDS[:3]))
    for image, seed, result in zip(images, SEEDS, edited, strict=False):
        with without_deprecations():
            expected = pipeline(
                "a zombie",
                image=tensor(image),
                num_inference_steps=5,
                generator=torch.Generator().manual_seed(seed),
                output_type="np",
                **{"strength": 0.6, "guidance_scale": 5.0, **options},
            ).images[0]
        assert apart(result, np.rint(expected * 255).astype(np.uint8)) <= 1
        assert apart(result, image) > 50


@pytest.fixture(scope="module")
def reference(saved: Path) -> tuple[Path, list[Image]]:
    return saved, pixels(open_editor(chosen(saved)).edit(IMAGES, prompt("a zombie"), SEEDS))


@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(5)), count=st.integers(1, 5), batch_size=st.sampled_from([1, 2, 4]))
def test_an_edit_depends_on_its_image_and_seed_alone(
    reference: tuple[Path, list[Image]], order: list[int], count: int, batch_size: int
) -> None:
    folder, expected = reference
    picked = order[:count]
    editor = open_editor(chosen(folder, batch_size=batch_size))
    torch.manual_seed(count)  # PyTorch's own generator has no part in it
    edited = editor.edit([IMAGES[i] for i in picked], prompt("a zombie"), [SEEDS[i] for i in picked])
    for index, result in zip(picked, pixels(edited), strict=True):
        assert apart(result, expected[index]) <= 1
        if batch_size == 1:
            assert np.array_equal(result, expected[index])


def test_the_noise_of_every_step_is_the_images_own(tmp_path: Path) -> None:
    from diffusers import EulerAncestralDiscreteScheduler

    with without_deprecations():
        scheduler = EulerAncestralDiscreteScheduler(**tiny_diffusers.NOISE_SCHEDULE)
    folder = stable_diffusion_xl(tmp_path, scheduler=scheduler)
    images, seeds = [IMAGES[0], IMAGES[2]], SEEDS[:2]
    together = pixels(open_editor(chosen(folder, batch_size=2)).edit(images, prompt("a zombie"), seeds))
    for image, seed, result in zip(images, seeds, together, strict=True):
        alone = pixels(open_editor(chosen(folder)).edit([image], prompt("a zombie"), [seed]))[0]
        assert apart(result, alone) <= 1


def test_everything_that_should_matter_does(reference: tuple[Path, list[Image]]) -> None:
    folder, expected = reference

    def edit(text: str = "a zombie", image: Image = IMAGES[0], seed: int = SEEDS[0], **options: Any) -> Image:
        return pixels(open_editor(chosen(folder, **options)).edit([image], prompt(text), [seed]))[0]

    assert np.array_equal(edit(), expected[0])
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
    assert all(apart(expected[0], other) > 4 for other in others)


def test_a_caption_is_read_once(saved: Path) -> None:
    family = StableDiffusionXLFamily(chosen(saved, negative_prompt="a blur"))
    read: list[str] = []
    for name in ("text_encoder", "text_encoder_2"):
        getattr(family._pipeline, name).register_forward_hook(lambda *_, name=name: read.append(name))
    images = torch.cat([tensor(IMAGES[0]), tensor(IMAGES[2])])
    first, second, again = (made(family, images, text) for text in ("a zombie", "a winter", "a zombie"))
    assert len(read) == 2 * 4  # of each encoder: two captions, and the negative prompt with each
    assert torch.equal(first, again)
    fresh = StableDiffusionXLFamily(chosen(saved, negative_prompt="a blur"))
    assert torch.equal(second, made(fresh, images, "a winter"))


def test_both_text_encoders_and_the_pooled_embedding_show(saved: Path) -> None:
    family = StableDiffusionXLFamily(chosen(saved))
    image = tensor(IMAGES[0])
    plain = made(family, image, "a zombie")
    width = tiny_diffusers.TEXT_WIDTH
    texts, others = (family._embeddings(text) for text in ("a zombie", "a winter"))
    kept = {name: value.clone() for name, value in texts.items()}
    for name, part in (
        ("prompt_embeds", np.s_[..., :width]),
        ("prompt_embeds", np.s_[..., width:]),
        ("pooled_prompt_embeds", np.s_[:]),
    ):
        texts[name][part] = others[name][part]
        assert (made(family, image, "a zombie") - plain).abs().max() > 1 / 255
        texts[name].copy_(kept[name])


def test_half_precision_is_finite_silent_and_close(reference: tuple[Path, list[Image]]) -> None:
    """The VAE computes in float32 for it, every time."""
    folder, expected = reference
    editor = open_editor(chosen(folder, dtype="float16"))
    for _ in range(2):
        edited = pixels(editor.edit(IMAGES[:2], prompt("a zombie"), SEEDS[:2]))
        for result, exact in zip(edited, expected, strict=False):
            assert np.abs(result.astype(float) - exact).mean() < 3


def test_no_watermark_even_where_its_package_is_installed(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl_img2img as module

    monkeypatch.setattr(module, "is_invisible_watermark_available", lambda: True)
    monkeypatch.setattr(module, "StableDiffusionXLWatermarker", lambda: "a watermark", raising=False)
    assert bare(saved).watermark == "a watermark"
    assert StableDiffusionXLFamily(chosen(saved))._pipeline.watermark is None


def test_models_of_other_families_are_refused(tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLImg2ImgPipeline

    refiner = stable_diffusion_xl(tmp_path / "refiner")
    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(refiner, tokenizer=None, text_encoder=None)
    pipeline.register_to_config(requires_aesthetics_score=True)
    shutil.rmtree(refiner)
    pipeline.save_pretrained(refiner)
    others = {
        "has no tokenizer_2 and no text_encoder_2": tiny_diffusers.stable_diffusion(tmp_path / "sd"),
        "has no tokenizer and no text_encoder": refiner,
        "UNet of 9 input channels": stable_diffusion_xl(tmp_path / "inpainting", unet=unet(in_channels=9)),
        "takes no pooled text": stable_diffusion_xl(tmp_path / "old", unet=tiny_diffusers.unet()),
        "is a FluxKontextPipeline with no unet": tiny_transformers.flux_kontext(tmp_path / "flux"),
    }
    for says, folder in others.items():
        with pytest.raises(UserError, match=says) as caught:
            open_editor(chosen(folder))
        one_sentence(caught.value)
        assert str(caught.value).startswith(f"editor.model: {folder} ")


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2", "text_encoder_2", "unet"])
def test_a_folder_with_a_part_missing_is_refused(saved: Path, tmp_path: Path, part: str) -> None:
    copy = shutil.copytree(saved, tmp_path / "copy")
    for pattern in ("tokenizer.json", "vocab*", "merges*", "*.safetensors"):
        for file in (copy / part).glob(pattern):
            file.unlink()
    with pytest.raises(UserError, match=part) as caught:
        open_editor(chosen(copy))
    one_sentence(caught.value)
    assert str(copy) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        (" ", {}, "caption 'after' is empty"),
        ("winter " * 30, {}, "would be cut off"),
        ("a zombie", {"negative_prompt": "winter " * 30}, "would be cut off"),
    ],
)
def test_prompts_that_cannot_be_read(saved: Path, text: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        open_editor(chosen(saved, **options)).edit(IMAGES, prompt(text), SEEDS)
    one_sentence(caught.value)


def test_settings() -> None:
    found = StableDiffusionXLSettings()
    assert (found.model, found.side) == ("stabilityai/stable-diffusion-xl-base-1.0", 1024)
    for wrong in (
        {"strength": 0},
        {"strength": 1.1},
        {"strength": 0.1, "steps": 9},
        {"guidance_scale": 0.5},
        {"safety_checker": False},
        {"device": "balanced"},
    ):
        with pytest.raises(ValidationError):
            StableDiffusionXLSettings(**wrong)


def test_a_farm_knows_the_kind(saved: Path) -> None:
    given: Any = {"kind": "stable-diffusion-xl", **chosen(saved).model_dump()}
    found = TypeAdapter(farm.editors.EditorSettings).validate_python(given)
    assert isinstance(found, StableDiffusionXLSettings)
    fingerprint = farm.editors.editor_fingerprint(found, "zombie")
    assert {"strength", "guidance_scale", "steps", "negative_prompt", "side", "weights"} <= set(fingerprint)
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    editor = farm.editors.open_editor(found, "zombie", fingerprint)
    assert len(pixels(editor.edit(IMAGES[:1], prompt("a zombie"), [1]))) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", [{}, {"cpu_offload": "model"}, {"cpu_offload": "sequential"}])
def test_on_a_gpu(reference: tuple[Path, list[Image]], options: dict[str, Any]) -> None:
    folder, expected = reference
    editor = open_editor(chosen(folder, device="cuda", **options))
    for _ in range(2):
        edited = pixels(editor.edit(IMAGES, prompt("a zombie"), SEEDS))
        for result, other in zip(edited, expected, strict=True):
            assert np.abs(result.astype(float) - other).mean() < 1
