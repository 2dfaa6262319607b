from math import e, log
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor

from e2gan.config import TrainConfig
from e2gan.losses import adversarial_loss, gradient_l1

Name = Literal["lsgan", "hinge", "vanilla"]
NAMES: tuple[Name, ...] = get_args(Name)

REAL = torch.tensor([[[[2.0, 0.0]]]])
FAKE = torch.tensor([[[[-1.0, 0.5]]]])


def cross_entropy(logit: float, label: int) -> float:
    probability = 1 / (1 + e**-logit)
    return -log(probability if label else 1 - probability)


@pytest.mark.parametrize(
    ("name", "discriminator", "generator"),
    [
        # 1/2 (mean((2-1)^2, (0-1)^2) + mean(1, 0.25)); mean(4, 0.25)
        ("lsgan", 0.5 * (1.0 + 0.625), 2.125),
        # 1/2 (mean(max(0, -1), max(0, 1)) + mean(0, 1.5)); -mean(-1, 0.5)
        ("hinge", 0.5 * (0.5 + 0.75), 0.25),
        (
            "vanilla",
            0.25 * (cross_entropy(2, 1) + cross_entropy(0, 1) + cross_entropy(-1, 0) + cross_entropy(0.5, 0)),
            0.5 * (cross_entropy(-1, 1) + cross_entropy(0.5, 1)),
        ),
    ],
)
def test_formulas_by_hand(name: Name, discriminator: float, generator: float) -> None:
    loss = adversarial_loss(name)
    assert loss.discriminator(REAL, FAKE).item() == pytest.approx(discriminator, rel=1e-6)
    assert loss.generator(FAKE).item() == pytest.approx(generator, rel=1e-6)
    assert loss.generator(FAKE).shape == loss.discriminator(REAL, FAKE).shape == ()


def slope(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_two_pull_against_each_other(name: Name) -> None:
    loss = adversarial_loss(name)
    real, fake = torch.zeros(1, 1, 2, 2, requires_grad=True), torch.zeros(1, 1, 2, 2, requires_grad=True)
    assert (slope(loss.generator(fake), fake) < 0).all()  # the generator raises the logits of its edits
    assert (slope(loss.discriminator(real, fake.detach()), real) < 0).all()
    lowered = slope(loss.discriminator(real, fake), fake)
    # Least squares rests at its label 0; the others lower the logits of edits.
    assert (lowered == 0).all() if name == "lsgan" else (lowered > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_finite_at_extreme_logits(name: Name) -> None:
    loss, extreme = adversarial_loss(name), torch.tensor([-1e4, 1e4])
    assert loss.discriminator(extreme, extreme).isfinite()
    assert loss.generator(extreme).isfinite()


def test_every_configurable_name_has_a_loss() -> None:
    for name in NAMES:
        assert adversarial_loss(TrainConfig(adversarial_loss=name).adversarial_loss)


def test_gradient_l1_by_hand() -> None:
    wanted = torch.zeros(1, 1, 2, 3)
    edited = torch.tensor([[[[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]]])
    # Down: |0|, |-1|, |0|; across: |1|, |-1|, |0|, |0|.
    assert gradient_l1(edited, wanted).item() == pytest.approx(1 / 3 + 2 / 4)


def test_gradient_l1_sees_dots_and_not_brightness() -> None:
    wanted = torch.zeros(1, 3, 8, 8)
    dots = torch.zeros_like(wanted)
    dots[..., ::4, ::4] = 1.0
    assert gradient_l1(wanted + 0.5, wanted).item() == 0
    assert gradient_l1(dots, wanted) > 3 * dots.abs().mean()
