"""What became of the concepts so far, as the manifests say: kept from training, or chosen for the base."""

from __future__ import annotations

from collections.abc import Sequence

from farm.artifacts import find
from farm.plan import Plan
from farm.store import Store


def quarantined(store: Store, plan: Plan, concept_id: str) -> str | None:
    """Why a concept is not to be trained, None where it may or where that is not known yet."""
    if plan.compared(concept_id):
        comparison = find(store, plan.comparison(concept_id).path)
        if comparison is not None and comparison.summary["teacher"] is None:
            return "none of its teachers makes good edits (see `farm teachers compare`); give it another one"
    manifest = find(store, plan.quality(concept_id).path)
    reason: str | None = manifest.summary["quarantined"] if manifest else None
    return reason


def usable(store: Store, plan: Plan, concept_ids: Sequence[str]) -> list[str]:
    """Those of the concepts that are not quarantined."""
    return [concept_id for concept_id in concept_ids if quarantined(store, plan, concept_id) is None]


def base_concepts(store: Store, plan: Plan) -> list[str]:
    """The concepts the base learns, less those quarantined; none where they are still to be chosen."""
    if plan.config.base.representatives is None:
        return usable(store, plan, plan.config.base.concepts)
    manifest = find(store, plan.representatives.path)
    return list(manifest.summary["concepts"]) if manifest else []
