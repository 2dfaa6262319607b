"""Where every concept stands, read from the store alone."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from farm.artifacts import find
from farm.glance import Documents, kept_at
from farm.plan import Plan
from farm.publishing import unfit
from farm.queue import Queue
from farm.standing import base_concepts, look, quarantined
from farm.store import Reader, Store


def farm_status(store: Store, plan: Plan) -> dict[str, Any]:
    """`{"farm", "store", "stages": {stage: state}, "concepts": [{"id", "domain", "stages", "published", …}]}`.

    A state is `done`, `missing`, `partial` (edits under way), `queued`, `running`, `withdrawn` (an adapter that was
    unpublished or rolled back), `quarantined` (edits not worth learning from, an adapter that the gate holds back) or
    `failed` (the last two with `error`).

    What is made last is looked at first, so that nothing falls between two looks while the farm goes on.
    """
    queue = Queue(store, "adapters")
    pending = queue.waiting()
    leased = {lease.item.key for lease in queue.leased()}
    failed = {item.key: item for item in queue.failed()}
    documents = Documents(store, kept_at(plan.config.name))
    seen = look(documents, plan)
    found = seen.store
    edited = {c.id for c in plan.config.catalogue if find(found, plan.quality(c.id).path)}
    begun = found if len(edited) == len(plan.config.catalogue) else documents.look("edits/", wanted=lambda key: False)
    in_base = base_concepts(found, plan)
    concepts = []
    for concept in plan.config.catalogue:
        adapter = find(found, plan.adapter(concept.id).path)
        record = seen.records.get(concept.id)
        quarantine = quarantined(found, plan, concept.id)
        edits = "done" if concept.id in edited else _begun(found, begun, plan, concept.id)
        entry = record if record and record.published else None
        row: dict[str, Any] = {
            "id": concept.id,
            "prompt": concept.prompt,
            "domain": concept.domain,
            "role": role(plan, in_base, concept.id),
            "stages": {"edits": "quarantined" if quarantine else edits, "adapter": "done" if adapter else "missing"},
            "published": entry.version if entry else None,
            "current": bool(entry and adapter and entry.digest == adapter.digest),
            "metrics": adapter.summary["metrics"] if adapter else None,
            "error": quarantine,
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
        "stages": {name: "done" if find(found, spec.path) else "missing" for name, spec in shared.items()},
        "concepts": concepts,
    }


def role(plan: Plan, in_base: Collection[str], concept_id: str) -> str:
    """What a concept is for besides being served: `base`, `ranks` or `adapter`; in_base: as `base_concepts` has it."""
    if concept_id in in_base:
        return "base"
    return "ranks" if concept_id in plan.config.ranks.concepts else "adapter"


def _begun(found: Reader, edits: Reader, plan: Plan, concept_id: str) -> str:
    """`partial` where something of the concept's edits is there: teachers compared, edits made, some of them judged."""
    places = [(edits, plan.edits(concept_id)), (found, plan.quality(concept_id))]
    if plan.compared(concept_id):
        places.append((found, plan.comparison(concept_id)))
    return "partial" if any(True for store, spec in places for _ in store.list(f"{spec.path}/")) else "missing"
