"""The teacher FLUX.1 Kontext [dev]: a 12 B flow transformer that reads an instruction and the photo's latents side by
side with the noise (Black Forest Labs, arXiv:2506.15742).

Its weights are under the FLUX.1 [dev] Non-Commercial License: a farm taught by it inherits that question, so read the
licence before its adapters are put to use.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from farm.editors.base import Prompt
from farm.editors.diffusion import (
    MULTIPLE,
    DiffusionEditor,
    DiffusionSettings,
    check_prompt_length,
    generators,
    load_pipeline,
    prompt_text,
)
from farm.editors.flow import check_pipeline, packable

if TYPE_CHECKING:
    from torch import Tensor

KEPT_TEXTS = 16
"""Instructions whose embeddings are kept: 4 MB each."""


class FluxKontextSettings(DiffusionSettings):
    """Read: `prompt.instruction`. Defaults are the model card's.

    guidance_scale: the strength of the instruction, which the model was distilled to take as an input; 1 or more.
    max_sequence_length: the tokens its T5 encoder reads of an instruction; a longer one is refused. batch_size has no
    effect: one photo fills a GPU, see `FluxKontextFamily`. The pipeline has no safety checker.
    """

    kind: Literal["flux-kontext"] = "flux-kontext"
    model: str = Field(default="black-forest-labs/FLUX.1-Kontext-dev", min_length=1)
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    side: int = Field(default=1024, ge=64, le=2048, multiple_of=MULTIPLE)
    steps: int = Field(default=28, ge=1, le=1000)
    guidance_scale: float = Field(default=2.5, ge=1)
    max_sequence_length: int = Field(default=512, ge=8, le=512)


class FluxKontextFamily:
    """A `Family` around diffusers' FluxKontextPipeline.

    The pipeline's own choice of resolution is switched off: a photo is edited at the size it comes in, its sides
    reflected up to the multiple of 16 that packing 2x2 latents asks for, and cut back. The model was trained near one
    megapixel, so `side` 1024 suits it best.

    Photos go through one at a time. At `side` 1024 one of them is over 8,000 tokens, which keeps a GPU busy with 12 B
    parameters whether others wait or not, and a batch would round differently: in bfloat16 it changes edits by some
    levels. So an edit is the same bytes whatever is edited with it.

    Embeddings of the instruction are kept from photo to photo. Latents of photos are not: encoding one costs less
    than a thousandth of its edit.

    Raises:
        UserError: see `load_pipeline`; or the model is another FLUX.1, such as dev or Fill.
    """

    def __init__(self, settings: FluxKontextSettings) -> None:
        from diffusers import FluxKontextPipeline

        self._settings = settings
        check_pipeline(FluxKontextPipeline, settings, "black-forest-labs/FLUX.1-Kontext-dev")
        self._pipeline = load_pipeline(FluxKontextPipeline, settings)
        self._embeddings = lru_cache(maxsize=KEPT_TEXTS)(self._embed)

    def edit(self, images: Tensor, prompt: Prompt, seeds: Sequence[int]) -> tuple[Tensor, list[str | None]]:
        """See `Family.edit`.

        Raises:
            UserError: there is no instruction, or it has more tokens than `max_sequence_length`.
        """
        import torch

        tokens, pooled = self._embeddings(prompt_text(prompt, "instruction"))
        photos = packable(images, self._pipeline)
        height, width = photos.shape[2:]
        edited = [
            self._pipeline(
                image=photo[None],
                prompt_embeds=tokens,
                pooled_prompt_embeds=pooled,
                height=height,
                width=width,
                max_area=height * width,  # else height and width are scaled to a megapixel
                _auto_resize=False,  # else the photo is scaled to one of the sizes the model was trained on
                num_inference_steps=self._settings.steps,
                guidance_scale=self._settings.guidance_scale,
                generator=generator,
                output_type="pt",
            ).images.float()
            for photo, generator in zip(photos, generators(seeds), strict=True)
        ]
        return torch.cat(edited)[:, :, : images.shape[2], : images.shape[3]].cpu(), [None] * len(edited)

    def _embed(self, text: str) -> tuple[Tensor, Tensor]:
        """T5's tokens `[1, max_sequence_length, 4096]` and CLIP's pooled `[1, 768]`.

        CLIP reads the first 77 of its tokens only: FLUX is made so, T5 is what reads the instruction.
        """
        import torch

        limit = self._settings.max_sequence_length
        check_prompt_length(self._pipeline.tokenizer_2, text, limit, teacher=self._settings.model)
        with torch.no_grad():
            tokens, pooled, _ = self._pipeline.encode_prompt(text, max_sequence_length=limit)
        self._pipeline.maybe_free_model_hooks()  # with cpu_offload the encoders go back to the CPU
        return tokens, pooled


def open_editor(settings: FluxKontextSettings) -> DiffusionEditor:
    """FLUX.1 Kontext, loaded.

    Raises:
        UserError: see `load_pipeline`.
    """
    return DiffusionEditor(settings, FluxKontextFamily(settings))
