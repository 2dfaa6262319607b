"""A diffusers pipeline from a folder: every mistake found before it can show in an image."""

from __future__ import annotations

import inspect
import json
import typing
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farm.editors.weights import locate, missing_shards, variant_of
from farm.errors import UserError

if TYPE_CHECKING:
    from farm.editors.diffusion import DiffusionSettings

PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")


def load_pipeline(kind: Any, settings: DiffusionSettings, **components: Any) -> Any:
    """A diffusers pipeline of class `kind`, from its folder or the hub's cache, placed as the settings say.

    components: parts of it, by their names in `kind`, used instead of the folder's; None for one to do without.
    From here on diffusers and transformers are silent in this process.

    Raises:
        UserError: the weights are not there, are pickles, are of another family, or do not fit in the GPU's memory.
    """
    import torch

    device = device_of(settings)
    quieten()
    folder = locate(settings.model, settings.revision, settings.download, variant=settings.variant).folder
    _check_family(kind, folder, settings, components)
    _check_files(kind, folder, settings, components)
    try:
        with without_deprecations():
            pipeline = kind.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                torch_dtype=getattr(torch, settings.dtype),
                variant=settings.variant,
                device_map="balanced" if settings.device == "balanced" else None,
                **components,
            )
            for name, part in pipeline.components.items():
                if isinstance(part, torch.nn.Module) and name not in components:
                    check_loaded(part, folder, settings, subfolder=name)
    except torch.OutOfMemoryError as error:
        raise _too_big(settings) from error
    except UserError:
        raise
    except Exception as error:  # what they raise on a damaged folder has no common base
        says = str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".:")[:200]
        problem = f"{type(error).__name__}: {says}"
        raise UserError(f"editor.model: {settings.model} cannot be loaded ({problem}); {_again(settings)}.") from error
    _check_tokenizers(pipeline, settings, components)
    pipeline.set_progress_bar_config(disable=True)
    _place(pipeline, settings, device)
    return pipeline


def quieten() -> None:
    """No progress bars and no warnings of diffusers, transformers and the hub's client in this process."""
    import diffusers
    import transformers
    from huggingface_hub.utils.tqdm import disable_progress_bars

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    disable_progress_bars()


@contextmanager
def without_deprecations() -> Iterator[None]:
    """Silence on what the libraries, or folders made by older ones, will have to change: no user of a farm can."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def device_of(settings: DiffusionSettings) -> str:
    """The device's name for PyTorch; of `balanced`, the first one's.

    Raises:
        UserError: this machine has no such device.
    """
    import torch

    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if settings.device == "auto":
        return next(name for name, there in found.items() if there)
    device = "cuda" if settings.device == "balanced" else settings.device
    if not found[device]:
        raise UserError(
            f"editor.device: this worker sees no {device} device, which {settings.device} needs; set cluster.edit.gpus "
            "so that workers are given one, or editor.device: auto."
        )
    return device


def check_loaded(part: Any, folder: Path, settings: DiffusionSettings, *, subfolder: str = "") -> None:
    """Refuse a model some of whose tensors were not in its files: both libraries make such up at random.

    part: a diffusers or transformers model that was loaded from `folder/subfolder`.

    Raises:
        UserError: naming the tensors.
    """
    files = (folder / subfolder).glob("*.safetensors")
    variant = settings.variant if settings.variant in {variant_of(file.name) for file in files} else None
    _, found = type(part).from_pretrained(
        folder / subfolder,
        local_files_only=True,
        use_safetensors=True,
        variant=variant,
        output_loading_info=True,
        device_map={"": "meta"},  # the names alone: no tensor is read
    )
    absent = sorted(found["missing_keys"])
    if absent:
        some = ", ".join(absent[:3]) + (", …" if len(absent) > 3 else "")
        where = f" of its {subfolder}" if subfolder else ""
        raise UserError(
            f"editor.model: {settings.model} lacks {len(absent)} tensors{where} ({some}); {_again(settings)}."
        )


def _check_family(kind: Any, folder: Path, settings: DiffusionSettings, given: Collection[str]) -> None:
    """Refuse a folder that does not list the components that `kind` is made of."""
    wants = f"editor.kind wants a {kind.__name__}"
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if any(path.suffix in PICKLES for path in folder.iterdir()):
            raise _pickled(settings, "single checkpoints that are pickles") from error
        raise UserError(
            f"editor.model: {settings.model} has no model_index.json, so it is no diffusers pipeline, and {wants}; "
            "name a folder or hub id that holds one."
        ) from error
    except ValueError as error:
        raise UserError(
            f"editor.model: {folder / 'model_index.json'} is damaged ({error}); {_again(settings)}."
        ) from error
    for name, accepted in _needed(kind, given).items():
        library, part = index.get(name) or (None, None)
        if library is None or (accepted and part not in accepted):
            has = f"a {part} as its {name}" if part else f"no {name}"
            raise UserError(
                f"editor.model: {settings.model} is a {index.get('_class_name')} with {has}, but {wants}; name a model "
                "of this family, or the editor.kind of that one."
            )


def _check_files(kind: Any, folder: Path, settings: DiffusionSettings, given: Collection[str]) -> None:
    """Refuse a folder whose weights are not all there as safetensors."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    models = {name for name, accepted in _components(kind).items() if accepted and (index.get(name) or [None])[0]}
    variants = set()
    for name in sorted(models - set(given)):
        files = [path.name for path in (folder / name).glob("*") if path.is_file()]
        marks = {variant_of(file) for file in files if file.endswith(".safetensors")}
        variants |= marks
        if not marks and any(Path(file).suffix in PICKLES for file in files):
            raise _pickled(settings, f"the weights of its {name} as pickles")
        if not marks or missing_shards(folder / name):
            raise UserError(
                f"editor.model: {settings.model} lacks weight files of its {name} in {folder / name}; "
                f"{_again(settings)}."
            )
        if None not in marks and settings.variant not in marks:
            has = " or ".join(sorted(mark for mark in marks if mark))
            raise UserError(f"editor.variant: {settings.model} has its {name} as {has} only; set editor.variant to it.")
    if settings.variant is not None and settings.variant not in variants:
        raise UserError(
            f"editor.variant: {settings.model} in {folder} has no weights marked {settings.variant}; leave the key out."
        )


def _needed(kind: Any, given: Collection[str]) -> dict[str, set[str]]:
    """The components that a folder must have, each with the names of the model classes it may be."""
    skip = {*kind._optional_components, *given}
    return {name: accepted for name, accepted in _components(kind).items() if name not in skip}


def _components(kind: Any) -> dict[str, set[str]]:
    """The components of a pipeline's class; the set is empty for those that are no models."""
    import torch

    accepted = {}
    for name, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
        optional = name in kind._optional_components
        if parameter.default is inspect.Parameter.empty or optional:
            classes = typing.get_args(parameter.annotation) or (parameter.annotation,)
            accepted[name] = {c.__name__ for c in classes if isinstance(c, type) and issubclass(c, torch.nn.Module)}
    return accepted


def _check_tokenizers(pipeline: Any, settings: DiffusionSettings, given: Collection[str]) -> None:
    """Refuse a tokenizer that does not fit its text encoder: without its files transformers makes an empty one."""
    for name, part in pipeline.components.items():
        encoder = getattr(pipeline, name.replace("tokenizer", "text_encoder"), None)
        if not name.startswith("tokenizer") or name in given or part is None or encoder is None:
            continue
        words, rows = len(part), encoder.config.get_text_config().vocab_size
        if not rows / 2 <= words <= rows:  # encoders have some more rows than there are words
            raise UserError(
                f"editor.model: {settings.model} has a {name} of {words} tokens and a text encoder for {rows}: its "
                f"vocabulary files are missing or another model's; {_again(settings)}."
            )


def _place(pipeline: Any, settings: DiffusionSettings, device: str) -> None:
    """Put a pipeline on its device, with the options that trade time for memory. On a CPU nothing is offloaded."""
    import torch

    if settings.attention_slicing:
        pipeline.enable_attention_slicing()
    if settings.vae_tiling:
        pipeline.vae.enable_tiling()
    if settings.device == "balanced":
        return
    try:
        if settings.cpu_offload == "none" or device == "cpu":
            pipeline.to(device)
        elif settings.cpu_offload == "model":
            pipeline.enable_model_cpu_offload(device=device)
        else:
            pipeline.enable_sequential_cpu_offload(device=device)
    except torch.OutOfMemoryError as error:
        raise _too_big(settings) from error


def _pickled(settings: DiffusionSettings, what: str) -> UserError:
    return UserError(
        f"editor.model: {settings.model} has {what}, which can run any code when read; name a version with safetensors "
        "or, if you trust it, make one with diffusers: "
        "`DiffusionPipeline.from_pretrained(folder, use_safetensors=False).save_pretrained(new_folder)` for a folder, "
        "`StableDiffusionPipeline.from_single_file(file).save_pretrained(new_folder)` for a single checkpoint."
    )


def _too_big(settings: DiffusionSettings) -> UserError:
    return UserError(
        f"editor.model: {settings.model} does not fit in the GPU's memory; set editor.cpu_offload: model (or "
        "sequential), editor.dtype: float16, or editor.device: balanced where there are several GPUs."
    )


def _again(settings: DiffusionSettings) -> str:
    revision = f" --revision {settings.revision}" if settings.revision else ""
    return (
        "copy the folder again from where it came from"
        if Path(settings.model).expanduser().is_dir()
        else f"fetch it again with `hf download {settings.model}{revision}`"
    )
