"""InstructPix2Pix (Brooks et al. 2023): a diffusion model that follows an instruction about the photo it is shown.

By diffusers' StableDiffusionInstructPix2PixPipeline, with the defaults of the authors' repository
timothybrooks/instruct-pix2pix (`edit_cli.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from farm.editors.base import Prompt
from farm.editors.diffusion import DiffusionEditor, LatentSettings, generators, prompt_text
from farm.editors.loading import without_deprecations

if TYPE_CHECKING:
    from torch import Tensor


class InstructPix2PixSettings(LatentSettings):
    """Read: `prompt.instruction`.

    guidance_scale: how much the instruction counts; image_guidance_scale: how much the photo does (section 3.2.1 of the
    paper); 1 is no guidance. negative_prompt: what guidance leads away from.
    """

    kind: Literal["instruct-pix2pix"] = "instruct-pix2pix"
    model: str = Field(default="timbrooks/instruct-pix2pix", min_length=1)
    guidance_scale: float = Field(default=7.5, ge=1)
    image_guidance_scale: float = Field(default=1.5, ge=1)
    steps: int = Field(default=100, ge=1, le=1000)
    negative_prompt: str = ""


class InstructPix2PixFamily:
    """A loaded model, with the authors' sampler, which is Euler's ancestral one on evenly spaced timesteps.

    The noise of every step comes from the image's seed.

    Raises:
        UserError: see `load_latent_diffusion`.
    """

    def __init__(self, settings: InstructPix2PixSettings) -> None:
        from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionInstructPix2PixPipeline

        from farm.editors.latent import load_latent_diffusion

        self._settings = settings
        self._model = load_latent_diffusion(StableDiffusionInstructPix2PixPipeline, settings, unet_channels=8)
        pipeline = self._model.pipeline
        ancestral: Any = EulerAncestralDiscreteScheduler
        with without_deprecations():
            pipeline.scheduler = ancestral.from_config(pipeline.scheduler.config, timestep_spacing="linspace")

    def edit(self, images: Tensor, prompt: Prompt, seeds: Sequence[int]) -> tuple[Tensor, list[str | None]]:
        """See `Family.edit`."""
        latents = self._model.pipeline(
            prompt_embeds=self._model.embed(prompt_text(prompt, "instruction")).expand(len(images), -1, -1),
            negative_prompt_embeds=self._model.embed(self._settings.negative_prompt).expand(len(images), -1, -1),
            image=self._model.encode(images, scaled=False),
            guidance_scale=self._settings.guidance_scale,
            image_guidance_scale=self._settings.image_guidance_scale,
            num_inference_steps=self._settings.steps,
            generator=generators(seeds),
            output_type="latent",
        ).images
        return self._model.finish(latents)


def open_editor(settings: InstructPix2PixSettings) -> DiffusionEditor:
    """Load the model and make the teacher ready.

    Raises:
        UserError: the model is not there, or of another family.
    """
    return DiffusionEditor(settings, InstructPix2PixFamily(settings))
