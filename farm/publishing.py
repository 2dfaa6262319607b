"""Which of a farm's adapters are to be published, by a run and by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from farm.artifacts import Manifest, find, verify
from farm.boards import put_adapter
from farm.errors import UserError
from farm.gate import judgement
from farm.mlflow_runs import Tracker
from farm.plan import Plan
from farm.registry import Entry, Registry
from farm.signing import NOBODY, Keys
from farm.standing import Seen, quarantined
from farm.store import Store


def unfit(plan: Plan, adapter: Manifest) -> str | None:
    """Why the gate does not let the adapter pass, None where it does."""
    return "; ".join(judgement(plan, adapter)) or None


def due(record: Entry | None, digest: str) -> bool:
    """Whether a run publishes this adapter of the concept, if it is good enough.

    Not what is published already, and not what people took out of service: once an adapter was unpublished or rolled
    back, a run leaves it there until `farm publish` puts it back or the configuration makes another adapter.
    """
    return record is None or not ((record.published and record.digest == digest) or digest in record.withdrawn)


def unpublished(plan: Plan, seen: Seen) -> dict[str, str]:
    """Why adapters that are there are not served: not good enough, or taken out of service by hand."""
    found = {}
    for concept in plan.config.catalogue:
        manifest = find(seen.store, plan.adapter(concept.id).path)
        record = seen.records.get(concept.id)
        if manifest is None or (record and record.published and record.digest == manifest.digest):
            continue
        if reason := unfit(plan, manifest):
            found[concept.id] = reason
        elif not due(record, manifest.digest):
            found[concept.id] = f"taken out of service by hand; `farm publish {concept.id}` puts it back"
    return found


@dataclass(frozen=True)
class Publisher:
    """Publishes what a run has made and tells of it. board: where it leaves the curves of what it has trained.
    tracker: who else is told of it."""

    store: Store
    plan: Plan
    keys: Keys
    tell: Callable[..., None]
    board: str | None
    tracker: Tracker | None

    def trained(self, concept_id: str) -> None:
        """An adapter is there that was not when the run began."""
        adapter = find(self.store, self.plan.adapter(concept_id).path)
        if self.board and adapter:
            put_adapter(self.store, f"{self.board}/adapters/{concept_id}", adapter.summary)
        self.publish(concept_id)
        if self.tracker and adapter:
            self.tracker.trained(concept_id, adapter)

    def publish(self, concept_id: str) -> None:
        """Publish the concept's adapter if it is due and good enough."""
        from farm.stages.adapt import publish

        record, digest = Registry(self.store).record(concept_id), self.plan.adapter(concept_id).digest
        facts: dict[str, Any] = {"concept": concept_id}
        if not due(record, digest):
            if record and record.published and record.digest == digest:
                self.tell("publish", "done", **facts, version=record.version, text="by another run")
        elif entry := publish(self.store, self.plan, concept_id, self.keys):
            self.tell("publish", "done", **facts, version=entry.version)
        elif adapter := find(self.store, self.plan.adapter(concept_id).path):
            self.tell("publish", "quarantined", **facts, error=unfit(self.plan, adapter))


def publish_by_hand(store: Store, plan: Plan, concept_id: str, *, force: bool = False, keys: Keys = NOBODY) -> Entry:
    """Publish the concept's adapter, also one that people took out of service.

    force: also one that is not good enough, which the release then says. keys: see `Registry`.

    Raises:
        UserError: there is no such adapter, it is damaged, of which every byte is read, or not good enough.
    """
    spec = plan.adapter(concept_id)
    adapter, quarantine = find(store, spec.path), quarantined(store, plan, concept_id)
    if adapter is None:
        why = f"quarantined: {quarantine}" if quarantine else "it has no adapter yet; `farm run` trains it"
        raise UserError(f"{concept_id} is not published: {why}.")
    why_not = f"quarantined: {quarantine}" if quarantine else unfit(plan, adapter)
    if why_not and not force:
        raise UserError(f"{concept_id} is not published: {why_not}; --force publishes it all the same.")
    for problem in verify(store, spec.path):
        raise UserError(f"{concept_id} is not published: {problem}")
    metrics, base = adapter.summary["metrics"], plan.base.digest
    return Registry(store, keys).publish(
        concept_id, adapter=spec.path, digest=spec.digest, base=base, metrics=metrics, forced=why_not, manifest=adapter
    )
