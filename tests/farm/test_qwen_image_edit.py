from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edits import one_sentence, without
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny_diffusers import stable_diffusion
from tiny_transformers import flux_kontext, qwen_image_edit

from e2gan.pairs import Image
from farm.editors.base import Prompt
from farm.editors.diffusion import DiffusionSettings, load_pipeline
from farm.editors.qwen_image_edit import QwenImageEditFamily, QwenImageEditSettings, open_editor
from farm.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_image_edit(tmp_path_factory.mktemp("models") / "qwen")


@pytest.fixture(scope="module")
def bare(folder: Path) -> Any:
    """The pipeline as diffusers gives it."""
    from diffusers import QwenImageEditPlusPipeline

    pipeline = QwenImageEditPlusPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny(folder: Path, **changes: Any) -> QwenImageEditSettings:
    return QwenImageEditSettings(
        **{"model": str(folder), "dtype": "float32", "device": "cpu", "side": 64, "steps": 2, **changes}
    )


def prompt(instruction: str) -> Prompt:
    return Prompt(instruction=instruction, before="a face", after="a blue face")


def photo(height: int, width: int, seed: int = 0) -> Image:
    """Smooth colours: the language model sees a photo shrunk, which makes all noise one grey."""
    small = torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(seed))[None]
    large = torch.nn.functional.interpolate(small, (height, width), mode="bicubic").clamp(0, 1)
    return (large[0].permute(1, 2, 0) * 255).round().byte().numpy()


def by_the_family(folder: Path, image: Image, text: str, seed: int, **changes: Any) -> Image:
    """float, 0 to 255."""
    images = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    edited, reasons = QwenImageEditFamily(tiny(folder, **changes)).edit(images, prompt(text), [seed])
    assert edited.dtype == torch.float32
    assert reasons == [None]
    return edited[0].permute(1, 2, 0).numpy() * 255


def by_the_pipeline(bare: Any, image: Image, text: str, seed: int, *, told: bool = True, **changes: Any) -> Image:
    """What diffusers makes of a photo whose sides are multiples of 32, float, 0 to 255.

    Two things are put right from outside: the size it scales the photo to is the photo's own and, if `told`, the
    language model is told which tokens are the photo's.
    """
    import PIL.Image
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus

    def tell(model: Any, positional: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        types = (given["input_ids"] == model.config.image_token_id).int()
        return positional, {**given, "mm_token_type_ids": types if told else None}

    height, width = image.shape[:2]
    hook = bare.text_encoder.register_forward_pre_hook(tell, with_kwargs=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", height * width)
        edited = bare(
            image=PIL.Image.fromarray(image),
            prompt=text,
            height=height,
            width=width,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
            **{"negative_prompt": " ", "true_cfg_scale": 4.0, **changes},
        ).images[0]
    hook.remove()
    return edited * 255


def difference(one: Image, other: Image) -> float:
    """The largest, in levels of 255."""
    return float(np.abs(one.astype(float) - other.astype(float)).max())


@pytest.mark.parametrize(
    "changes",
    [{}, {"true_cfg_scale": 7.0, "negative_prompt": "grey"}, {"true_cfg_scale": 1.0, "negative_prompt": None}],
)
def test_an_edit_is_the_pipelines(folder: Path, bare: Any, changes: dict[str, Any]) -> None:
    image = photo(64, 96)
    ours = {name: value for name, value in changes.items() if value is not None}
    (edited,) = open_editor(tiny(folder, **ours)).edit([image], prompt("make it blue"), [7])
    assert difference(edited, by_the_pipeline(bare, image, "make it blue", 7, **changes)) < 1


def test_the_language_model_is_told_where_the_photo_is(folder: Path, bare: Any) -> None:
    image = photo(64, 64)
    edited = by_the_family(folder, image, "make it blue", 7)
    assert difference(edited, by_the_pipeline(bare, image, "make it blue", 7)) < 0.01
    assert difference(edited, by_the_pipeline(bare, image, "make it blue", 7, told=False)) > 0.05


def test_without_guidance_the_transformer_runs_once_a_step(folder: Path) -> None:
    for scale, runs in ((1.0, 2), (4.0, 4)):
        family = QwenImageEditFamily(tiny(folder, true_cfg_scale=scale))
        ran: list[int] = []
        family._pipeline.transformer.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        family.edit(torch.rand(1, 3, 64, 64), prompt("make it blue"), [1])
        assert len(ran) == runs


@settings(max_examples=6, deadline=None)
@given(height=st.sampled_from(range(64, 112, 8)), width=st.sampled_from(range(64, 112, 8)))
def test_sides_are_reflected_to_what_the_model_takes_and_cut_back(folder: Path, height: int, width: int) -> None:
    image = photo(height, width)
    padded = np.pad(image, ((0, -height % 16), (0, -width % 16), (0, 0)), mode="reflect")
    edited = by_the_family(folder, image, "make it blue", 7)
    assert edited.shape == image.shape
    assert difference(edited, by_the_family(folder, padded, "make it blue", 7)[:height, :width]) < 0.01


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


def test_slices_and_tiles_change_nothing_to_speak_of(folder: Path) -> None:
    image = photo(64, 64)
    (plain,) = open_editor(tiny(folder)).edit([image], prompt("make it blue"), [1])
    frugal = open_editor(tiny(folder, attention_slicing=True, vae_tiling=True))
    assert difference(frugal.edit([image], prompt("make it blue"), [1])[0], plain) <= 1


def test_a_longer_instruction_than_is_read_is_refused(folder: Path) -> None:
    """The tiny tokenizer counts bytes."""
    editor = open_editor(tiny(folder, max_sequence_length=14))
    editor.edit([photo(64, 64)], prompt("make it bluest"), [1])
    with pytest.raises(UserError, match=r"has 21 tokens and .* reads 14, so 'of all' would be cut") as caught:
        editor.edit([photo(64, 64)], prompt("make it bluest of all"), [1])
    one_sentence(caught.value)
    with pytest.raises(UserError, match="instruction is empty") as caught:
        editor.edit([photo(64, 64)], prompt(" "), [1])
    one_sentence(caught.value)


def test_float16_is_not_offered(folder: Path) -> None:
    with pytest.raises(ValidationError, match="'float32' or 'bfloat16'"):
        tiny(folder, dtype="float16")


def test_models_of_other_families_are_refused(folder: Path, bare: Any, tmp_path: Path) -> None:
    from diffusers import QwenImageEditPipeline, StableDiffusionImg2ImgPipeline

    QwenImageEditPipeline(**bare.components).save_pretrained(tmp_path / "first")  # the same parts, another template
    others = {
        "QwenImageEditPipeline": tmp_path / "first",
        "StableDiffusionPipeline": stable_diffusion(tmp_path / "sd"),
        "FluxKontextPipeline": flux_kontext(tmp_path / "kontext"),
    }
    for name, other in others.items():
        with pytest.raises(UserError, match=f"is a {name}.*wants a QwenImageEditPlusPipeline") as caught:
            open_editor(tiny(other))
        one_sentence(caught.value)
        assert str(other) in str(caught.value)
    with pytest.raises(UserError, match="is a QwenImageEditPlusPipeline") as caught:
        load_pipeline(StableDiffusionImg2ImgPipeline, DiffusionSettings(model=str(folder), device="cpu"))
    one_sentence(caught.value)


@pytest.mark.parametrize("part", ["tokenizer", "processor", "text_encoder", "transformer", "model_index.json"])
def test_a_folder_with_a_part_missing_is_refused(folder: Path, tmp_path: Path, part: str) -> None:
    copy = without(folder, tmp_path / "copy", part)
    with pytest.raises(UserError, match=part) as caught:
        open_editor(tiny(copy))
    one_sentence(caught.value)
    assert str(copy) in str(caught.value)
