"""What the report says of every concept: what became of it, how good it is, and what to do where something is amiss."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from farm.artifacts import Artifact, Manifest
from farm.catalogue import Concept
from farm.errors import IntegrityError
from farm.plan import Plan
from farm.publishing import unfit
from farm.registry import Entry
from farm.report.charts import curve_of
from farm.report.pictures import Album, Facts, Picture

State = Literal["published", "quarantined", "not published", "failed", "not made", "in the base"]

BINS = 60  # of the plot of ratios
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Card:
    """All there is to say of one concept.

    remedy: the command to use where it is not published. version: the registry's, whichever adapter that is. forced:
    the judgement that its publication passed over. scores: `farm.stages.assess.AdapterScores`; ratio: L1 as a share of
    the untouched photo's, None where the teacher changes nothing. frechet_interval: by the distance's name. size: bytes
    of the adapter's weights.
    """

    concept: Concept
    role: Literal["base", "rank search", "adapter"]
    state: State
    reason: str
    remedy: str
    path: str
    version: int | None = None
    forced: str | None = None
    scores: Mapping[str, Any] | None = None
    frechet_interval: Mapping[str, tuple[float, float]] | None = None
    ratio: float | None = None
    picture: Picture | None = None
    curve: Facts | None = None
    pairs: int | None = None
    seconds: float | None = None
    size: int | None = None
    parameters: int | None = None
    teacher: str | None = None


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of a concept before its pictures are read.

    failure: why it failed, if it did. quarantine: why it is not to be trained. in_base: whether the base learns it.
    parameters: the adapter's count.
    """

    edits: Manifest | None
    adapter: Manifest | None
    record: Entry | None
    failure: str | None
    quarantine: str | None
    in_base: bool
    parameters: int | None


def card_of(album: Album, store: Any, plan: Plan, concept: Concept, known: Known, failed_in_queue: bool) -> Card:
    """One concept's card."""
    config, spec, record = plan.config, plan.adapter(concept.id), known.record
    facts: Facts = {"teacher": known.edits.summary["teacher"] if known.edits else None, "path": spec.path}
    facts["role"] = "base" if known.in_base else "rank search" if concept.id in config.ranks.concepts else "adapter"
    failure = known.failure
    if known.adapter:
        try:
            facts |= adapter_facts(album, Artifact(store, known.adapter)) | {"parameters": known.parameters}
        except IntegrityError as error:
            failure = failure or str(error)
    entry = record if record and record.published else None
    current = entry is not None and entry.adapter == spec.path
    held = known.quarantine or (unfit(plan, known.adapter) if known.adapter else None)
    standing = {
        "published": current,
        "in_base": known.in_base,
        "withdrawn": bool(record and spec.digest in record.withdrawn),
    }
    state, reason = state_of(known.adapter is not None, held, failure=failure, **standing)
    options = config.options
    match state:
        case "failed" if failed_in_queue:
            remedy = f"farm queue retry {concept.id} {options}"
        case "failed" | "not made":
            remedy = f"farm run {options}"
        case "quarantined" if known.quarantine and plan.compared(concept.id):
            remedy = f"farm teachers compare --concept {concept.id} {options}"
        case "quarantined" if known.quarantine:
            remedy = f"farm concepts show {concept.id} {options}"
        case "quarantined":
            remedy = f"farm publish --force {concept.id} {options}"
        case "not published":
            remedy = f"farm publish {concept.id} {options}"
        case _:
            remedy = ""
    if entry and not current:
        reason += f"; version {entry.version} in the registry is another adapter"
    if entry:
        facts |= {"version": entry.version, "forced": entry.forced if current else None}
    return Card(concept=concept, state=state, reason=reason, remedy=remedy, **facts)


def adapter_facts(album: Album, artifact: Artifact) -> Facts:
    """What a card says of an adapter."""
    manifest = artifact.manifest
    scores = manifest.summary["metrics"]
    return {
        "scores": scores,
        "frechet_interval": manifest.summary.get("frechet_interval"),
        "ratio": scores["l1"] / scores["l1_untouched"] if scores["l1_untouched"] else None,
        "picture": album.add(artifact.read("preview.webp"), rows=3)[0],
        "curve": curve_of(manifest.summary["losses"]),
        "pairs": manifest.summary["pairs"],
        "seconds": manifest.wall_seconds,
        "size": manifest.files[WEIGHTS].size,
    }


def state_of(
    made: bool, held: str | None, *, published: bool, withdrawn: bool, in_base: bool, failure: str | None
) -> tuple[State, str]:
    """What became of a concept, and why it is not published. held: why its edits are not to be learned from, or why the
    gate does not let its adapter pass."""
    if failure:
        return "failed", failure
    if published:
        return "published", ""
    if held:
        return "quarantined", held
    if not made:
        return ("in the base", "the base itself makes this edit") if in_base else ("not made", "no adapter yet")
    return "not published", "taken out of service by hand" if withdrawn else "good enough, but not in the registry"


def summary_of(cards: Sequence[Card]) -> Facts:
    """The numbers on top; unseen: of concepts that neither the base nor the rank search has seen."""
    ratios = [card.ratio for card in cards if card.ratio is not None]
    unseen = [card.ratio for card in cards if card.ratio is not None and card.role == "adapter"]
    sizes = [card.size for card in cards if card.size is not None]
    return {
        "states": Counter(card.state for card in cards),
        "ratio": _mean(ratios),
        "ratios": len(ratios),
        "unseen": _mean(unseen),
        "unseens": len(unseen),
        "size": _mean(sizes),
        "largest": max(sizes, default=None),
        "parameters": sorted({card.parameters for card in cards if card.parameters is not None}),
    }


def plot_of(cards: Sequence[Card], limit: float) -> Facts:
    """Every ratio as a dot: (card, bin from the left, level from the bottom). reach: where the axis ends."""
    measured = [(card, card.ratio) for card in cards if card.ratio is not None]
    reach = max(1.2, limit * 1.1, *(ratio for _, ratio in measured)) * 1.001
    filled: Counter[int] = Counter()
    dots = []
    for card, ratio in measured:
        place = int(ratio / reach * BINS)
        dots.append((card, place, filled[place]))
        filled[place] += 1
    return {"dots": dots, "reach": reach, "bins": BINS, "levels": max(filled.values(), default=0)}


def parameter_count(safetensors: bytes) -> int:
    """Numbers in a safetensors file, by its header alone (eight bytes of length, then JSON)."""
    header = json.loads(safetensors[8 : 8 + int.from_bytes(safetensors[:8], "little")])
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
