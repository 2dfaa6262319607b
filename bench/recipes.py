"""What is compared: recipes for one concept's model, the bases they start from, and the ranks they train at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from e2gan.config import GeneratorConfig, Part
from e2gan.lora import crucial_layers, lora_sizes, searched_ranks, thresholds
from e2gan.model import Generator
from e2gan.ranks import Ranks, random_ranks, upscaled_ranks

Scheme = Literal["searched", "upscale-1", "upscale-4", "random", "thresholds", "searched-x4"]


@dataclass(frozen=True, kw_only=True)
class Base:
    """What fine-tuning starts from: a network trained on concepts together, or to give its input back.

    images: source images its training sees, all concepts together; None is as many as the farm's base sees of each.
    """

    model: GeneratorConfig
    concepts: tuple[str, ...] = ()
    autoencoder: bool = False
    images: int | None = None


@dataclass(frozen=True, kw_only=True)
class Search:
    """Ranks by Algorithm 1, run on a concept that the base has not seen.

    shuffled: random ranks of as many parameters instead (table 5).
    """

    concept: str
    shuffled: bool = False


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one model of a concept is made.

    base: None starts from fresh weights (of `model`). images: source images the training sees, repeats included.
    pairs: training pairs, chosen by `selection`; None takes all. ranks: of LoRA; None trains every weight but `frozen`.
    cross_attention: False takes the cross-attention out of the base before training (appendix D.3).
    adversarial_weight: instead of the configuration's.
    """

    name: str
    model: GeneratorConfig
    images: int
    base: Base | None = None
    ranks: Scheme | Search | None = None
    pairs: int | None = None
    selection: Literal["cluster", "random"] = "cluster"
    frozen: tuple[Part, ...] = ()
    cross_attention: bool = True
    adversarial_weight: float | None = None


def ranks_of(scheme: Scheme, generator: Generator, seed: int) -> Ranks:
    """The ranks of a scheme of the paper's table 5, or the thresholds themselves; `searched` are the paper's own."""
    limits = thresholds(generator)
    if scheme == "searched":
        return searched_ranks(generator)
    if scheme == "thresholds":
        return limits
    if scheme == "searched-x4":
        return {name: 4 * rank for name, rank in searched_ranks(generator).items()}
    if scheme == "random":
        # A narrower generator has lower thresholds than the paper's ranks.
        return shuffled_ranks(
            {name: min(r, limits[name]) for name, r in searched_ranks(generator).items()}, generator, seed
        )
    return upscaled_ranks(limits, 2 if scheme == "upscale-1" else 4)


def shuffled_ranks(ranks: Ranks, generator: Generator, seed: int) -> Ranks:
    """Random ranks up to the thresholds, with as many LoRA parameters as `ranks`."""
    sizes = lora_sizes(generator)
    total = sum(sizes[name] * ranks[name] for name in crucial_layers(generator))
    return random_ranks(thresholds(generator), sizes, total, seed)
