"""The teacher's edits of one concept: every selected photo once, good or bad."""

from __future__ import annotations

from farm.artifacts import Manifest, commit
from farm.plan import Plan
from farm.stages.compare import teacher_of
from farm.stages.units import Unit, cut_units, edited_ids
from farm.store import Store


def edit_units(store: Store, plan: Plan, concept_id: str) -> list[Unit]:
    """All units of a concept's edits; its teacher must have been chosen."""
    teacher = teacher_of(store, plan, concept_id)
    assert teacher is not None
    return cut_units(concept_id, teacher, plan.edits(concept_id).path, "part", edited_ids(store, plan))


def commit_edits(store: Store, plan: Plan, concept_id: str) -> Manifest:
    """Commit `edits/<concept>/<digest>` once all its units are done: `images/part-*.parquet` (columns `id`, `image`;
    what failed has no row) and `measures/part-*.parquet` (see `farm.quality.Measures`)."""
    units = edit_units(store, plan, concept_id)
    receipts = [unit.receipt(store) for unit in units]
    summary = {
        "teacher": units[0].teacher,
        "images": sum(len(unit.ids) for unit in units),
        "failed": sum(receipt.failed for receipt in receipts),
    }
    files = {name: entry for receipt in receipts for name, entry in receipt.files.items()}
    spec, seconds = plan.edits(concept_id), sum(receipt.seconds for receipt in receipts)
    return commit(store, spec, files, wall_seconds=seconds, device_seconds=seconds, summary=summary)
