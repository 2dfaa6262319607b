"""The null-text teacher's family on tiny random weights, small enough that a test can count its UNet calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farm.editors.inversion import Inversion, invert
from farm.editors.null_text import NullTextFamily, NullTextSettings

MAN = "a photo of a man"
STEPS = 4


def settings_of(folder: Path, **options: Any) -> NullTextSettings:
    given = {"steps": STEPS, "inner_steps": 2, "dtype": "float32", "device": "cpu", "side": 64}
    return NullTextSettings(model=str(folder), safety_checker=False, **{**given, **options})


def photos(n: int, *, seed: int = 0, height: int = 64, width: int = 64) -> Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


@contextmanager
def unet_batches(family: NullTextFamily) -> Iterator[list[int]]:
    """The batch size of every call of the UNet."""
    seen: list[int] = []
    hook = family._denoiser.unet.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    yield seen
    hook.remove()


def of_inversion(steps: int = STEPS, inner_steps: int = 2) -> int:
    """UNet calls of an inversion that never ends a step early: there, and back under both embeddings."""
    return steps + steps * (1 + inner_steps + 1)


def inverted(family: NullTextFamily, image: Tensor, caption: str = MAN, inner_steps: int = 2) -> Inversion:
    model = family._model
    latent, text, nothing = model.encode(image[None]).float(), model.embed(caption), model.embed("")
    return invert(family._denoiser, latent, text, nothing, inner_steps)
