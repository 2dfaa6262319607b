"""What the diffusion teachers share: their weights, the size they work at, batches that fit in memory, and the checks
of what comes back. A family adds one file with its settings and a `Family`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from farm.editors.base import Failed, Prompt
from farm.editors.batching import Batches, CudaMemory
from farm.editors.loading import load_pipeline, without_deprecations
from farm.editors.weights import weights_fingerprint
from farm.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from e2gan.pairs import Image

__all__ = [
    "MULTIPLE",
    "DiffusionEditor",
    "DiffusionSettings",
    "Family",
    "LatentSettings",
    "check_prompt_length",
    "fingerprint",
    "generators",
    "load_pipeline",
    "pinned",
    "prompt_text",
    "working_size",
]

MULTIPLE = 8
"""Working sides are multiples of this: a VAE halves an image three times."""

SMALLEST, LONGEST = 32, 4
"""Images have a shorter side of at least 32 pixels, and a longer one of at most 4 times that."""

NOT_IN_PIXELS = {"model", "revision", "download", "device", "batch_size", "attention_slicing", "cpu_offload"}
"""Settings that are not in the fingerprint; the model itself is there as what its weights are."""


class DiffusionSettings(BaseModel):
    """What every diffusion family is told.

    model: a folder in diffusers' format, or a hub id. revision: the hub id's commit; the one in this machine's cache
    when left out. variant: of the weight files, such as `fp16`. download: fetch a hub id that is not in the cache
    (never with HF_HUB_OFFLINE=1). dtype: what the model computes in. device: `auto` is a GPU where there is one;
    `balanced` spreads the model over all. side: the image's shorter side in pixels while the teacher works; its edit
    is brought back to the image's size. batch_size: the most images at once; as many as fit in memory when left out.
    attention_slicing, vae_tiling, cpu_offload: less memory for more time.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    seeded: ClassVar[bool] = True

    model: str = Field(min_length=1)
    revision: str | None = None
    variant: str | None = None
    download: bool = False
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    device: Literal["auto", "cpu", "cuda", "mps", "balanced"] = "auto"
    side: int = Field(default=512, ge=64, le=2048, multiple_of=MULTIPLE)
    batch_size: int | None = Field(default=None, ge=1)
    attention_slicing: bool = False
    vae_tiling: bool = False
    cpu_offload: Literal["none", "model", "sequential"] = "none"

    @model_validator(mode="after")
    def _one_placement(self) -> DiffusionSettings:
        if self.device == "balanced" and self.cpu_offload != "none":
            raise ValueError("cpu_offload and device: balanced exclude each other")
        return self


Settings = TypeVar("Settings", bound=DiffusionSettings)


class LatentSettings(DiffusionSettings):
    """Of the families made of Stable Diffusion 1's parts.

    safety_checker: what the model's safety checker blanks is no edit. A model without one needs false here.
    """

    safety_checker: bool = True


class Family(Protocol):
    """What a family's file gives: a loaded model that edits a batch of one size."""

    def edit(self, images: Tensor, prompt: Prompt, seeds: Sequence[int]) -> tuple[Tensor, list[str | None]]:
        """float32 `[n, 3, h, w]` in 0..1 on the CPU to the same, and why an image failed (see `Failed`) or None.

        h and w are multiples of 8. All randomness comes from CPU generators made of `seeds`, one an image.
        """
        ...


class DiffusionEditor:
    """An `Editor` around one family.

    Images are resized (bicubic, antialiased) until the shorter side is `settings.side`, edited in batches of one size,
    and brought back. An edit depends on its image, prompt, seed and settings; a device's kernels may round differently
    in a batch of another size, which on a CPU has moved pixels by no more than one level of 255.
    """

    def __init__(self, settings: DiffusionSettings, family: Family) -> None:
        self._settings, self._family = settings, family
        self._batches = Batches(settings.batch_size, _memories(settings))

    def edit(self, images: Sequence[Image], prompt: Prompt, seeds: Sequence[int]) -> list[Image | Failed]:
        """See `Editor.edit`.

        Raises:
            UserError: an image is too small or too long, the prompt is empty or too long, the model gives images of
                another size, or one image does not fit in memory.
        """
        assert len(images) == len(seeds)
        by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, image in enumerate(images):
            height, width = image.shape[:2]
            _check_size(height, width)
            by_size[working_size(height, width, self._settings.side)].append(index)
        edited: dict[int, Image | Failed] = {}
        for size, indices in by_size.items():

            def edit_alike(chosen: Sequence[int], size: tuple[int, int] = size) -> list[Image | Failed]:
                return self._edit_alike([images[i] for i in chosen], size, prompt, [seeds[i] for i in chosen])

            edited.update(zip(indices, self._batches.run(indices, size[0] * size[1], edit_alike), strict=True))
        return [edited[index] for index in range(len(images))]

    def _edit_alike(
        self, images: Sequence[Image], size: tuple[int, int], prompt: Prompt, seeds: Sequence[int]
    ) -> list[Image | Failed]:
        import torch

        given = torch.stack([_resize(torch.tensor(image).permute(2, 0, 1) / 255, size) for image in images])
        with without_deprecations():
            made, reasons = self._family.edit(given, prompt, seeds)
        if made.shape != given.shape:
            raise UserError(
                f"editor.model: {self._settings.model} turned {tuple(given.shape)} into {tuple(made.shape)}, not into "
                "images of the same size; name a model that edits images."
            )
        results: list[Image | Failed] = []
        for image, output, reason in zip(images, made, reasons, strict=True):
            if reason is not None:
                results.append(Failed(reason))
            elif not torch.isfinite(output).all():
                results.append(Failed("the teacher gave NaN pixels"))
            else:
                levels = _resize(output, image.shape[:2]).mul(255).round().to(torch.uint8)
                results.append(np.ascontiguousarray(levels.permute(1, 2, 0).numpy()))
        return results


def working_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width an image is edited at: the shorter is `side`, the longer the nearest multiple of 8."""
    shorter = min(height, width)
    longer = round(max(height, width) * side / shorter / MULTIPLE) * MULTIPLE
    return (side, longer) if height <= width else (longer, side)


def fingerprint(settings: DiffusionSettings) -> dict[str, Any]:
    """What decides the edits: the weights' content and every setting that changes pixels.

    Raises:
        UserError: the weights are not there.
    """
    weights = weights_fingerprint(settings.model, settings.revision, settings.download)
    return {**settings.model_dump(mode="json", exclude=NOT_IN_PIXELS), "weights": weights}


def pinned(settings: Settings, fingerprint: Mapping[str, Any]) -> Settings:
    """The settings with every hub id bound to the commit that its fingerprint found: another machine's cache may have
    another one under the same name."""
    places = {"weights": "revision", "controlnet": "controlnet_revision", "depth_model": "depth_revision"}
    commits = {
        field: fingerprint[key]["commit"] for key, field in places.items() if "commit" in fingerprint.get(key, {})
    }
    return settings.model_copy(update=commits)


def prompt_text(prompt: Prompt, field: Literal["instruction", "before", "after"]) -> str:
    """The field of a prompt that a family reads.

    Raises:
        UserError: there is nothing in it.
    """
    text: str = getattr(prompt, field)
    if not text.strip():
        what = "instruction" if field == "instruction" else f"caption {field!r}"
        raise UserError(f"the prompt's {what} is empty, and this teacher reads it; give the concept one.")
    return text


def check_prompt_length(tokenizer: Any, text: str, limit: int, *, teacher: str = "the teacher") -> None:
    """Refuse a text of more than `limit` tokens, counting those that the tokenizer puts around it.

    Raises:
        UserError: with the words past the limit.
    """
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    tokens = len(encoded["input_ids"])
    if tokens <= limit:
        return
    flags = zip(encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
    starts = [start for (start, _), special in flags if not special]
    room = limit - (tokens - len(starts))
    cut = text[text.rfind(" ", 0, starts[room] + 1) + 1 :].strip()
    raise UserError(
        f"the prompt {_shortened(text)!r} has {tokens} tokens and {teacher} reads {limit}, so {cut!r} would be cut "
        "off; shorten the prompt."
    )


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """A CPU generator a seed: the noise is the same on every device and in every batch."""
    import torch

    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def _memories(settings: DiffusionSettings) -> list[CudaMemory]:
    """The GPUs to measure batches on; none when the model is on another device."""
    import torch

    if settings.device in ("cpu", "mps") or not torch.cuda.is_available():
        return []
    if settings.device == "balanced":
        return [CudaMemory(device) for device in range(torch.cuda.device_count())]
    return [CudaMemory(torch.cuda.current_device())]


def _check_size(height: int, width: int) -> None:
    size = f"an image of {width}x{height} pixels (see sources.size)"
    if min(height, width) < SMALLEST:
        raise UserError(f"{size} is too small for a diffusion teacher; its sides must be at least {SMALLEST} pixels.")
    if max(height, width) > LONGEST * min(height, width):
        raise UserError(
            f"{size} is too long for a diffusion teacher; its longer side may be at most {LONGEST} times the shorter."
        )


def _resize(image: Tensor, size: Sequence[int]) -> Tensor:
    """`[c, h, w]` in 0..1 to `[c, *size]` in 0..1, smoothed first where it shrinks."""
    from torch.nn import functional

    if image.shape[1:] == tuple(size):
        return image.clamp(0, 1)
    resized = functional.interpolate(image[None], tuple(size), mode="bicubic", antialias=True, align_corners=False)
    return resized[0].clamp(0, 1)


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}…"
