"""One HTML file a run: what was made from what, whether it looks right, how good it is, what failed, what it cost.

`collect` reads the store into plain values and `report.html.j2` shows them. What is missing is None and shows as a
dash, so a farm half done has a report too. Pictures travel inside the file, and it loads nothing.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2

from farm.artifacts import Artifact, Manifest, Spec, find
from farm.catalogue import Concept
from farm.errors import IntegrityError
from farm.plan import Plan
from farm.publishing import unfit
from farm.registry import Registry
from farm.report.pictures import Facts, pictures_of
from farm.report.teachers import teaching_facts
from farm.standing import base_concepts
from farm.store import Store

State = Literal["published", "quarantined", "not published", "failed", "not made", "in the base"]

STAGES = ("sources", "selection", "comparison", "edits", "quality", "base", "ranks", "adapter")
CURVE_POINTS = 120
BINS = 60  # of the plot of ratios


@dataclass(frozen=True, kw_only=True)
class Card:
    """All there is to say of one concept.

    version: the registry's, whichever adapter that is. forced: the judgement that its publication passed over.
    scores: `farm.stages.assess.AdapterScores`; ratio: L1 as a share of the untouched photo's, None where the teacher
    changes nothing. size: bytes of the adapter's weights.
    """

    concept: Concept
    role: Literal["base", "rank search", "adapter"]
    state: State
    reason: str
    path: str
    version: int | None = None
    forced: str | None = None
    scores: Mapping[str, Any] | None = None
    ratio: float | None = None
    picture: Facts | None = None
    curve: Facts | None = None
    pairs: int | None = None
    seconds: float | None = None
    size: int | None = None
    parameters: int | None = None
    teacher: str | None = None


def build_report(store: Store, plan: Plan, *, failures: Mapping[str, str], stage_seconds: Mapping[str, float]) -> bytes:
    """The report as HTML in UTF-8, of whatever the store holds of the plan.

    Args:
        failures: concept (or stage) to the reason it failed in this run.
        stage_seconds: wall seconds of this run by stage, named as in STAGES; others get rows of their own.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(number=_number, count=_count, duration=_duration, size=_size)
    facts = collect(store, plan, failures=failures, stage_seconds=stage_seconds)
    return environment.get_template("report.html.j2").render(facts).strip().encode()


def collect(store: Store, plan: Plan, *, failures: Mapping[str, str], stage_seconds: Mapping[str, float]) -> Facts:
    """What the template shows. A damaged artifact is among the trouble and otherwise counts as missing."""
    damaged: dict[str, str] = {}

    def known(spec: Spec, owner: str) -> Manifest | None:
        try:
            return find(store, spec.path)
        except IntegrityError as error:
            damaged[owner] = str(error)
            return None

    concepts = plan.config.catalogue
    specs = {"sources": plan.sources, "selection": plan.selection, "base": plan.base, "ranks": plan.ranks}
    made = {stage: known(spec, stage) for stage, spec in specs.items()}
    teaching = {
        "comparison": [known(plan.comparison(c.id), c.id) if plan.compared(c.id) else None for c in concepts],
        "edits": [known(plan.edits(concept.id), concept.id) for concept in concepts],
        "quality": [known(plan.quality(concept.id), concept.id) for concept in concepts],
    }
    adapters = [known(plan.adapter(concept.id), concept.id) for concept in concepts]
    shown: dict[str, Facts | None] = {}
    try:
        shown["teachers"] = teaching_facts(store, plan, list(zip(*teaching.values(), strict=True)))
    except IntegrityError as error:
        shown["teachers"], damaged["edits"] = None, str(error)
    for stage, read in (("base", base_facts), ("ranks", rank_facts)):
        manifest = made[stage]
        try:
            shown[stage] = read(Artifact(store, manifest)) if manifest else None
        except IntegrityError as error:
            shown[stage], damaged[stage] = None, str(error)

    reasons = {**damaged, **failures}
    triples = zip(concepts, teaching["edits"], adapters, strict=True)
    cards = [card_of(store, plan, c, edits, adapter, reasons.get(c.id)) for c, edits, adapter in triples]
    cards.sort(key=lambda card: (math.inf if card.ratio is None else card.ratio, card.concept.id))
    ids = {concept.id for concept in concepts}
    trouble = [(name, "failed", reason) for name, reason in reasons.items() if name not in ids]
    for state in ("failed", "quarantined", "not published", "not made"):
        trouble += sorted((card.concept.id, state, card.reason) for card in cards if card.state == state)
    manifests = {stage: [manifest] if manifest else [] for stage, manifest in made.items()}
    manifests |= {stage: [m for m in found if m] for stage, found in {**teaching, "adapter": adapters}.items()}
    return {
        "config": plan.config,
        "base_concepts": base_concepts(store, plan),
        "paths": {stage: spec.path for stage, spec in specs.items()},
        "sources": made["sources"].summary if made["sources"] else None,
        "selection": made["selection"].summary if made["selection"] else None,
        "cards": cards,
        "teachers": shown["teachers"],
        "summary": summary_of(cards),
        "plot": plot_of(cards, plan.config.adapters.max_l1_ratio),
        "base": shown["base"],
        "ranks": shown["ranks"],
        "costs": costs_of(manifests, stage_seconds),
        "trouble": trouble,
    }


def card_of(
    store: Store, plan: Plan, concept: Concept, edits: Manifest | None, manifest: Manifest | None, failure: str | None
) -> Card:
    """One concept's card, `manifest` being its adapter's; `failure` is why it failed, if it did."""
    config, spec = plan.config, plan.adapter(concept.id)
    in_base, searched = concept.id in base_concepts(store, plan), concept.id in config.ranks.concepts
    facts: Facts = {"role": "base" if in_base else "rank search" if searched else "adapter"}
    facts["teacher"] = edits.summary["teacher"] if edits else None
    record = None
    try:
        record = Registry(store).record(concept.id)
        if manifest:
            facts |= adapter_facts(Artifact(store, manifest))
    except IntegrityError as error:
        failure = failure or str(error)
    entry = record if record and record.published else None
    current = entry is not None and entry.adapter == spec.path
    held = unfit(plan, manifest) if manifest else None
    standing = {"published": current, "in_base": in_base, "withdrawn": bool(record and spec.digest in record.withdrawn)}
    state, reason = state_of(manifest is not None, held, failure=failure, **standing)
    if entry and not current:
        reason += f"; version {entry.version} in the registry is another adapter"
    if entry:
        facts |= {"version": entry.version, "forced": entry.forced if current else None}
    return Card(concept=concept, state=state, reason=reason, path=spec.path, **facts)


def adapter_facts(artifact: Artifact) -> Facts:
    """What a card says of an adapter."""
    manifest, weights = artifact.manifest, "adapter_model.safetensors"
    scores = manifest.summary["metrics"]
    return {
        "scores": scores,
        "ratio": scores["l1"] / scores["l1_untouched"] if scores["l1_untouched"] else None,
        "picture": pictures_of(artifact.read("preview.webp"))[0],
        "curve": curve_of(manifest.summary["losses"]),
        "pairs": manifest.summary["pairs"],
        "seconds": manifest.wall_seconds,
        "size": manifest.files[weights].size,
        "parameters": parameter_count(artifact.read(weights)),
    }


def state_of(
    made: bool, held: str | None, *, published: bool, withdrawn: bool, in_base: bool, failure: str | None
) -> tuple[State, str]:
    """What became of a concept, and why it is not published. held: why the gate does not let its adapter pass."""
    if failure:
        return "failed", failure
    if published:
        return "published", ""
    if not made:
        return ("in the base", "the base itself makes this edit") if in_base else ("not made", "no adapter yet")
    if held:
        return "quarantined", held
    return "not published", "taken out of service by hand" if withdrawn else "good enough, but not in the registry"


def base_facts(artifact: Artifact) -> Facts:
    """The base; its picture has three rows a concept, in the order of its metrics."""
    scores = artifact.manifest.summary["metrics"]
    pictures = pictures_of(artifact.read("preview.webp"), len(scores))
    return {
        "parameters": parameter_count(artifact.read("generator.safetensors")),
        "curve": curve_of(artifact.manifest.summary["losses"]),
        "concepts": [(*item, picture) for item, picture in zip(scores.items(), pictures, strict=True)],
    }


def rank_facts(artifact: Artifact) -> Facts:
    """The rank search. searches: concept, its scores by round, the best round. layers: those that share their ranks,
    as (names, rank by round, merged rank); the doubling is the same for every concept, some only stop sooner."""
    document = json.loads(artifact.read("ranks.json"))
    rounds = max(document["concepts"].values(), key=len)
    shared: dict[tuple[tuple[int, ...], int], list[str]] = {}
    for layer, merged in document["ranks"].items():
        shared.setdefault((tuple(done["ranks"][layer] for done in rounds), merged), []).append(layer)
    scores = {name: [done["score"] for done in found] for name, found in document["concepts"].items()}
    return {
        "score": document["score"],
        "rounds": len(rounds),
        "searches": [(name, values, values.index(min(values))) for name, values in scores.items()],
        "layers": [(names, ranks, merged) for (ranks, merged), names in shared.items()],
    }


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


def costs_of(manifests: Mapping[str, Sequence[Manifest]], stage_seconds: Mapping[str, float]) -> list[Facts]:
    """A row a stage, in the order of the work, then what else this run spent time on."""
    rows = []
    for stage in dict.fromkeys((*STAGES, *stage_seconds)):
        made = manifests.get(stage, ())
        row = {"stage": stage, "artifacts": len(made) if stage in STAGES else None, "run": stage_seconds.get(stage)}
        longest = max((manifest.wall_seconds for manifest in made), default=None)
        rows.append(row | {"longest": longest, "device": sum(m.device_seconds for m in made) or None})
    return rows


def curve_of(losses: Sequence[Mapping[str, float]]) -> Facts | None:
    """The training L1, thinned, as points of an SVG polyline in a box of 100 x 24; None without any."""
    if not losses:
        return None
    kept = [losses[i * (len(losses) - 1) // (CURVE_POINTS - 1)] for i in range(CURVE_POINTS)]
    top, end = max(loss["l1"] for loss in kept) or 1, losses[-1]["step"]
    points = dict.fromkeys(f"{100 * loss['step'] / end:.1f},{23 - 22 * loss['l1'] / top:.1f}" for loss in kept)
    return {"points": " ".join(points), "first": losses[0]["l1"], "last": losses[-1]["l1"], "step": int(end)}


def parameter_count(safetensors: bytes) -> int:
    """Numbers in a safetensors file, by its header alone (eight bytes of length, then JSON)."""
    header = json.loads(safetensors[8 : 8 + int.from_bytes(safetensors[:8], "little")])
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _number(value: float | None, digits: int = 3) -> str:
    return "—" if value is None else f"{value:.{digits}f}"


def _count(value: int | None) -> str:
    return "—" if value is None else f"{value:,}"


def _size(value: float | None) -> str:
    return "—" if value is None else f"{value / 1e6:.1f} MB" if value >= 1e6 else f"{value / 1e3:.0f} kB"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "—"
    minutes = round(seconds / 60)
    return f"{seconds:.1f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"
