"""Configuration of networks, training and adapters. Presets are functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """Shape of the generator (E2GAN section 4.2.1 and figure 3; numbers in docs/method.md).

    channels: width at full resolution; the bottleneck is four times as wide.
    residual_blocks: blocks of two 3x3 convolutions at a quarter of the image's side.
    transformer: put one transformer block at an eighth of the side, after the second residual block.
    heads: attention heads, dividing 4 * channels.
    text_tokens, text_width: shape of a prompt's embedding (CLIP ViT-L/14: 77 x 768).
    init: `identity` starts as a network that passes the photo on, `normal` is pix2pix's N(0, 0.02) (docs/method.md).
    """

    channels: int = 64
    residual_blocks: int = 3
    transformer: bool = True
    heads: int = 8
    text_tokens: int = 77
    text_width: int = 768
    init: Literal["identity", "normal"] = "identity"

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for name in ("channels", "heads", "text_tokens", "text_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.residual_blocks < 0:
            raise ValueError(f"residual_blocks must be at least 0, not {self.residual_blocks}")
        if self.transformer and (4 * self.channels) % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide four times channels ({self.channels})")
        if self.transformer and self.residual_blocks < 2:
            raise ValueError("residual_blocks must be at least 2: the transformer block follows the second one")


def pix2pix_nine_blocks() -> GeneratorConfig:
    """pix2pix's nine-block ResNet generator, the paper's baseline (Isola et al., 2017)."""
    return GeneratorConfig(residual_blocks=9, transformer=False, init="normal")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run of a base or an adapter (equation 1; docs/method.md tells what the paper leaves open).

    epochs: passes over the pairs. batch_size: pairs a step.
    learning_rate: Adam's initial rate; discriminator_learning_rate: the same where it is None.
    schedule: `constant`, `linear` (held for the first half, then linearly to zero) or `cosine`.
    l1_weight: lambda of equation 1.
    gradient_weight: weight of L1 between image gradients, not in the paper: against dots and blur in short trainings.
    adversarial_weight: weight of the adversarial loss, 0 trains without discriminator.
    adversarial_start: fraction of the run after which the adversarial loss joins, 0..1.
    flip: mirror source and target of half the pairs, drawn anew each time.
    precision: `auto` is bf16 autocast where the device computes in bf16, else fp32.
    checkpoint_every: steps between checkpoints.
    """

    epochs: float = 100
    batch_size: int = 32
    learning_rate: float = 2e-4
    discriminator_learning_rate: float | None = None
    betas: tuple[float, float] = (0.5, 0.999)
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    l1_weight: float = 100.0
    gradient_weight: float = 0.0
    adversarial_weight: float = 1.0
    adversarial_loss: Literal["lsgan", "hinge", "vanilla"] = "lsgan"
    adversarial_start: float = 0.0
    discriminator_channels: int = 64
    flip: bool = False
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    checkpoint_every: int = 500

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "learning_rate", "discriminator_channels", "checkpoint_every"):
            if not getattr(self, name) > 0:  # refuses nan too
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.discriminator_learning_rate is not None and not self.discriminator_learning_rate > 0:
            raise ValueError(f"discriminator_learning_rate must be above 0, not {self.discriminator_learning_rate}")
        for name in ("l1_weight", "gradient_weight", "adversarial_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if not 0 <= self.adversarial_start <= 1:
            raise ValueError(f"adversarial_start is a fraction of the run, 0..1, not {self.adversarial_start}")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """How LoRA is attached (section 4.2.2).

    scale: factor on the low-rank update, peft's alpha over rank; constant over ranks, so growing a rank keeps the
        update.
    """

    scale: float = 1.0

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"scale must be above 0, not {self.scale}")
