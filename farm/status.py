"""Where every concept stands, read from the store alone."""

from __future__ import annotations

from typing import Any

from farm.artifacts import find
from farm.plan import Plan
from farm.publishing import unfit
from farm.queue import Queue
from farm.registry import Registry
from farm.standing import base_concepts, quarantined
from farm.store import Store


def farm_status(store: Store, plan: Plan) -> dict[str, Any]:
    """`{"farm", "store", "stages": {stage: state}, "concepts": [{"id", "domain", "stages", "published", …}]}`.

    A state is `done`, `missing`, `partial` (edits under way), `queued`, `running`, `withdrawn` (an adapter that was
    unpublished or rolled back), `quarantined` (edits not worth learning from, an adapter that the gate holds back) or
    `failed` (the last two with `error`).
    """
    queue = Queue(store, "adapters")
    pending = {item.key for item in queue.pending()}
    leased = {lease.item.key for lease in queue.leased()}
    failed = {item.key: item for item in queue.failed()}
    records = Registry(store).records()
    concepts = []
    for concept in plan.config.catalogue:
        adapter = find(store, plan.adapter(concept.id).path)
        record = records.get(concept.id)
        entry = record if record and record.published else None
        row: dict[str, Any] = {
            "id": concept.id,
            "prompt": concept.prompt,
            "domain": concept.domain,
            "role": role(store, plan, concept.id),
            "stages": {"edits": _edits(store, plan, concept.id), "adapter": "done" if adapter else "missing"},
            "published": entry.version if entry else None,
            "current": bool(entry and adapter and entry.digest == adapter.digest),
            "metrics": adapter.summary["metrics"] if adapter else None,
            "error": quarantined(store, plan, concept.id),
        }
        key = plan.adapter_key(concept.id)
        if adapter is None and key in failed:
            row["stages"]["adapter"] = "failed"
            row["error"] = (failed[key].error.strip() or "no reason given").splitlines()[-1]
        elif adapter is None and key in pending:
            row["stages"]["adapter"] = "running" if key in leased else "queued"
        row["stages"]["published"] = "done" if row["current"] else "missing"
        if adapter and not row["current"] and (reason := unfit(plan, adapter)):
            row["stages"]["published"], row["error"] = "quarantined", row["error"] or reason
        if adapter and record and adapter.digest in record.withdrawn:
            row["stages"]["published"] = "withdrawn"
        concepts.append(row)
    shared = {"sources": plan.sources, "selection": plan.selection, "base": plan.base, "ranks": plan.ranks}
    return {
        "farm": plan.config.name,
        "store": store.url,
        "stages": {name: "done" if find(store, spec.path) else "missing" for name, spec in shared.items()},
        "concepts": concepts,
    }


def role(store: Store, plan: Plan, concept_id: str) -> str:
    """What a concept is for besides being served: `base`, `ranks` or `adapter`."""
    if concept_id in base_concepts(store, plan):
        return "base"
    return "ranks" if concept_id in plan.config.ranks.concepts else "adapter"


def _edits(store: Store, plan: Plan, concept_id: str) -> str:
    if quarantined(store, plan, concept_id):
        return "quarantined"
    specs = [plan.quality(concept_id), plan.edits(concept_id), plan.comparison(concept_id)]
    if find(store, specs[0].path):
        return "done"
    return "partial" if any(True for spec in specs for _ in store.list(f"{spec.path}/")) else "missing"
