"""What the families made of Stable Diffusion 1's parts share: text encoder, VAE and safety checker, and caches."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from farm.editors.diffusion import LatentSettings, check_prompt_length, load_pipeline
from farm.editors.loading import device_of
from farm.errors import UserError

KEPT_TEXTS = 64
KEPT_LATENTS = 4096
"""How many are kept: at 512x512 pixels and float16 a source's latents take 32 kB."""


class LatentDiffusion:
    """The parts of a loaded pipeline of Stable Diffusion's kind. All methods run without gradients.

    pipeline: the diffusers pipeline, whose UNet and scheduler the family drives.
    """

    def __init__(self, pipeline: Any, settings: LatentSettings) -> None:
        self.pipeline = pipeline
        self._settings = settings
        self._texts: OrderedDict[str, Tensor] = OrderedDict()
        self._latents: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def device(self) -> torch.device:
        """Where tensors for the UNet belong, also when the model itself waits on the CPU (`cpu_offload`)."""
        return torch.device(device_of(self._settings))

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.pipeline.unet.dtype
        return dtype

    @property
    def _vae_device(self) -> torch.device:
        balanced = self._settings.device == "balanced"
        return torch.device(self.pipeline.vae.device) if balanced else self.device

    def embed(self, text: str) -> Tensor:
        """A prompt as the text encoder's `[1, 77, d]`. The empty text is what guidance leads away from.

        Raises:
            UserError: the text is longer than the encoder reads.
        """
        if text in self._texts:
            self._texts.move_to_end(text)
            return self._texts[text]
        tokenizer, encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        limit = tokenizer.model_max_length
        check_prompt_length(tokenizer, text, limit, teacher=self._settings.model)
        tokens = tokenizer(text, padding="max_length", max_length=limit, return_tensors="pt")
        masked = getattr(encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(self.device) if masked else None
        with torch.no_grad():
            embedded: Tensor = encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0].to(self.dtype)
        self.pipeline.maybe_free_model_hooks()
        _keep(self._texts, text, embedded, KEPT_TEXTS)
        return embedded

    def encode(self, images: Tensor, *, scaled: bool = True) -> Tensor:
        """`[n, 3, h, w]` in 0..1 to latents `[n, 4, h/8, w/8]`, of unit variance over photographs when `scaled`.

        They are the mode of the VAE's posterior, not a sample: the same for every concept, so that a source is encoded
        once, and alone, whatever batch it comes in. `scaled=False` is what InstructPix2Pix is conditioned on.
        """
        latents = torch.cat([self._encode_one(image) for image in images]).to(self.device)
        return latents * self.pipeline.vae.config.scaling_factor if scaled else latents

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents `[n, 4, h/8, w/8]` to float32 images `[n, 3, h, w]` in 0..1 on the CPU."""
        vae = self.pipeline.vae
        with torch.no_grad():
            latents = latents.to(self._vae_device, vae.dtype)
            images: Tensor = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        self.pipeline.maybe_free_model_hooks()
        return (images / 2 + 0.5).clamp(0, 1).float().cpu()

    def finish(self, latents: Tensor) -> tuple[Tensor, list[str | None]]:
        """Decode a batch of edits: what `Family.edit` returns."""
        images = self.decode(latents)
        return images, self.check_safety(images)

    def check_safety(self, images: Tensor) -> list[str | None]:
        """Why each of `[n, 3, h, w]` in 0..1 is no edit, going by the model's safety checker, or None."""
        checker = self.pipeline.safety_checker
        if checker is None:
            return [None] * len(images)
        levels = (images.nan_to_num() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        inputs = self.pipeline.feature_extractor(list(levels), return_tensors="pt").pixel_values
        with torch.no_grad():
            # It blanks what it is given as images in place: nothing but the number of them matters here.
            _, flagged = checker(images=torch.zeros(len(images)), clip_input=inputs.to(self.device, self.dtype))
        return ["the safety checker blanked it" if flag else None for flag in flagged]

    def _encode_one(self, image: Tensor) -> Tensor:
        """`[3, h, w]` in 0..1 to `[1, 4, h/8, w/8]`, unscaled, on the CPU."""
        content = hashlib.sha256(image.contiguous().numpy().data)
        content.update(str(tuple(image.shape)).encode())
        key = content.hexdigest()
        if key in self._latents:
            self._latents.move_to_end(key)
            return self._latents[key]
        vae = self.pipeline.vae
        with torch.no_grad():
            pixels = (image[None] * 2 - 1).to(self._vae_device, vae.dtype)
            latents: Tensor = vae.encode(pixels).latent_dist.mode().cpu()
        self.pipeline.maybe_free_model_hooks()
        _keep(self._latents, key, latents, KEPT_LATENTS)
        return latents


def load_latent_diffusion(
    kind: Any, settings: LatentSettings, *, unet_channels: int = 4, **components: Any
) -> LatentDiffusion:
    """Load a pipeline of class `kind` whose UNet takes `unet_channels`; see `load_pipeline`.

    Raises:
        UserError: as `load_pipeline`; the UNet is another task's; or there is no safety checker and there should be.
    """
    if not settings.safety_checker:
        components |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = load_pipeline(kind, settings, **components)
    channels = pipeline.unet.config.in_channels
    if channels != unet_channels:
        raise UserError(
            f"editor.model: {settings.model} has a UNet of {channels} input channels ({_task(channels)}), but this "
            f"editor.kind wants one of {unet_channels} ({_task(unet_channels)}); name a model of this family."
        )
    if settings.safety_checker and pipeline.safety_checker is None:
        raise UserError(
            f"editor.model: {settings.model} comes without a safety checker; name a model that has one, or set "
            "editor.safety_checker: false."
        )
    return LatentDiffusion(pipeline, settings)


def _task(unet_channels: int) -> str:
    tasks = {4: "text to image", 8: "editing by instruction", 9: "inpainting"}
    return tasks.get(unet_channels, "another task")


def _keep(cache: OrderedDict[str, Tensor], key: str, value: Tensor, most: int) -> None:
    cache[key] = value
    if len(cache) > most:
        cache.popitem(last=False)
