"""Configuration of networks, training and adapters. Presets are functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

Part = Literal["sampling", "transformer", "residual"]
"""The generator's three parts (section 4.2.2, figure 4): sampling layers, transformer blocks, residual blocks."""


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """Shape of the generator (E2GAN section 4.2.1 and figure 3; numbers in docs/method.md).

    channels: width at full resolution; the bottleneck is four times as wide.
    residual_blocks: blocks of two 3x3 convolutions at a quarter of the image's side.
    transformer_blocks: blocks at an eighth of the side, 0..2 (table 2).
    transformer_position: residual blocks before them (section 4.2.1 tries 0 to 3 and takes 2).
    transformer_sampling: what halves and restores the side around a transformer block (appendix C.2).
    cross_attention: whether transformer blocks attend to the prompt (appendix D.3).
    heads: attention heads, dividing 4 * channels.
    text_tokens, text_width: shape of a prompt's embedding (CLIP ViT-L/14: 77 x 768).
    init: `identity` starts as a network that passes the photo on, `normal` is pix2pix's N(0, 0.02) (docs/method.md).
    """

    channels: int = 64
    residual_blocks: int = 3
    transformer_blocks: int = 1
    transformer_position: int = 2
    transformer_sampling: Literal["conv", "pool"] = "conv"
    cross_attention: bool = True
    heads: int = 8
    text_tokens: int = 77
    text_width: int = 768
    init: Literal["identity", "normal"] = "identity"

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        # The upper ends are far above what trains; a file that claims more is not worth a look at its weights.
        ends = {"channels": 1024, "heads": 1024, "text_tokens": 4096, "text_width": 16384, "residual_blocks": 64}
        for name, end in ends.items():
            start = 0 if name == "residual_blocks" else 1
            if not start <= getattr(self, name) <= end:
                raise ValueError(f"{name} must be {start}..{end}, not {getattr(self, name)}")
        if not 0 <= self.transformer_blocks <= 2:
            raise ValueError(f"transformer_blocks must be 0, 1 or 2, not {self.transformer_blocks}")
        if self.transformer_blocks and (4 * self.channels) % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide four times channels ({self.channels})")
        if self.transformer_blocks and not 0 <= self.transformer_position <= self.residual_blocks:
            raise ValueError(
                f"transformer_position must be 0..residual_blocks ({self.residual_blocks}), "
                f"not {self.transformer_position}"
            )


def pix2pix_nine_blocks() -> GeneratorConfig:
    """pix2pix's nine-block ResNet generator, the paper's baseline (Isola et al., 2017)."""
    return GeneratorConfig(residual_blocks=9, transformer_blocks=0, init="normal")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run of a base or an adapter (equation 1; docs/method.md tells what the paper leaves open).

    epochs: passes over the pairs. batch_size: pairs a step.
    optimizer: `adam`, or `adamw` with `weight_decay`. betas: of either.
    learning_rate: the initial rate; discriminator_learning_rate: the same where it is None.
    schedule: `constant`, `linear` (held for the first half, then linearly to zero) or `cosine`.
    max_gradient_norm: gradients of each network are scaled down to this norm; None leaves them.
    ema_decay: the trained weights are the exponential moving average over the steps, 0..1; 0 takes the last ones.
    frozen: parts of a base that do not train (figure 4).
    l1_weight: lambda of equation 1.
    gradient_weight: weight of L1 between image gradients, not in the paper: against dots and blur in short trainings.
    adversarial_weight: weight of the adversarial loss, 0 trains without discriminator.
    adversarial_start: fraction of the run after which the adversarial loss joins, 0..1.
    flip: mirror source and target of half the pairs, drawn anew each time.
    crop: train on crops of this side, px, a multiple of 8, at a place drawn anew each time; None takes whole images.
    precision: `auto` is bf16 autocast where the device computes in bf16, else fp32.
    channels_last: memory layout; None is what trains faster on the device (docs/method.md).
    compile: torch.compile: up to a minute's wait at the start, then faster steps; on a CPU it needs a C++ compiler.
    checkpoint_every: steps between checkpoints.
    """

    epochs: float = 100
    batch_size: int = 32
    optimizer: Literal["adam", "adamw"] = "adam"
    learning_rate: float = 2e-4
    discriminator_learning_rate: float | None = None
    betas: tuple[float, float] = (0.5, 0.999)
    weight_decay: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    max_gradient_norm: float | None = None
    ema_decay: float = 0.0
    frozen: tuple[Part, ...] = ()
    l1_weight: float = 100.0
    gradient_weight: float = 0.0
    adversarial_weight: float = 1.0
    adversarial_loss: Literal["lsgan", "hinge", "vanilla"] = "lsgan"
    adversarial_start: float = 0.0
    discriminator_channels: int = 64
    flip: bool = False
    crop: int | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    channels_last: bool | None = None
    compile: bool = False
    checkpoint_every: int = 500

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "learning_rate", "discriminator_channels", "checkpoint_every"):
            if not getattr(self, name) > 0:  # refuses nan too
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("discriminator_learning_rate", "max_gradient_norm"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("l1_weight", "gradient_weight", "adversarial_weight", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if not 0 <= self.adversarial_start <= 1:
            raise ValueError(f"adversarial_start is a fraction of the run, 0..1, not {self.adversarial_start}")
        if self.weight_decay and self.optimizer != "adamw":
            raise ValueError("weight_decay needs optimizer: adamw")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and below 1, not {self.ema_decay}")
        if self.crop is not None and (self.crop < 16 or self.crop % 8):
            raise ValueError(f"crop must be a multiple of 8 and at least 16, not {self.crop}")
        if len(set(self.frozen)) == 3:
            raise ValueError("frozen names all three parts: nothing is left to train")


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
