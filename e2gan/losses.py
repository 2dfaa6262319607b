"""Losses of equation 1: one small class a loss, its formula in `__call__`, its paper named."""

from __future__ import annotations

from typing import Literal, Protocol

import torch.nn.functional as F
from torch import Tensor


class AdversarialLoss(Protocol):
    """`discriminator(real, fake)` and `generator(fake)` over patch logits, each a scalar."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor: ...

    def generator(self, fake: Tensor) -> Tensor: ...


class LSGAN:
    """Least squares: Mao et al., ICCV 2017, equation 2 with a = 0, b = c = 1.

    Halved for the discriminator, as pix2pix does.
    """

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return 0.5 * ((real - 1).square().mean() + fake.square().mean())

    def generator(self, fake: Tensor) -> Tensor:
        return (fake - 1).square().mean()


class Hinge:
    """Hinge: Lim and Ye, "Geometric GAN", 2017."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())

    def generator(self, fake: Tensor) -> Tensor:
        return -fake.mean()


class Vanilla:
    """Cross-entropy with the non-saturating generator: Goodfellow et al., NeurIPS 2014."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())

    def generator(self, fake: Tensor) -> Tensor:
        return F.softplus(-fake).mean()


def gradient_l1(edited: Tensor, wanted: Tensor) -> Tensor:
    """L1 between the images' differences to the next pixel, down and across: Mathieu et al., ICLR 2016, section 3.2.

    Dots every few pixels, which badly matched strided and transposed convolutions leave, cost little in L1 and much
    here; so does blur.
    """
    down, across = (edited - wanted).diff(dim=2), (edited - wanted).diff(dim=3)
    return down.abs().mean() + across.abs().mean()


def adversarial_loss(name: Literal["lsgan", "hinge", "vanilla"]) -> AdversarialLoss:
    """The adversarial loss of that name."""
    losses: dict[str, AdversarialLoss] = {"lsgan": LSGAN(), "hinge": Hinge(), "vanilla": Vanilla()}
    return losses[name]
