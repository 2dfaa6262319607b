"""Stable Diffusion's image-to-image: noise is added to the photo's latents and taken away again under a caption.

SDEdit (Meng et al. 2022) on latent diffusion (Rombach et al. 2022), one of the teachers of E2GAN's appendix B.1, by
diffusers' StableDiffusionImg2ImgPipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from farm.editors.base import Prompt
from farm.editors.diffusion import DiffusionEditor, LatentSettings, generators, prompt_text

if TYPE_CHECKING:
    from torch import Tensor


class StableDiffusionSettings(LatentSettings):
    """Read: the caption `prompt.after`.

    strength: how far the photo is noised, from 0 to 1, nothing of it left; that share of `steps` is run.
    guidance_scale: of classifier-free guidance; 1 is none. negative_prompt: what guidance leads away from.

    Appendix B.1 lost its numbers in the text we have; guidance and steps are diffusers' defaults, and a strength of 0.6
    instead of 0.8 keeps more of the photo.
    """

    kind: Literal["stable-diffusion"] = "stable-diffusion"
    model: str = Field(default="stable-diffusion-v1-5/stable-diffusion-v1-5", min_length=1)
    strength: float = Field(default=0.6, gt=0, le=1)
    guidance_scale: float = Field(default=7.5, ge=1)
    steps: int = Field(default=50, ge=1, le=1000)
    negative_prompt: str = ""

    @model_validator(mode="after")
    def _some_step(self) -> StableDiffusionSettings:
        if int(self.steps * self.strength) < 1:
            raise ValueError(f"strength {self.strength:g} of {self.steps} steps is not one step")
        return self


class StableDiffusionFamily:
    """A loaded model.

    Raises:
        UserError: see `load_latent_diffusion`.
    """

    def __init__(self, settings: StableDiffusionSettings) -> None:
        from diffusers import StableDiffusionImg2ImgPipeline

        from farm.editors.latent import load_latent_diffusion

        self._settings = settings
        self._model = load_latent_diffusion(StableDiffusionImg2ImgPipeline, settings)

    def edit(self, images: Tensor, prompt: Prompt, seeds: Sequence[int]) -> tuple[Tensor, list[str | None]]:
        """See `Family.edit`."""
        latents = self._model.pipeline(
            prompt_embeds=self._model.embed(prompt_text(prompt, "after")).expand(len(images), -1, -1),
            negative_prompt_embeds=self._model.embed(self._settings.negative_prompt).expand(len(images), -1, -1),
            image=self._model.encode(images),
            strength=self._settings.strength,
            guidance_scale=self._settings.guidance_scale,
            num_inference_steps=self._settings.steps,
            generator=generators(seeds),
            output_type="latent",
        ).images
        return self._model.finish(latents)


def open_editor(settings: StableDiffusionSettings) -> DiffusionEditor:
    """Load the model and make the teacher ready.

    Raises:
        UserError: the model is not there, or of another family.
    """
    return DiffusionEditor(settings, StableDiffusionFamily(settings))
