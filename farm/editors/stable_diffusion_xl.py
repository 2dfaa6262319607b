"""Stable Diffusion XL's image-to-image (Podell et al. 2023): SDEdit, as in `farm.editors.stable_diffusion`, with a
larger model that works at about one megapixel and reads captions through two text encoders.

By diffusers' StableDiffusionXLImg2ImgPipeline. Weights under the CreativeML Open RAIL++-M licence.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

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
from farm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

KEPT_TEXTS = 64
"""Captions whose embeddings are kept: 0.6 MB each in float16, the negative prompt's included."""


class StableDiffusionXLSettings(DiffusionSettings):
    """Read: the caption `prompt.after`.

    model: the base model or a finetune of it; the refiner, which lacks a text encoder, is refused. The base model's
    `variant: fp16` halves what is fetched. strength: how far the photo is noised, from 0 to 1, nothing of it left;
    that share of `steps` is run. guidance_scale: of classifier-free guidance; 1 is none. negative_prompt: what guidance
    leads away from; when empty the model's own choice, zeros for the base model.

    Guidance and steps are the pipeline's defaults. Its strength of 0.3 is for the refiner, which polishes a finished
    image, and is too little to edit; diffusers' guide to SDXL shows the base model at 0.8. The 0.6 here is that of
    `stable-diffusion`, to keep more of the photo.

    The pipeline has no safety checker. Its invisible watermark is always off: it would be in the edits of those
    workers alone that have the package, and the adapters would learn it.
    """

    kind: Literal["stable-diffusion-xl"] = "stable-diffusion-xl"
    model: str = Field(default="stabilityai/stable-diffusion-xl-base-1.0", min_length=1)
    side: int = Field(default=1024, ge=64, le=2048, multiple_of=MULTIPLE)
    strength: float = Field(default=0.6, gt=0, le=1)
    guidance_scale: float = Field(default=5.0, ge=1)
    steps: int = Field(default=50, ge=1, le=1000)
    negative_prompt: str = ""

    @model_validator(mode="after")
    def _some_step(self) -> StableDiffusionXLSettings:
        if int(self.steps * self.strength) < 1:
            raise ValueError(f"strength {self.strength:g} of {self.steps} steps is not one step")
        return self

    @model_validator(mode="after")
    def _one_device(self) -> StableDiffusionXLSettings:
        if self.device == "balanced":
            raise ValueError("device: balanced is for models too big for one GPU; set cpu_offload: model for this one")
        return self


class StableDiffusionXLFamily:
    """A loaded model.

    Photos go to the pipeline as pixels: it encodes them one by one and, in float16, with the VAE in float32, which
    overflows otherwise. Of photos nothing is kept: encoding one costs little beside its edit.

    Raises:
        UserError: see `load_pipeline`; or the model is another family's, another task's or the refiner.
    """

    def __init__(self, settings: StableDiffusionXLSettings) -> None:
        from diffusers import StableDiffusionXLImg2ImgPipeline

        self._settings = settings
        self._pipeline = load_pipeline(StableDiffusionXLImg2ImgPipeline, settings, add_watermarker=False)
        _check_parts(self._pipeline, settings)
        self._embeddings = lru_cache(maxsize=KEPT_TEXTS)(self._embed)

    def edit(self, images: Tensor, prompt: Prompt, seeds: Sequence[int]) -> tuple[Tensor, list[str | None]]:
        """See `Family.edit`.

        Raises:
            UserError: there is no caption, or it or the negative prompt is longer than a text encoder reads.
        """
        texts = self._embeddings(prompt_text(prompt, "after"))
        edited: Tensor = self._pipeline(
            image=images,
            **{name: text.expand(len(images), *text.shape[1:]) for name, text in texts.items()},
            strength=self._settings.strength,
            guidance_scale=self._settings.guidance_scale,
            num_inference_steps=self._settings.steps,
            generator=generators(seeds),
            output_type="pt",
        ).images
        return edited.float().cpu(), [None] * len(images)

    def _embed(self, text: str) -> dict[str, Tensor]:
        """The pipeline's arguments for a caption: tokens `[1, 77, d]` and a pooled `[1, p]`, the negative prompt's too.

        The tokens are those of both text encoders side by side, the pooled embedding is the second one's.
        """
        import torch

        pipeline, unwanted = self._pipeline, self._settings.negative_prompt
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
            for read in (text, unwanted):
                check_prompt_length(tokenizer, read, tokenizer.model_max_length, teacher=self._settings.model)
        with torch.no_grad():
            made = pipeline.encode_prompt(text, negative_prompt=unwanted or None)
        pipeline.maybe_free_model_hooks()  # with cpu_offload the encoders go back to the CPU
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        return dict(zip(names, made, strict=True))


def open_editor(settings: StableDiffusionXLSettings) -> DiffusionEditor:
    """Load the model and make the teacher ready.

    Raises:
        UserError: the model is not there, or of another family.
    """
    return DiffusionEditor(settings, StableDiffusionXLFamily(settings))


def _check_parts(pipeline: Any, settings: StableDiffusionXLSettings) -> None:
    """Refuse what the pipeline's class would load and could not edit with: to it tokenizers and encoders are optional.

    Raises:
        UserError: saying what is the matter.
    """
    texts = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
    lacking = [name for name in texts if getattr(pipeline, name) is None]
    channels = pipeline.unet.config.in_channels
    if lacking:
        problem = f"has no {' and no '.join(lacking)}"
    elif pipeline.unet.config.addition_embed_type != "text_time":
        problem = "has a UNet that takes no pooled text and no sizes"
    elif channels != 4:
        problem = f"has a UNet of {channels} input channels, not the 4 of text to image"
    else:
        return
    raise UserError(
        f"editor.model: {settings.model} {problem}, but editor.kind wants Stable Diffusion XL's base model or a "
        "finetune of it; name one, such as stabilityai/stable-diffusion-xl-base-1.0, or the editor.kind of that one."
    )
