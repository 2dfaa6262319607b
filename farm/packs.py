"""Packs: which published concepts go into which, known before any is built.

A pack is an artifact, `packs/<digest>/`, whose digest follows from the adapters in it, their base and how it is made:
the same command finds it there, and a new adapter makes another pack.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from e2gan.config import GeneratorConfig
from e2gan.export.budget import LADDER, ONNX_LADDER, Shape, fit
from e2gan.export.builders import Format
from e2gan.infer import base_generator
from e2gan.lora import searched_ranks
from e2gan.ranks import Ranks
from farm.artifacts import Manifest, Spec, find
from farm.errors import UserError
from farm.registry import Entry
from farm.store import Store
from farm.weights import read_adapter, read_base

VERSION = 1
"""Of the stage, raised when its code comes to make other bytes of the same inputs."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A concept of a pack: its adapter's folder in the store and digest."""

    concept: str
    adapter: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class Pack:
    """One pack to make. side: of its images, px. budget: bytes, None for no limit. sources: the folder of the
    photographs that it is judged on. since: digest of the pack whose weights it goes on from."""

    members: tuple[Member, ...]
    base: str
    format: Format
    side: int
    shape: Shape
    sources: str
    budget: int | None = None
    since: str | None = None

    @property
    def spec(self) -> Spec:
        config: dict[str, Any] = {
            "format": self.format,
            "side": self.side,
            "precision": self.shape.precision,
            "rank_cap": self.shape.cap,
            "concepts": [member.concept for member in self.members],
        }
        inputs = {"base": self.base, "sources": self.sources.rpartition("/")[2]}
        inputs |= {f"adapters/{member.concept}": member.digest for member in self.members}
        if self.since:
            inputs["since"] = self.since
        return Spec(stage="pack", version=VERSION, folder="packs", config=config, inputs=inputs)


def plan_packs(
    store: Store,
    entries: Sequence[Entry],
    *,
    format: Format,
    side: int,
    sources: str,
    shape: Shape | None = None,
    budget: int | None = None,
) -> list[Pack]:
    """Packs of these published concepts: one a base, or several where a budget in bytes asks for it.

    shape: how much of the numbers to keep; None keeps all of them, or what the budget has room for.
    budget: not for packages of one concept each.

    Raises:
        UserError: the budget is too small for one concept, or a base is not in the store.
    """
    by_base: dict[str, list[Member]] = defaultdict(list)
    for entry in entries:
        by_base[entry.base].append(Member(concept=entry.concept, adapter=entry.adapter, digest=entry.digest))
    packs = []
    for base, group in by_base.items():
        chosen, many = shape or Shape(), len(group)
        if budget is not None:
            ladder = ONNX_LADDER if format == "onnx" else LADDER
            chosen, many = _fitting(store, base, group, budget, shape, ladder)
        settings: dict[str, Any] = {"format": format, "side": side, "shape": chosen, "budget": budget}
        for start in range(0, len(group), many):
            members = tuple(group[start : start + many])
            packs.append(Pack(members=members, base=base, sources=sources, **settings))
    return packs


def _fitting(
    store: Store,
    base: str,
    members: Sequence[Member],
    budget: int,
    shape: Shape | None,
    ladder: tuple[Shape, ...],
) -> tuple[Shape, int]:
    generator = base_generator(*read_base(store, f"bases/{base}"))
    ranks = _ranks(store, members, base, generator.config) or searched_ranks(generator)
    try:
        return fit(generator, ranks, concepts=len(members), budget=budget, shape=shape, ladder=ladder)
    except ValueError as error:
        raise UserError(f"--max-mb: {error}; allow more.") from error


def _ranks(store: Store, members: Sequence[Member], base: str, model: GeneratorConfig) -> Ranks:
    """Those of the first adapter that can be read; adapters of one base have the same. Empty where none can."""
    for member in members:
        with suppress(UserError):
            return read_adapter(store, member.adapter, base, model)[0].ranks
    return {}


def update_of(store: Store, pack: Pack, since: str) -> Pack:
    """The pack as one that goes on from an earlier one, whose digest `since` begins.

    Raises:
        UserError: there is no such pack, or it is of another base, format, size of images or precision.
    """
    old = find_pack(store, since)
    ours, theirs = pack.spec, old.config
    for key in ("format", "side", "precision", "rank_cap"):
        if theirs[key] != ours.config[key]:
            raise UserError(
                f"--since: pack {old.digest} has {key} {theirs[key]}, this one has {ours.config[key]}; "
                "export a whole pack instead."
            )
    if old.inputs["base"] != pack.base:
        raise UserError(
            f"--since: pack {old.digest} is of base {old.inputs['base']}, these adapters are of {pack.base}; "
            "export a whole pack instead."
        )
    if pack.format == "coreml-single":
        raise UserError("--since: packages of one concept each are whole by themselves; leave it out.")
    parts = {name: getattr(pack, name) for name in pack.__dataclass_fields__}
    return Pack(**{**parts, "since": old.digest})


def find_pack(store: Store, digest: str) -> Manifest:
    """The pack whose digest begins with these digits.

    Raises:
        UserError: there is none, or several.
    """
    digests = sorted({key.split("/")[1] for key in store.list(f"packs/{digest}")})
    if len(digests) != 1:
        found = f"there are {', '.join(digests)}; give more digits" if digests else "`farm export` makes them"
        raise UserError(f"{store.url} holds no one pack {digest}: {found}.")
    manifest = find(store, f"packs/{digests[0]}")
    if manifest is None:
        raise UserError(f"{store.url} holds no finished pack {digest}: `farm export` makes them.")
    return manifest
