from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_diffusers
import torch
from safetensors.torch import load_file, save_file

from farm.editors.diffusion import DiffusionSettings
from farm.editors.loading import load_pipeline
from farm.errors import UserError

VAE, UNET = "vae/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.safetensors"
TEXT, CHECKER = "text_encoder/model.safetensors", "safety_checker/model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_diffusers.stable_diffusion(tmp_path_factory.mktemp("models") / "sd", safety_checker=True)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(saved, tmp_path / "sd")


def load(folder: Path | str, *, kind: Any = None, components: dict[str, Any] | None = None, **options: Any) -> Any:
    from diffusers import StableDiffusionImg2ImgPipeline

    chosen = {"model": str(folder), "dtype": "float32", "device": "cpu", **options}
    return load_pipeline(kind or StableDiffusionImg2ImgPipeline, DiffusionSettings(**chosen), **(components or {}))


def refusal(folder: Path | str, says: str, **options: Any) -> str:
    with pytest.raises(UserError, match=says) as caught:
        load(folder, **options)
    text = str(caught.value)
    assert text.startswith("editor.")
    assert str(folder) in text
    assert "\n" not in text
    assert text.endswith(".")
    return text


def weights(pipeline: Any) -> dict[str, torch.Tensor]:
    models = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": value for name, part in models.items() for key, value in part.state_dict().items()}


def same(first: Any, second: Any) -> bool:
    one, two = weights(first), weights(second)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_folder_is_loaded_as_it_was_saved(saved: Path) -> None:
    pipeline = load(saved)
    files = {name: load_file(saved / name) for name in (VAE, UNET, TEXT, CHECKER)}
    loaded = weights(pipeline)
    assert len(loaded) == sum(len(file) for file in files.values())
    for name, file in files.items():
        part = name.partition("/")[0]
        assert all(torch.equal(loaded[f"{part}.{key}"], value) for key, value in file.items())
    assert not pipeline.unet.training


def test_options_are_applied(saved: Path) -> None:
    pipeline = load(saved, dtype="bfloat16", attention_slicing=True, vae_tiling=True, cpu_offload="model")
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.bfloat16}
    assert pipeline.vae.use_tiling
    assert {type(processor).__name__ for processor in pipeline.unet.attn_processors.values()} == {"SlicedAttnProcessor"}
    assert load(saved).unet.dtype == torch.float32
    assert not load(saved).vae.use_tiling


def test_a_component_of_ones_own_is_used(folder: Path) -> None:
    shutil.rmtree(folder / "unet")
    unet = tiny_diffusers.unet(seed=9)
    assert load(folder, components={"unet": unet}).unet is unet
    shutil.rmtree(folder / "safety_checker")
    without = {"unet": unet, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    assert load(folder, components=without).safety_checker is None


def test_loading_says_nothing(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import diffusers
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_info()
        library.enable_progress_bar()
    capfd.readouterr()
    pipeline = load(saved)
    pipeline("a lake", image=torch.rand(1, 3, 32, 32), num_inference_steps=2)
    assert capfd.readouterr() == ("", "")


# Layouts of older folders


def test_a_folder_in_the_layout_of_the_hub_is_the_same(saved: Path, folder: Path) -> None:
    """Stable Diffusion 1.5 names some tensors in its own way and has the tokenizer in two files."""
    tokenizer = json.loads((folder / "tokenizer/tokenizer.json").read_text())["model"]
    (folder / "tokenizer/tokenizer.json").unlink()
    (folder / "tokenizer/vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    text = load_file(folder / TEXT)
    renamed = {f"text_model.{key}": value for key, value in text.items()}
    renamed["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(renamed, folder / TEXT, metadata={"format": "pt"})
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    vae = load_file(folder / VAE)
    for new, old in names.items():
        vae = {key.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): value for key, value in vae.items()}
    assert "decoder.mid_block.attentions.0.query.weight" in vae
    save_file(vae, folder / VAE, metadata={"format": "pt"})
    first, second = load(saved), load(folder)
    assert same(first, second)
    assert first.tokenizer("Zoë, 9 lakes").input_ids == second.tokenizer("Zoë, 9 lakes").input_ids


def test_variants(saved: Path, folder: Path) -> None:
    for name in (VAE, UNET, TEXT):
        (folder / name).rename(folder / name.replace(".safetensors", ".fp16.safetensors"))
    assert same(load(folder, variant="fp16"), load(saved))  # the safety checker has no variant
    for variant in (None, "bf16"):
        refusal(folder, "editor.variant: .* has its text_encoder as fp16 only", variant=variant)
    refusal(saved, "editor.variant: .* no weights marked fp16", variant="fp16")
    damaged = load_file(folder / UNET.replace(".safetensors", ".fp16.safetensors"))
    del damaged["conv_in.bias"]
    save_file(damaged, folder / UNET.replace(".safetensors", ".fp16.safetensors"), metadata={"format": "pt"})
    refusal(folder, r"lacks 1 tensors of its unet \(conv_in.bias\)", variant="fp16")


def test_sharded_weights(saved: Path, folder: Path) -> None:
    pipeline = load(saved)
    shutil.rmtree(folder / "unet")
    pipeline.unet.save_pretrained(folder / "unet", max_shard_size="60KB")
    shards = sorted((folder / "unet").glob("*.safetensors"))
    assert len(shards) > 2
    assert same(load(folder), pipeline)
    shards[1].unlink()
    refusal(folder, "lacks weight files of its unet")


# Folders that are refused


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (VAE, "decoder.conv_in.weight"),
        (UNET, "conv_out.bias"),
        (TEXT, "final_layer_norm.weight"),
        (CHECKER, "concept_embeds_weights"),
    ],
)
def test_a_missing_tensor_is_not_made_up(folder: Path, name: str, key: str) -> None:
    tensors = load_file(folder / name)
    del tensors[key]
    save_file(tensors, folder / name, metadata={"format": "pt"})
    refusal(folder, rf"lacks 1 tensors of its {name.partition('/')[0]} \({key}\)")


def test_many_missing_tensors_are_counted(folder: Path) -> None:
    tensors = {key: value for key, value in load_file(folder / UNET).items() if not key.startswith("up_blocks")}
    lost = len(load_file(folder / UNET)) - len(tensors)
    save_file(tensors, folder / UNET, metadata={"format": "pt"})
    text = refusal(folder, f"lacks {lost} tensors of its unet")
    assert len(text) < 500


def forget(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def put_index(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, **changes}))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (forget("tokenizer/tokenizer.json"), r"tokenizer|cannot be loaded"),
        (write("tokenizer/tokenizer.json", "{}"), "cannot be loaded"),
        (forget("model_index.json"), "has no model_index.json, .* wants a StableDiffusionImg2ImgPipeline"),
        (write("model_index.json", "{"), "model_index.json is damaged"),
        (forget("unet/config.json"), "cannot be loaded"),
        (forget("scheduler/scheduler_config.json"), "cannot be loaded"),
        (write("unet/config.json", '{"in_channels": 4}'), "cannot be loaded"),
        (write(UNET, "not safetensors"), "cannot be loaded"),
        (forget(UNET), "lacks weight files of its unet"),
        (put_index(text_encoder=["transformers", "T5EncoderModel"]), "with a T5EncoderModel as its text_encoder"),
        (put_index(vae=[None, None]), "with no vae, but"),
    ],
)
def test_a_spoiled_folder_is_refused_in_a_sentence(folder: Path, spoil: Callable[[Path], None], says: str) -> None:
    spoil(folder)
    assert len(refusal(folder, says)) < 600


def test_another_familys_folder_is_refused(folder: Path) -> None:
    """The index of FLUX.1 Kontext's repository."""
    parts = {"scheduler": "FlowMatchEulerDiscreteScheduler", "transformer": "FluxTransformer2DModel"}
    index: dict[str, Any] = {name: ["diffusers", part] for name, part in {**parts, "vae": "AutoencoderKL"}.items()}
    texts = {"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel", "tokenizer": "CLIPTokenizer"}
    index |= {name: ["transformers", part] for name, part in texts.items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxKontextPipeline", **index}))
    text = refusal(folder, "is a FluxKontextPipeline with no unet")
    assert "editor.kind wants a StableDiffusionImg2ImgPipeline" in text


def test_pickles_are_not_opened(folder: Path) -> None:
    load(folder).unet.save_pretrained(folder / "unet", safe_serialization=False)
    (folder / UNET).unlink()
    assert (folder / UNET).with_suffix(".bin").is_file()
    text = refusal(folder, "has the weights of its unet as pickles, which can run any code")
    assert "use_safetensors=False).save_pretrained(" in text
    (folder / "model_index.json").unlink()
    (folder / "v1-5-pruned.ckpt").write_bytes(b"x")
    assert "from_single_file" in refusal(folder, "single checkpoints that are pickles")


@pytest.mark.parametrize(
    ("place", "changes"),
    [
        (".", {"_class_name": ["own_code", "Pipeline"]}),
        ("unet", {"unet": ["own_code", "UNet2DConditionModel"]}),
        ("scheduler", {"scheduler": ["own_code", "Scheduler"]}),
    ],
)
def test_a_folders_own_code_is_not_run(folder: Path, place: str, changes: dict[str, Any]) -> None:
    trace = folder / "trace"
    (folder / place / "own_code.py").write_text(f"open({str(trace)!r}, 'w')\n")
    put_index(**changes)(folder)
    refusal(folder, "custom code in own_code.py")
    assert not trace.exists()


def test_a_model_cached_in_part_is_fetched_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshots = tmp_path / "hub/models--some--model/snapshots"
    snapshots.mkdir(parents=True)
    folder.rename(snapshots / commit)
    load("some/model", revision=commit)
    (snapshots / commit / UNET).unlink()
    text = refusal("some/model", "lacks weight files of its unet", revision=commit)
    assert f"`hf download some/model --revision {commit}`" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(saved: Path) -> None:
    for device in ("cuda", "balanced"):
        with pytest.raises(
            UserError, match=r"editor.device: .* no cuda device, which \w+ needs; set cluster.edit.gpus"
        ):
            load(saved, device=device)
    assert load(saved, device="auto").unet.device.type in ("cpu", "mps")


def test_a_model_too_big_for_the_device(saved: Path) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    class Heavy(StableDiffusionImg2ImgPipeline):
        """Stands for a GPU that is too small."""

        def to(self, *args: Any, **kwargs: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    text = refusal(saved, "does not fit in the GPU's memory", kind=Heavy)
    assert "editor.cpu_offload: model" in text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "options", [{}, {"cpu_offload": "model"}, {"cpu_offload": "sequential"}, {"device": "balanced"}]
)
def test_placements_on_a_gpu(saved: Path, options: dict[str, Any]) -> None:
    pipeline = load(saved, **{"device": "auto", **options})
    assert pipeline._execution_device.type == "cuda"
    image = pipeline("a lake", image=torch.rand(1, 3, 64, 64), num_inference_steps=4, output_type="pt").images
    assert torch.isfinite(image).all()
