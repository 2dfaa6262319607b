"""Null-text inversion: what leads a diffusion model back to a real photo under classifier-free guidance.

Null-text Inversion (Mokady et al. 2022), sections 3.1 to 3.3, with the numbers of the authors' repository
google/prompt-to-prompt.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEARNING_RATE = 1e-2
"""Adam's at the first, noisiest step; it falls to half of that at the last."""
TOLERANCE = 1e-5
"""A step's optimisation ends early below this mean squared error of the latent, at the noisiest step."""
TOLERANCE_RISE = 1e-3
"""What the tolerance has risen by at the last step."""


@dataclass(frozen=True)
class Denoiser:
    """A model and the way it is guided.

    unet: a UNet2DConditionModel; no parameter wants a gradient. scheduler: a DDIMScheduler with its timesteps set.
    Latents are float32 `[n, c, h, w]` and text embeddings `[n, k, d]`, on the UNet's device; the UNet may compute in
    half precision.
    """

    unet: Any
    scheduler: Any
    guidance_scale: float

    def noise(self, latents: Tensor, timestep: Tensor, text: Tensor, **options: Any) -> Tensor:
        """What the UNet takes for noise, in float32."""
        dtype = self.unet.dtype
        output = self.unet(latents.to(dtype), timestep, encoder_hidden_states=text.to(dtype), **options)
        noise: Tensor = output.sample.float()
        return noise

    def step(self, latents: Tensor, timestep: Tensor, free: Tensor, text: Tensor) -> Tensor:
        """The latents one step cleaner, from the noise under no text and under the caption."""
        noise = free + self.guidance_scale * (text - free)
        cleaner: Tensor = self.scheduler.step(noise, timestep, latents).prev_sample
        return cleaner


@dataclass(frozen=True)
class Inversion:
    """A photo as its model tells it, on the CPU.

    path: float32 `[steps + 1, c, h, w]`, the latents from noise to photo that guided denoising passes with `null`.
    null: `[steps, k, d]` in the UNet's dtype, the embedding of no text at every step.
    """

    path: Tensor
    null: Tensor

    @property
    def nbytes(self) -> int:
        return self.path.nbytes + self.null.nbytes


def invert(model: Denoiser, latent: Tensor, text: Tensor, nothing: Tensor, inner_steps: int) -> Inversion:
    """Invert one photo, given its latent `[1, c, h, w]` and the embeddings `[1, k, d]` of its caption and of no text.

    DDIM inversion without guidance gives a latent at every noise level; then, from the noisiest on, the embedding of
    no text is optimised for guided denoising to pass through them. inner_steps: Adam's steps at each level, at most;
    with 0 this is guided denoising as it is. Embedding, latents and loss are float32. Needs the memory of one backward
    pass through the UNet.
    """
    pivots = ddim_inversion(model, latent, text)
    latent, null = pivots.pop(), nothing.float()
    path, nulls = [latent], []
    timesteps = model.scheduler.timesteps
    for step, timestep in enumerate(timesteps):
        pivot, progress = pivots.pop(), step / len(timesteps)
        with torch.no_grad():
            conditional = model.noise(latent, timestep, text)
        null = null.detach().clone().requires_grad_()
        adam = torch.optim.Adam([null], lr=LEARNING_RATE * (1 - progress / 2))
        for left in reversed(range(inner_steps + 1)):
            with torch.set_grad_enabled(left > 0):
                cleaner = model.step(latent, timestep, model.noise(latent, timestep, null), conditional)
                error = (cleaner - pivot).square()
            if not left or error.mean() < TOLERANCE + TOLERANCE_RISE * progress:
                break
            # Of the mean, half precision would lose the gradient on its way through the UNet.
            null.grad = torch.autograd.grad(error.sum(), null)[0] / error.numel()
            adam.step()
        latent = cleaner.detach()
        path.append(latent)
        nulls.append(null.detach().to(model.unet.dtype))
    return Inversion(torch.cat(path).cpu(), torch.cat(nulls).cpu())


@torch.no_grad()
def ddim_inversion(model: Denoiser, latent: Tensor, text: Tensor) -> list[Tensor]:
    """A photo's latent at every noise level, itself first: DDIM run backwards, without guidance."""
    from diffusers import DDIMInverseScheduler

    inverse: Any = DDIMInverseScheduler.from_config(model.scheduler.config)  # type: ignore[no-untyped-call]
    inverse.set_timesteps(len(model.scheduler.timesteps), device=latent.device)
    path = [latent]
    for timestep in inverse.timesteps:
        noise = model.noise(path[-1], timestep, text)
        path.append(inverse.step(noise, timestep, path[-1]).prev_sample)
    return path


class InversionCache:
    """The inversions used last, as many as fit in `capacity` bytes."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._kept: OrderedDict[Hashable, Inversion] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Inversion]) -> Inversion:
        """The inversion kept under a key, or else `make()`, which is kept from now on."""
        found = self._kept.pop(key, None) or make()
        self._kept[key] = found
        while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > self._capacity:
            self._kept.popitem(last=False)
        return found
