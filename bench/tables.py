"""The paper's comparisons as recipes: a function a table, which trains nothing.

Each gives the recipes of one target concept; `rows` puts the paper's figures (`paper.yaml`) beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations, count
from pathlib import Path
from typing import Any, get_args

import yaml
from recipes import Base, Recipe, Scheme, Search
from study import Study

from e2gan.config import GeneratorConfig, Part, pix2pix_nine_blocks
from e2gan.embeddings import thumbnail_embedding
from e2gan.selection import random_concepts, representative_concepts
from farm.errors import UserError
from farm.stages.select import selected_ids

Figures = Mapping[str, float]
"""What the paper says of a row, by column of its table."""


@dataclass(frozen=True, kw_only=True)
class Lab:
    """What the tables are made of.

    targets: the concepts that are learned, kept out of every base and search. images: that one training sees, repeats
    included. base_images: the same of a base's training.
    """

    study: Study
    targets: tuple[str, ...]
    images: int
    base_images: int

    @property
    def model(self) -> GeneratorConfig:
        return self.study.config.model

    @property
    def nine(self) -> GeneratorConfig:
        """pix2pix's generator at this farm's width.

        It starts as E2GAN's does: `identity` is not of the paper, and this must not become a comparison of starts.
        """
        return replace(pix2pix_nine_blocks(), channels=self.model.channels, init=self.model.init)

    @property
    def concepts(self) -> tuple[str, ...]:
        """The farm's base concepts but the targets."""
        return _some([c for c in self.study.config.base.concepts if c not in self.targets])

    @property
    def candidates(self) -> list[str]:
        """All concepts but the targets."""
        return [c.id for c in self.study.config.catalogue if c.id not in self.targets]

    @property
    def half(self) -> int:
        """Pairs that E2GAN trains on: the paper's 400 of 800."""
        return len(selected_ids(self.study.store, self.study.plan)["train"]) // 2

    def base(self, *concepts: str, model: GeneratorConfig | None = None, autoencoder: bool = False) -> Base:
        """A base on the concepts given, else on the farm's; every base sees as many images."""
        return Base(
            model=model or self.model,
            concepts=concepts or self.concepts,
            autoencoder=autoencoder,
            images=self.base_images,
        )

    def e2gan(self, name: str, base: Base | None = None, ranks: Scheme | Search = "searched") -> Recipe:
        """The paper's way: LoRA on a base, half of the pairs chosen by similarity clustering."""
        base = base or self.base()
        return Recipe(name=name, model=base.model, images=self.images, base=base, ranks=ranks, pairs=self.half)

    def full(self, name: str, model: GeneratorConfig, base: Base | None = None) -> Recipe:
        """Every weight trained on all pairs."""
        return Recipe(name=name, model=model, images=self.images, base=base)


def default_images(study: Study, targets: tuple[str, ...]) -> tuple[int, int]:
    """Images that the farm's own configuration shows to an adapter and to a base on these concepts."""
    pairs = len(selected_ids(study.store, study.plan)["train"])
    concepts = [c for c in study.config.base.concepts if c not in targets]
    adapters, base = study.config.adapters.train.epochs, study.config.base.train.epochs
    return round(adapters * pairs), round(base * pairs * len(concepts))


def rows(number: str, lab: Lab) -> list[tuple[Recipe, Figures | None]]:
    """A table's recipes, the same for every target, and what the paper says of each."""
    figures = paper(number)["rows"]
    return [(recipe, figures.get(recipe.name)) for recipe in TABLES[number](lab)]


def concepts_of(recipe: Recipe) -> set[str]:
    """The concepts, besides the target, whose edits a recipe needs."""
    searched = {recipe.ranks.concept} if isinstance(recipe.ranks, Search) else set()
    return searched | set(recipe.base.concepts if recipe.base else ())


@lru_cache
def _figures() -> dict[str, Any]:
    figures: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("paper.yaml").read_text(encoding="utf-8"))
    return figures


def paper(number: str) -> dict[str, Any]:
    """`title`, `about` and `rows` of a table of the paper."""
    table: dict[str, Any] = _figures()[number]
    return table


def table_2(lab: Lab) -> list[Recipe]:
    def ours(blocks: int, position: int = 2) -> GeneratorConfig:
        return replace(lab.model, residual_blocks=3, transformer_blocks=blocks, transformer_position=position)

    return [
        lab.full("9RB", lab.nine),
        lab.full("3RB", ours(0)),
        *[lab.full(f"3RB+1TB at {position}", ours(1, position)) for position in range(4)],
        lab.full("3RB+2TB at 2", ours(2)),
    ]


def table_3(lab: Lab) -> list[Recipe]:
    # 100 epochs over half of the pairs against 200 over all; and pix2pix with E2GAN's budget.
    nine = lab.full("pix2pix 9RB", lab.nine)
    return [
        lab.e2gan("E2GAN"),
        replace(nine, images=4 * lab.images),
        replace(nine, name="pix2pix 9RB, as long as E2GAN"),
    ]


def table_4(lab: Lab) -> list[Recipe]:
    candidates, seed = lab.candidates, lab.study.plan.seed("base-concepts")
    if len(candidates) < 2:
        raise UserError("table 4 chooses among concepts: the catalogue needs two that are not targets, add some.")
    k = (len(candidates) + 1) // 2
    lab.study.make_edits(candidates)
    means = {c: thumbnail_embedding(lab.study.pairs(c, "train").target).mean(axis=0) for c in candidates}
    best = representative_concepts(means, k, seed)
    # Of few concepts the same ones may be drawn, which would compare nothing: the first draw that differs.
    draws = (random_concepts(candidates, k, seed + number) for number in count())
    drawn = next(draw for draw in draws if draw != best)
    return [
        lab.e2gan("representative concepts", lab.base(*best)),
        lab.e2gan("random concepts", lab.base(*drawn)),
        lab.e2gan("one concept", lab.base(lab.concepts[0])),
    ]


def table_5(lab: Lab) -> list[Recipe]:
    # Searched on a concept that neither base nor table has seen; where there is none the base gives one up.
    unseen = [c for c in lab.candidates if c not in lab.concepts] or lab.candidates
    (sampled,) = random_concepts(_some(unseen), 1, lab.study.plan.seed("ranks"))
    base = lab.base(*_some([c for c in lab.concepts if c != sampled]))
    return [
        lab.e2gan("searched ranks", base, Search(concept=sampled)),
        lab.e2gan("upscale 1", base, "upscale-1"),
        lab.e2gan("upscale 4", base, "upscale-4"),
        lab.e2gan("random ranks", base, Search(concept=sampled, shuffled=True)),
        lab.e2gan("the paper's ranks", base, "searched"),
    ]


def table_6(lab: Lab) -> list[Recipe]:
    return [lab.full("3RB+1TB", lab.model), lab.full("9RB", lab.nine)]


def figure_4(lab: Lab) -> list[Recipe]:
    parts: tuple[Part, ...] = get_args(Part)
    whole = lab.full("nothing frozen", lab.model, lab.base())
    some = [frozen for size in (1, 2) for frozen in combinations(parts, size)]
    return [whole, *[replace(whole, name=f"{' and '.join(frozen)} frozen", frozen=frozen) for frozen in some]]


def figure_7(lab: Lab) -> list[Recipe]:
    pairs = 2 * lab.half
    batch = lab.study.config.adapters.train.batch_size
    # The paper's 100, 200, 300 and 400 of 800, and at least a batch.
    counts = sorted({max(batch, pairs * eighths // 8) for eighths in range(1, 5)})
    e2gan = lab.e2gan("")
    some = [
        replace(e2gan, name=f"{n} pairs, {words}", pairs=n, selection=selection)
        for n in counts
        for selection, words in (("cluster", "clustered"), ("random", "at random"))
    ]
    return [*some, replace(e2gan, name="all pairs", pairs=None)]


def table_10(lab: Lab) -> list[Recipe]:
    def sampled(how: str) -> GeneratorConfig:
        return replace(lab.model, transformer_sampling=how)

    return [
        lab.full(name, sampled(how), lab.base(model=sampled(how)))
        for name, how in (("convolution", "conv"), ("pooling", "pool"))
    ]


def table_11(lab: Lab) -> list[Recipe]:
    return [
        lab.full("pix2pix 9RB on a base", lab.nine, lab.base(model=lab.nine)),
        lab.full("pix2pix 9RB from scratch", lab.nine),
        lab.e2gan("E2GAN"),
    ]


def table_12(lab: Lab) -> list[Recipe]:
    # Every concept has the same photos, so any one gives the auto-encoder its images.
    one = lab.concepts[0]
    return [
        lab.e2gan("auto-encoder", lab.base(one, autoencoder=True)),
        lab.e2gan("one concept", lab.base(one)),
        lab.e2gan("mixed base"),
    ]


def table_13(lab: Lab) -> list[Recipe]:
    e2gan = lab.e2gan("E2GAN")
    return [replace(e2gan, name="cross-attention removed", cross_attention=False), e2gan]


def table_14(lab: Lab) -> list[Recipe]:
    e2gan = lab.e2gan("E2GAN")
    return [e2gan, replace(e2gan, name="E2GAN, twice as long", images=2 * lab.images)]


TABLES: Mapping[str, Callable[[Lab], list[Recipe]]] = {
    "2": table_2,
    "3": table_3,
    "4": table_4,
    "5": table_5,
    "6": table_6,
    "figure4": figure_4,
    "figure7": figure_7,
    "10": table_10,
    "11": table_11,
    "12": table_12,
    "13": table_13,
    "14": table_14,
}


def _some(concepts: list[str]) -> tuple[str, ...]:
    if not concepts:
        raise UserError(
            "no concept is left for the base: every one of base.concepts is a target or searched, add some."
        )
    return tuple(concepts)
