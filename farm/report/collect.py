"""What the report shows, read from the store side by side into plain values."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from farm.artifacts import MANIFEST, Artifact, Manifest, Spec, find
from farm.cost.reconcile import reconcile
from farm.errors import IntegrityError
from farm.glance import Documents, kept_at
from farm.plan import Plan
from farm.queue import Queue
from farm.registry import read_record
from farm.report.cards import WEIGHTS, Card, Known, card_of, parameter_count, plot_of, summary_of
from farm.report.charts import chart_of, curve_of, loss_charts
from farm.report.funnel import funnel_of
from farm.report.pictures import CORES, Album, Facts
from farm.report.teachers import sheets_and_left_out, teaching_facts
from farm.stages.pretrain import PREVIEW_CONCEPTS
from farm.standing import base_concepts, glance_at, quarantined
from farm.store import Store
from farm.threads import in_threads

STAGES = ("sources", "selection", "comparison", "edits", "quality", "base", "ranks", "adapter")

Found = TypeVar("Found")


def collect(
    store: Store,
    plan: Plan,
    *,
    failures: Mapping[str, str],
    stage_seconds: Mapping[str, float],
    picture_bytes: int = 3_000_000,
) -> Facts:
    """What the template shows, and `album`, whose pictures are still to be developed: for some `picture_bytes` in all.
    A damaged artifact is among the trouble and otherwise counts as missing."""
    damaged: dict[str, str] = {}

    def sound(owner: str, read: Callable[[], Found]) -> Found | None:
        try:
            return read()
        except IntegrityError as error:
            damaged[owner] = str(error)
            return None

    concepts, documents = plan.config.catalogue, Documents(store, kept_at(plan.config.name))
    ids = [concept.id for concept in concepts]
    records = documents.look("registry/", wanted=lambda key: True)
    seen = glance_at(documents, plan)
    edits_manifests = {f"{plan.edits(concept_id).path}/{MANIFEST}" for concept_id in ids}
    edits_seen = documents.look("edits/", wanted=edits_manifests.__contains__)

    def known(spec: Spec, owner: str) -> Manifest | None:
        return sound(owner, lambda: find(edits_seen if spec.stage == "edits" else seen, spec.path))

    specs = {"sources": plan.sources, "selection": plan.selection, "base": plan.base, "ranks": plan.ranks}
    made = {stage: known(spec, stage) for stage, spec in specs.items()}
    teaching = {
        "comparison": [known(plan.comparison(c), c) if plan.compared(c) else None for c in ids],
        "edits": [known(plan.edits(c), c) for c in ids],
        "quality": [known(plan.quality(c), c) for c in ids],
    }
    adapters = [known(plan.adapter(c), c) for c in ids]
    in_base = sound("base", partial(base_concepts, seen, plan)) or []
    quarantine = {c: sound(c, partial(quarantined, seen, plan, c)) for c in ids}
    failures = {name: why for name, why in failures.items() if not quarantine.get(name)}

    taught = list(zip(*teaching.values(), strict=True))
    album = Album(_pictures(made["base"], taught, adapters, plan), picture_bytes)
    shown: dict[str, Facts | None] = {"teachers": teaching_facts(plan, taught)}
    if pictured := sound("edits", lambda: sheets_and_left_out(album, store, plan, taught)):
        shown["teachers"] = {**teaching_facts(plan, taught), **pictured}
    for stage, read in (("base", base_facts), ("ranks", rank_facts)):
        manifest = made[stage]
        shown[stage] = sound(stage, partial(read, album, Artifact(store, manifest))) if manifest else None
    counts = parameter_counts(store, adapters, sound)
    everything = {c: sound(c, partial(read_record, records, c)) for c in ids}
    reasons = {**damaged, **failures}
    failed = {item.key for item in Queue(store, "adapters").failed()}

    def card(number: int) -> Card:
        c = ids[number]
        known = Known(
            edits=teaching["edits"][number],
            adapter=adapters[number],
            record=everything[c],
            failure=reasons.get(c),
            quarantine=quarantine[c],
            in_base=c in in_base,
            parameters=counts[number],
        )
        return card_of(album, store, plan, concepts[number], known, plan.adapter_key(c) in failed)

    cards = list(in_threads(card, range(len(ids)), max(store.at_once, CORES)))  # most of it is decoding
    cards.sort(key=lambda card: (math.inf if card.ratio is None else card.ratio, card.concept.id))
    again = f"farm run {plan.config.options}"
    trouble = [(name, "failed", reason, again) for name, reason in reasons.items() if name not in ids]
    for state in ("failed", "quarantined", "not published", "not made"):
        trouble += sorted((c.concept.id, state, c.reason, c.remedy) for c in cards if c.state == state)
    manifests = {stage: [manifest] if manifest else [] for stage, manifest in made.items()}
    manifests |= {stage: [m for m in found if m] for stage, found in {**teaching, "adapter": adapters}.items()}
    return {
        "config": plan.config,
        "base_concepts": in_base,
        "paths": {stage: spec.path for stage, spec in specs.items()},
        "sources": made["sources"].summary if made["sources"] else None,
        "selection": made["selection"].summary if made["selection"] else None,
        "cards": cards,
        "distance": plan.score_name,
        "teachers": shown["teachers"],
        "summary": summary_of(cards),
        "funnel": funnel_of(plan, made, taught, cards, quarantine),
        "plot": plot_of(cards, plan.config.adapters.max_l1_ratio),
        "base": shown["base"],
        "ranks": shown["ranks"],
        "costs": costs_of(manifests, stage_seconds),
        "reconciled": reconcile(store, plan, [m for found in manifests.values() for m in found]),
        "trouble": trouble,
        "album": album,
    }


def _pictures(
    base: Manifest | None,
    taught: Sequence[tuple[Manifest | None, Manifest | None, Manifest | None]],
    adapters: Sequence[Manifest | None],
    plan: Plan,
) -> int:
    """About how many pictures there will be."""
    from farm.report.teachers import LEFT_OUT, SHEETS

    compared, _, checked = zip(*taught, strict=True)
    left_out = sum(len(m.summary["left_out"]) for m in checked if m)
    in_base = min(PREVIEW_CONCEPTS, len(base.summary["metrics"])) if base else 0
    sheets = min(SHEETS, sum(m is not None for m in compared))
    return sum(m is not None for m in adapters) + in_base + sheets + min(LEFT_OUT, left_out)


def parameter_counts(
    store: Store, adapters: Sequence[Manifest | None], sound: Callable[[str, Callable[[], int]], int | None]
) -> list[int | None]:
    """The adapters' numbers of parameters. Adapters of one base and size at the same ranks have the same, so that only
    one of them is read."""
    counts: dict[str, int | None] = {}
    found: list[int | None] = []
    for manifest in adapters:
        if manifest is None or WEIGHTS not in manifest.files:
            found.append(None)
            continue
        checks = manifest.summary["checks"]
        key = json.dumps([manifest.files[WEIGHTS].size, checks["base"], checks["other_ranks"]], sort_keys=True)
        if counts.get(key) is None:
            owner = manifest.path.split("/")[1]
            counts[key] = sound(owner, partial(_count, Artifact(store, manifest)))
        found.append(counts[key])
    return found


def _count(artifact: Artifact) -> int:
    return parameter_count(artifact.read(WEIGHTS))


def base_facts(album: Album, artifact: Artifact) -> Facts:
    """The base; its sheet has three rows a concept, of the first of its metrics."""
    scores = artifact.manifest.summary["metrics"]
    pictured = min(PREVIEW_CONCEPTS, len(scores))
    pictures = album.add(artifact.read("preview.webp"), rows=3 * pictured, parts=pictured)
    losses = artifact.manifest.summary["losses"]
    return {
        "parameters": parameter_count(artifact.read("generator.safetensors")),
        "curve": curve_of(losses),
        "charts": loss_charts(losses),
        "concepts": [(*item, picture) for item, picture in zip(scores.items(), pictures, strict=False)],
        "others": list(scores.items())[pictured:],
    }


def rank_facts(_: Album, artifact: Artifact) -> Facts:
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
        "chart": chart_of({name: list(enumerate(values, 1)) for name, values in scores.items()}, whole=True),
        "marks": {name: values.index(min(values)) for name, values in scores.items()},
        "searches": [(name, values, values.index(min(values))) for name, values in scores.items()],
        "layers": [(names, ranks, merged) for (ranks, merged), names in shared.items()],
    }


def costs_of(manifests: Mapping[str, Sequence[Manifest]], stage_seconds: Mapping[str, float]) -> list[Facts]:
    """A row a stage, in the order of the work, then what else this run spent time on."""
    rows = []
    for stage in dict.fromkeys((*STAGES, *stage_seconds)):
        made = manifests.get(stage, ())
        row = {"stage": stage, "artifacts": len(made) if stage in STAGES else None, "run": stage_seconds.get(stage)}
        longest = max((manifest.wall_seconds for manifest in made), default=None)
        rows.append(row | {"longest": longest, "device": sum(m.device_seconds for m in made) or None})
    return rows
