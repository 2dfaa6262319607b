"""InstructDiffusion (Geng et al. 2023): InstructPix2Pix's network, trained on many tasks, with guidance of its own.

One of the teachers of E2GAN's appendix B.1. Defaults and sampler are those of the authors' repository
cientgu/InstructDiffusion (`edit_cli.py`): k-diffusion's ancestral Euler, with guidance by three passes of the UNet.

The authors publish single checkpoints that are pickles, laid out as InstructPix2Pix's. diffusers makes a folder of one,
reading tensors only:

    checker = StableDiffusionSafetyChecker.from_pretrained("CompVis/stable-diffusion-safety-checker")
    extractor = CLIPImageProcessor.from_pretrained("CompVis/stable-diffusion-safety-checker")
    pipeline = StableDiffusionInstructPix2PixPipeline.from_single_file(
        "v1-5-pruned-emaonly-adaption-task-humanalign.ckpt", safety_checker=checker, feature_extractor=extractor
    )
    pipeline.save_pretrained("instruct-diffusion")
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


class InstructDiffusionSettings(LatentSettings):
    """Read: `prompt.instruction`.

    model: a folder made as the head of this file says; there is none on the hub to default to.
    guidance_scale: how much the instruction counts; image_guidance_scale: how much the photo does (see `guided`). With
    both at 0.5 there is no guidance.
    """

    kind: Literal["instruct-diffusion"] = "instruct-diffusion"
    guidance_scale: float = Field(default=5.0, ge=0)
    image_guidance_scale: float = Field(default=1.25, ge=0)
    steps: int = Field(default=100, ge=1, le=1000)


class InstructDiffusionFamily:
    """A loaded model.

    Raises:
        UserError: see `load_latent_diffusion`.
    """

    def __init__(self, settings: InstructDiffusionSettings) -> None:
        from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionInstructPix2PixPipeline

        from farm.editors.latent import load_latent_diffusion

        self._settings = settings
        self._model = load_latent_diffusion(StableDiffusionInstructPix2PixPipeline, settings, unet_channels=8)
        ancestral: Any = EulerAncestralDiscreteScheduler
        with without_deprecations():
            # k-diffusion spaces its steps evenly from the noisiest to the cleanest level.
            self._scheduler = ancestral.from_config(self._model.pipeline.scheduler.config, timestep_spacing="linspace")

    def edit(self, images: Tensor, prompt: Prompt, seeds: Sequence[int]) -> tuple[Tensor, list[str | None]]:
        """See `Family.edit`."""
        import torch
        from diffusers.utils.torch_utils import randn_tensor

        model, scheduler, noise = self._model, self._scheduler, generators(seeds)
        text, no_text = model.embed(prompt_text(prompt, "instruction")), model.embed("")
        photo = model.encode(images, scaled=False).float()
        # Three passes in one batch: of text and photo, of the photo alone, of the text alone.
        texts = torch.cat([text, no_text, text]).repeat_interleave(len(images), dim=0)
        photos = torch.cat([photo, photo, torch.zeros_like(photo)])
        scheduler.set_timesteps(self._settings.steps, device=model.device)
        latents = randn_tensor(tuple(photo.shape), noise, model.device, torch.float32) * scheduler.init_noise_sigma
        with torch.no_grad():
            for timestep in scheduler.timesteps:
                scaled = scheduler.scale_model_input(latents, timestep).repeat(3, 1, 1, 1)
                inputs = torch.cat([scaled, photos], dim=1).to(model.dtype)
                predicted = model.pipeline.unet(inputs, timestep, encoder_hidden_states=texts).sample.float()
                both, photo_alone, text_alone = predicted.chunk(3)
                predicted = guided(
                    both, photo_alone, text_alone, self._settings.guidance_scale, self._settings.image_guidance_scale
                )
                latents = scheduler.step(predicted, timestep, latents, generator=noise).prev_sample
        return model.finish(latents)


def guided(both: Tensor, photo_alone: Tensor, text_alone: Tensor, text_scale: float, photo_scale: float) -> Tensor:
    """The noise to take away, of those predicted from text and photo, from the photo alone and from the text alone.

    The authors combine not the noises e but the clean images z - sigma e that they leave. The weights of the three are
    text_scale + photo_scale, 1/2 - text_scale and 1/2 - photo_scale; they sum to 1, so z drops out and it is the same.
    """
    return (photo_alone + text_alone) / 2 + text_scale * (both - photo_alone) + photo_scale * (both - text_alone)


def open_editor(settings: InstructDiffusionSettings) -> DiffusionEditor:
    """Load the model and make the teacher ready.

    Raises:
        UserError: the model is not there, or of another family.
    """
    return DiffusionEditor(settings, InstructDiffusionFamily(settings))
