"""What was predicted of the artifacts of a farm, beside what they took."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from farm.artifacts import DOCUMENT_BYTES, Manifest, dump
from farm.cost.predict import Prediction
from farm.cost.prices import STAGES, StageName
from farm.cost.slots import slots_of
from farm.plan import Plan
from farm.store import Store
from farm.threads import in_threads

KEPT = "prediction.json"
WORK: dict[str, StageName] = {
    **dict.fromkeys(("comparison", "edits", "quality"), "edit"),
    "base": "base",
    "ranks": "ranks",
    "adapter": "adapters",
}
"""The stage whose workers make an artifact, by the artifact's own."""


def keep(store: Store, run_id: str, prediction: Prediction) -> None:
    """Keep what a run was predicted to take, with the run."""
    store.put(f"runs/{run_id}/{KEPT}", dump(prediction))


def predicted(store: Store) -> dict[str, float]:
    """Seconds of artifacts, by folder, as the first run that missed one predicted them. Damaged predictions count for
    nothing."""

    def read(key: str) -> dict[str, float]:
        try:
            return Prediction.model_validate_json(store.get(key, DOCUMENT_BYTES)).artifacts
        except ValidationError:
            return {}

    keys = [key for key in store.list("runs/") if key.endswith(f"/{KEPT}")]
    found: dict[str, float] = {}
    for artifacts in in_threads(read, keys, store.at_once):
        found = artifacts | found
    return found


def reconcile(store: Store, plan: Plan, made: Iterable[Manifest]) -> dict[str, Any]:
    """Fact and prediction by stage and by concept, of the artifacts that are there.

    `{"currency", "priced", "predicted", "stages": [{"stage", "artifacts", "seconds", "work_seconds", "gpu_seconds",
    "money", "foretold": {"artifacts", "seconds", "actual", "ratio"} or None}], "concepts": [{"id", "seconds",
    "foretold", "money"}], "total": a row as a stage's}`. seconds: of the artifacts, as their workers measured them.
    foretold: of those that a prediction had named, what it said, what they took, and the latter over the former.
    """
    told = predicted(store)
    rows: dict[str, list[tuple[StageName, str | None, float, float | None]]] = {stage: [] for stage in STAGES}
    for manifest in made:
        if stage := WORK.get(manifest.stage):
            concept = manifest.path.split("/")[1] if stage in ("edit", "adapters") else None
            rows[stage].append((stage, concept, manifest.wall_seconds, told.get(manifest.path)))
    every = [row for found in rows.values() for row in found]
    concepts: dict[str, list[tuple[StageName, str | None, float, float | None]]] = {}
    for row in every:
        if row[1]:
            concepts.setdefault(row[1], []).append(row)
    return {
        "currency": plan.config.cost.currency,
        "priced": bool(plan.config.cost.nodes),
        "predicted": any(row[3] is not None for row in every),
        "stages": [{"stage": stage, **_row(plan, found)} for stage, found in rows.items()],
        "concepts": [{"id": c.id, **_row(plan, concepts[c.id])} for c in plan.config.catalogue if c.id in concepts],
        "total": {"stage": "total", **_row(plan, every)},
    }


def _together(plan: Plan, stage: StageName) -> int:
    """Workers that are at one artifact side by side, each as long as it takes."""
    if stage == "ranks":
        return min(len(plan.config.ranks.concepts), slots_of(plan.config, stage).count)
    return plan.config.base.workers if stage == "base" else 1


def _row(plan: Plan, rows: Iterable[tuple[StageName, str | None, float, float | None]]) -> dict[str, Any]:
    artifacts, seconds, work, gpus, money = 0, 0.0, 0.0, 0.0, 0.0
    foretold = {"artifacts": 0, "seconds": 0.0, "actual": 0.0}
    for stage, _, took, said in rows:
        together = _together(plan, stage)
        artifacts += 1
        seconds += took
        work += took * together
        gpus += took * together * getattr(plan.config.cluster, stage).gpus
        if plan.config.cost.nodes:
            money += took * together * (slots_of(plan.config, stage).price or 0)
        if said is not None:
            for key, value in (("artifacts", 1), ("seconds", said), ("actual", took)):
                foretold[key] += value
    ratio = foretold["actual"] / foretold["seconds"] if foretold["seconds"] else None
    return {
        "artifacts": artifacts,
        "seconds": round(seconds, 3),
        "work_seconds": round(work, 3),
        "gpu_seconds": round(gpus, 3),
        "money": round(money, 4) if plan.config.cost.nodes else None,
        "foretold": {**foretold, "ratio": ratio} if foretold["artifacts"] else None,
    }
