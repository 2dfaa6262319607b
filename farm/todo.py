"""What of a farm's plan is not in its store yet."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace

from farm.artifacts import find
from farm.glance import Documents
from farm.plan import Plan
from farm.publishing import due, unfit
from farm.standing import Seen, look, quarantined
from farm.store import Store


@dataclass(frozen=True)
class Todo:
    """What is missing from the store. An entry's inputs may be missing too: stages run in order."""

    sources: bool
    selection: bool
    comparisons: tuple[str, ...]
    edits: tuple[str, ...]
    base: bool
    ranks: bool
    adapters: tuple[str, ...]
    publish: tuple[str, ...]

    def __bool__(self) -> bool:
        return any(getattr(self, step.name) for step in fields(self))

    @property
    def names(self) -> dict[str, tuple[str, ...]]:
        """The `stages` that make what all concepts share, and concepts by what of theirs is missing."""
        shared = ("sources", "selection", "base", "ranks")
        missing = {"stages": tuple(name for name in shared if getattr(self, name))}
        return missing | {name: getattr(self, name) for name in ("edits", "adapters", "publish")}

    def of(self, concepts: Collection[str], shared: Collection[str]) -> Todo:
        """What of it these concepts need. shared: those whose edits the base or the ranks are made of."""
        edited = {*concepts, *(shared if self.base or self.ranks else ())}
        return replace(
            self,
            comparisons=tuple(c for c in self.comparisons if c in edited),
            edits=tuple(c for c in self.edits if c in edited),
            adapters=tuple(c for c in self.adapters if c in concepts),
            publish=tuple(c for c in self.publish if c in concepts),
        )

    def lines(self, stages: Sequence[str]) -> list[str]:
        """What these stages would do, a line a step."""
        steps = [
            ("concepts", self.sources, "ingest the photographs"),
            ("concepts", self.selection, "choose the training images"),
            ("concepts", self.comparisons, f"compare the teachers of {_names(self.comparisons)}"),
            ("concepts", self.edits, f"edit {_names(self.edits)}"),
            ("base", self.base, "pretrain the base"),
            ("ranks", self.ranks, "search the ranks"),
            ("adapters", self.adapters, f"train the adapters of {_names(self.adapters)}"),
            ("adapters", self.publish, f"publish {_names(self.publish)}"),
        ]
        return [f"would {step}" for stage, wanted, step in steps if wanted and stage in stages]


def _names(concept_ids: Sequence[str]) -> str:
    return f"{len(concept_ids)} concept{'s' * (len(concept_ids) > 1)}: {', '.join(concept_ids)}"


def make_todo(store: Store, plan: Plan, seen: Seen | None = None) -> Todo:
    """Look at the store: what of the plan is not there. A quarantined concept needs no more than it has.

    seen: what a look at the store has found already.
    """
    seen = seen or look(Documents(store), plan)
    found = seen.store
    ids = [concept.id for concept in plan.config.catalogue]
    comparisons = tuple(c for c in ids if plan.compared(c) and find(found, plan.comparison(c).path) is None)
    ids = [concept_id for concept_id in ids if quarantined(found, plan, concept_id) is None]
    adapters = {concept_id: find(found, plan.adapter(concept_id).path) for concept_id in ids}
    return Todo(
        sources=find(found, plan.sources.path) is None,
        selection=find(found, plan.selection.path) is None,
        comparisons=comparisons,
        edits=tuple(c for c in ids if find(found, plan.quality(c).path) is None),
        base=find(found, plan.base.path) is None,
        ranks=find(found, plan.ranks.path) is None,
        adapters=tuple(c for c in ids if adapters[c] is None),
        publish=tuple(
            c
            for c, manifest in adapters.items()
            if manifest is None or (due(seen.records.get(c), manifest.digest) and unfit(plan, manifest) is None)
        ),
    )
