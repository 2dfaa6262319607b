"""How long units of work take: an image that a teacher edits, an image that a network is trained on.

A unit is known by a key that says all its time depends on but the machine, so that what was measured of one artifact,
or by a probe, holds for another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from e2gan.config import TrainConfig
from farm.artifacts import DOCUMENT_BYTES, MANIFEST, Manifest, canonical_json, find
from farm.errors import IntegrityError
from farm.glance import Documents, kept_at
from farm.plan import Plan
from farm.store import NotFoundError, Store

FOLDERS = ("adapters/", "ranks/", "bases/", "quality/", "comparisons/", "edits/", "selections/", "sources/")
TIMED = (
    "batch_size", "optimizer", "frozen", "adversarial_weight", "adversarial_start", "discriminator_channels",
    "gradient_weight", "crop", "precision", "channels_last", "compile",
)  # fmt: skip
"""What of a `TrainConfig` decides how long a step takes."""


class Timed(BaseModel):
    """Seconds that so many units took together. what: the teacher's name, `base` or `adapter`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    what: str
    key: str
    units: float
    seconds: float


class Probe(BaseModel):
    """What a probe measured, kept in the store for the runs that follow. machine: where."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    made_at: str
    machine: str
    timed: tuple[Timed, ...]


@dataclass
class Rates:
    """What was measured, by key. source: where, for a person."""

    source: str
    by_key: dict[str, tuple[float, float]] = field(default_factory=dict)  # units and seconds

    def add(self, timed: Timed) -> None:
        units, seconds = self.by_key.get(timed.key, (0.0, 0.0))
        self.by_key[timed.key] = units + timed.units, seconds + timed.seconds

    def of_key(self, key: str) -> float | None:
        """Seconds a unit; None where that was not measured."""
        units, seconds = self.by_key.get(key, (0.0, 0.0))
        return seconds / units if units else None


def edit_key(fingerprint: Mapping[str, Any], side: int) -> str:
    return canonical_json({"edit": dict(fingerprint), "side": side})


def train_key(stage: str, model: Mapping[str, Any], train: Mapping[str, Any], side: int) -> str:
    """stage: `base` or `adapter`."""
    timed = {name: train.get(name) for name in TIMED}
    return canonical_json({stage: dict(model), "train": timed, "side": side})


def planned_key(plan: Plan, stage: str, train: TrainConfig) -> str:
    return train_key(stage, asdict(plan.config.model), asdict(train), plan.config.sources.size)


def probe_key(farm: str) -> str:
    """Where a farm's probe is kept."""
    return f"costs/{farm}.json"


def kept_probe(store: Store, farm: str) -> Probe | None:
    """What the last probe of this farm measured; None where there was none, or it is damaged."""
    try:
        return Probe.model_validate_json(store.get(probe_key(farm), DOCUMENT_BYTES))
    except (NotFoundError, ValidationError):
        return None


def all_manifests(store: Store, plan: Plan) -> dict[str, Manifest]:
    """Every artifact of the store that a farm's stages make, by folder, also those of earlier configurations. Damaged
    ones are left out."""
    seen = Documents(store, kept_at(plan.config.name)).look(*FOLDERS, wanted=lambda key: key.endswith(f"/{MANIFEST}"))
    found = {}
    for key in seen.documents:
        try:
            if manifest := find(seen, key.removesuffix(f"/{MANIFEST}")):
                found[manifest.path] = manifest
        except IntegrityError:
            continue
    return found


def known_rates(store: Store, farm: str, manifests: Mapping[str, Manifest]) -> list[Rates]:
    """All there are: those of what is in the store first, then those of the farm's last probe."""
    probe = kept_probe(store, farm)
    return [measured(manifests), *([probed(probe.timed, probe.machine)] if probe else [])]


def measured(manifests: Mapping[str, Manifest]) -> Rates:
    """The rates of what is in the store."""
    rates = Rates("artifacts in the store")
    by_digest = {manifest.digest: manifest for manifest in manifests.values()}
    for manifest in manifests.values():
        for timed in _timed(manifest, by_digest):
            rates.add(timed)
    return rates


def probed(timed: Iterable[Timed], machine: str) -> Rates:
    """The rates of a probe."""
    rates = Rates(f"a probe on {machine}")
    for one in timed:
        rates.add(one)
    return rates


def _timed(manifest: Manifest, by_digest: Mapping[str, Manifest]) -> Iterator[Timed]:
    """What one artifact says; nothing where an artifact that it was made from is gone."""
    side = _side(manifest, by_digest)
    if side is None or not manifest.wall_seconds:
        return
    summary, config = manifest.summary, manifest.config
    if manifest.stage == "edits":
        if editor := config.get("editor"):
            yield Timed(
                what=summary["teacher"],
                key=edit_key(editor, side),
                units=summary["images"],
                seconds=manifest.wall_seconds,
            )
        elif compared := by_digest.get(manifest.inputs.get("comparison", "")):
            key = edit_key(compared.config["teachers"][summary["teacher"]], side)
            yield Timed(what=summary["teacher"], key=key, units=summary["images"], seconds=manifest.wall_seconds)
    elif manifest.stage in ("base", "adapter") and summary["losses"]:
        base = manifest if manifest.stage == "base" else by_digest.get(manifest.inputs["base"])
        if base:
            images = summary["losses"][-1]["step"] * config["train"]["batch_size"]
            key = train_key(manifest.stage, base.config["model"], config["train"], side)
            yield Timed(what=manifest.stage, key=key, units=images, seconds=manifest.wall_seconds)


def _side(manifest: Manifest, by_digest: Mapping[str, Manifest]) -> int | None:
    """The side of the images it was made from, in pixels."""
    if manifest.stage == "sources":
        side: int = manifest.config["sources"]["config"]["size"]
        return side
    for name in sorted(manifest.inputs, key=lambda name: name in ("base", "ranks")):  # the long way last
        if (made_from := by_digest.get(manifest.inputs[name])) and (found := _side(made_from, by_digest)):
            return found
    return None
