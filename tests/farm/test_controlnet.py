from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny_controlnet import control_net, depth_network
from tiny_diffusers import NOISE_SCHEDULE, clip_text_model, stable_diffusion, unet

from e2gan.pairs import Image
from farm.editors.base import Failed, Prompt
from farm.editors.controlnet import ControlNetFamily, ControlNetSettings, fingerprint, open_editor
from farm.editors.diffusion import pinned
from farm.editors.normal_map import NormalMaps
from farm.errors import UserError

PROMPT = Prompt(instruction="not read", before="not read either", after="a photo of a zombie")
STEPS, GUIDANCE, SEEDS = 3, 5.0, [11, 7]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from diffusers import PNDMScheduler

    root = tmp_path_factory.mktemp("models")
    # A scheduler that says nothing about clipping, and the last step otherwise than the authors.
    scheduler = PNDMScheduler(**NOISE_SCHEDULE, skip_prk_steps=True, set_alpha_to_one=True)
    return {
        "model": str(stable_diffusion(root / "sd", scheduler=scheduler)),
        "controlnet": str(control_net(root / "controlnet")),
        "depth_model": str(depth_network(root / "depth")),
    }


def settings(folders: dict[str, str], **options: Any) -> ControlNetSettings:
    small = {"dtype": "float32", "device": "cpu", "side": 64, "safety_checker": False}
    return ControlNetSettings(**{**folders, **small, "steps": STEPS, "guidance_scale": GUIDANCE, **options})


def photos(count: int = 2, height: int = 64, width: int = 64) -> list[Image]:
    small = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    large = torch.nn.functional.interpolate(small, (height, width), mode="bicubic").clamp(0, 1)
    return list((large * 255).round().byte().permute(0, 2, 3, 1).numpy())


def bare(folders: dict[str, str], kind: Any, **components: Any) -> Any:
    """The pipeline as diffusers loads it, with the DDIM sampler of Stable Diffusion 1."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False, set_alpha_to_one=False)
    pipeline = kind.from_pretrained(folders["model"], scheduler=scheduler, **components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def levels_apart(image: Image | Failed, expected: np.ndarray[Any, Any]) -> float:
    """The largest difference, in levels of 255, to an image in 0..1."""
    assert not isinstance(image, Failed)
    return float(np.abs(image - expected * 255).max())


def test_edits_are_those_of_the_pipeline_on_its_own(folders: dict[str, str]) -> None:
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
    from transformers import DPTForDepthEstimation, DPTImageProcessor

    edited = open_editor(settings(folders, control_strength=0.8, negative_prompt="blurred")).edit(
        photos(), PROMPT, SEEDS
    )
    pipeline = bare(
        folders,
        StableDiffusionControlNetPipeline,
        controlnet=ControlNetModel.from_pretrained(folders["controlnet"]),
    )
    estimator = DPTForDepthEstimation.from_pretrained(folders["depth_model"]).eval()
    maps = NormalMaps(estimator, DPTImageProcessor.from_pretrained(folders["depth_model"]), 0.4)
    for image, photo, seed in zip(edited, photos(), SEEDS, strict=True):
        given = torch.from_numpy(photo).permute(2, 0, 1)[None] / 255
        expected = pipeline(
            PROMPT.after,
            maps.of(given, torch.device("cpu")),
            negative_prompt="blurred",
            controlnet_conditioning_scale=0.8,
            guidance_scale=GUIDANCE,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).images[0]
        assert levels_apart(image, expected) <= 1
        assert expected.std() > 0.02


def test_without_strength_it_is_text_to_image(folders: dict[str, str]) -> None:
    from diffusers import StableDiffusionPipeline

    edited = open_editor(settings(folders, control_strength=0.0)).edit(photos(), PROMPT, SEEDS)
    pipeline = bare(folders, StableDiffusionPipeline)
    for image, seed in zip(edited, SEEDS, strict=True):
        expected = pipeline(
            PROMPT.after,
            height=64,
            width=64,
            guidance_scale=GUIDANCE,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).images[0]
        assert levels_apart(image, expected) <= 1


def test_what_decides_an_edit(folders: dict[str, str]) -> None:
    """Photo, caption, seed and threshold do; the rest of the batch, and the prompt's other fields, do not."""
    editor = open_editor(settings(folders, batch_size=3))
    first, second = photos()
    together = editor.edit([first, second, first], PROMPT, [1, 1, 2])
    alone = editor.edit([first], Prompt(instruction="x", before="y", after=PROMPT.after), [1])[0]

    def apart(other: Image | Failed) -> int:
        assert not isinstance(alone, Failed)
        assert not isinstance(other, Failed)
        return int(np.abs(alone.astype(int) - other).max())

    assert apart(together[0]) <= 1
    assert apart(together[1]) > 3
    assert apart(together[2]) > 3
    assert apart(editor.edit([first], Prompt(instruction="", before="", after="a cat"), [1])[0]) > 3
    flat = open_editor(settings(folders, normal_background_threshold=1.0)).edit([first], PROMPT, [1])[0]
    assert apart(flat) > 1


def test_images_of_any_size_come_back_as_they_were(folders: dict[str, str]) -> None:
    sizes = [(64, 100), (90, 50), (64, 64)]
    images = [photos(1, *size)[0] for size in sizes]
    edited = open_editor(settings(folders, dtype="bfloat16")).edit(images, PROMPT, [1, 2, 3])
    for image, size in zip(edited, sizes, strict=True):
        assert not isinstance(image, Failed)
        assert image.shape == (*size, 3)
        assert image.std() > 2


def test_the_normal_maps_are_exact_in_half_precision(folders: dict[str, str]) -> None:
    given = torch.from_numpy(np.stack(photos())).permute(0, 3, 1, 2) / 255
    half, full = (ControlNetFamily(settings(folders, dtype=dtype)) for dtype in ("bfloat16", "float32"))
    assert half._model.pipeline.controlnet.dtype == torch.bfloat16
    assert torch.equal(half._maps.of(given, torch.device("cpu")), full._maps.of(given, torch.device("cpu")))


def test_what_the_safety_checker_flags_is_no_edit(folders: dict[str, str], tmp_path: Path) -> None:
    flagging = stable_diffusion(tmp_path / "sd", safety_checker=True, flags=True)
    editor = open_editor(settings({**folders, "model": str(flagging)}, safety_checker=True))
    assert editor.edit(photos(1), PROMPT, [1]) == [Failed("the safety checker blanked it")]


def without(folder: str, name: str, copy: Path) -> str:
    """A copy of a folder without the files of a name."""
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(name))
    return str(copy)


def half_of(folder: str, copy: Path) -> str:
    """A copy of a model's folder with every other tensor."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, copy)
    (weights,) = copy.glob("*.safetensors")
    tensors = load_file(weights)
    save_file({name: tensors[name] for name in list(tensors)[::2]}, weights, metadata={"format": "pt"})
    return str(copy)


def other_models(folders: dict[str, str], copy: Path) -> dict[str, tuple[str, str, str]]:
    """By case: which setting, to what, and what is said of it."""
    unet().save_pretrained(copy / "unet")
    clip_text_model().save_pretrained(copy / "text")
    return {
        "no such ControlNet": ("controlnet", str(copy / "nothing"), "there is no folder"),
        "no such depth network": ("depth_model", str(copy / "nothing"), "there is no folder"),
        "ControlNet as pickles": (
            "controlnet", without(folders["controlnet"], "*.safetensors", copy / "a"), "no weights as safetensors"
        ),
        "half a ControlNet": ("controlnet", half_of(folders["controlnet"], copy / "b"), "is no whole ControlNetModel"),
        "half a depth network": ("depth_model", half_of(folders["depth_model"], copy / "c"), "is no whole DPT"),
        "a UNet": ("controlnet", str(copy / "unet"), "ControlNetModel"),
        "another model's ControlNet": (
            "controlnet", str(control_net(copy / "d", cross_attention_dim=48)), "cross_attention_dim is 48, not 32"
        ),
        "a text encoder": ("depth_model", str(copy / "text"), "DPTForDepthEstimation"),
        "depth network without processor": (
            "depth_model", without(folders["depth_model"], "preprocessor*", copy / "e"), "preprocessor_config.json"
        ),
    }  # fmt: skip


def test_other_models_are_refused(folders: dict[str, str], tmp_path: Path) -> None:
    for case, (key, value, says) in other_models(folders, tmp_path).items():
        with pytest.raises(UserError) as caught:
            open_editor(settings({**folders, key: value}))
        text = str(caught.value)
        assert text.startswith(f"editor.{key}: "), case
        assert value in text, case
        assert says in text, (case, text)
        assert "\n" not in text, case
        assert text.endswith("."), case


def test_it_is_for_one_device(folders: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="device: balanced"):
        settings(folders, device="balanced")


def test_the_fingerprint_follows_all_three_models_weights(folders: dict[str, str], tmp_path: Path) -> None:
    first = fingerprint(settings(folders))
    moved = {key: without(folder, "nothing", tmp_path / key) for key, folder in folders.items()}
    assert fingerprint(settings(moved)) == first
    assert fingerprint(settings(folders, control_strength=0.5)) != first
    assert not any(folder in str(first) for folder in folders.values())
    control_net(Path(moved["controlnet"]), seed=8)
    second = fingerprint(settings(moved))
    assert second != first
    depth_network(Path(moved["depth_model"]), seed=9)
    assert fingerprint(settings(moved)) not in (first, second)


def test_defaults_are_those_of_the_authors_demo() -> None:
    plain = ControlNetSettings()
    assert (plain.steps, plain.guidance_scale, plain.control_strength) == (20, 9.0, 1.0)
    assert plain.normal_background_threshold == 0.4
    assert plain.depth_revision == "refs/pr/5"  # with safetensors
    assert ControlNetSettings(depth_model="Intel/dpt-large").depth_revision is None
    commit = "0123456789abcdef0123456789abcdef01234567"
    exact = ControlNetSettings(revision=commit, controlnet_revision=commit, depth_revision=commit)
    assert fingerprint(exact)["controlnet"] == {"id": "lllyasviel/sd-controlnet-normal", "commit": commit}
    assert pinned(plain, fingerprint(exact)) == exact


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", [{}, {"cpu_offload": "model"}, {"cpu_offload": "sequential"}])
def test_on_a_gpu(folders: dict[str, str], options: dict[str, Any]) -> None:
    expected = open_editor(settings(folders)).edit(photos(), PROMPT, SEEDS)
    edited = open_editor(settings(folders, **{"device": "cuda", **options})).edit(photos(), PROMPT, SEEDS)
    for image, other in zip(edited, expected, strict=True):
        assert not isinstance(other, Failed)
        assert levels_apart(image, other / 255) < 20
