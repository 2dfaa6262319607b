"""What became of the concepts so far, as the store says: made, kept from training, chosen for the base, published; and
what a stage needs of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from farm.artifacts import MANIFEST, Spec, find
from farm.errors import UserError
from farm.glance import Documents, Glance
from farm.plan import Plan
from farm.registry import Entry, read_records
from farm.store import Reader


@dataclass(frozen=True)
class Seen:
    """What one look found of a farm. records: the registry's. store: has the manifests at hand, to read only."""

    records: Mapping[str, Entry]
    store: Glance


def look(documents: Documents, plan: Plan) -> Seen:
    """Read the registry, then the plan's manifests, but for those of its edits, in a handful of listings and as many
    calls side by side as there is something new to read.

    The registry comes first, so that whatever was published is there.
    """
    records = read_records(documents.look("registry/", wanted=lambda key: True))
    return Seen(records, glance_at(documents, plan))


def glance_at(documents: Documents, plan: Plan) -> Glance:
    """The plan's manifests, but for those of its edits."""
    each = [*map(plan.adapter, ids := [concept.id for concept in plan.config.catalogue]), *map(plan.quality, ids)]
    each += [plan.comparison(concept_id) for concept_id in ids if plan.compared(concept_id)]
    shared = [plan.ranks, plan.base, plan.selection, plan.sources]
    if plan.config.base.representatives is not None:
        shared.append(plan.representatives)
    prefixes = dict.fromkeys(f"{spec.folder.partition('/')[0]}/" for spec in each)
    manifests = {f"{spec.path}/{MANIFEST}" for spec in (*each, *shared)}
    return documents.look(*prefixes, *(f"{spec.path}/" for spec in shared), wanted=manifests.__contains__)


def quarantined(store: Reader, plan: Plan, concept_id: str) -> str | None:
    """Why a concept is not to be trained, None where it may or where that is not known yet."""
    if plan.compared(concept_id):
        comparison = find(store, plan.comparison(concept_id).path)
        if comparison is not None and comparison.summary["teacher"] is None:
            return "none of its teachers makes good edits (see `farm teachers compare`); give it another one"
    manifest = find(store, plan.quality(concept_id).path)
    reason: str | None = manifest.summary["quarantined"] if manifest else None
    return reason


def quarantines(seen: Seen, plan: Plan) -> dict[str, str]:
    """The concepts that are not to be trained, and why."""
    found = {concept.id: quarantined(seen.store, plan, concept.id) for concept in plan.config.catalogue}
    return {concept_id: reason for concept_id, reason in found.items() if reason}


def usable(store: Reader, plan: Plan, concept_ids: Sequence[str]) -> list[str]:
    """Those of the concepts that are not quarantined."""
    return [concept_id for concept_id in concept_ids if quarantined(store, plan, concept_id) is None]


def base_concepts(store: Reader, plan: Plan) -> list[str]:
    """The concepts the base learns, less those quarantined; none where they are still to be chosen."""
    if plan.config.base.representatives is None:
        return usable(store, plan, plan.config.base.concepts)
    manifest = find(store, plan.representatives.path)
    return list(manifest.summary["concepts"]) if manifest else []


def need(store: Reader, spec: Spec, what: str, job: str) -> None:
    """UserError, with the job to run first, unless the artifact is there."""
    if find(store, spec.path) is None:
        raise UserError(f"{what} of this farm is not in {store.url}; run {job} or `farm run` first.")


def need_edits(store: Reader, plan: Plan, concept_ids: Sequence[str], key: str, failures: Mapping[str, str]) -> None:
    """UserError unless all these concepts, which the key names, have edits and one of them good ones.

    failures: why concepts failed in this run.
    """
    for concept_id in concept_ids:
        if find(store, plan.quality(concept_id).path) is None and not quarantined(store, plan, concept_id):
            reason = failures.get(concept_id, "run jobs/build_concepts.py or `farm run` first.")
            raise UserError(f"{key}: {concept_id} has no edits: {reason}")
    if not usable(store, plan, concept_ids):
        why = quarantined(store, plan, concept_ids[0])
        raise UserError(f"{key}: every concept of it is quarantined, first {concept_ids[0]}: {why}.")
