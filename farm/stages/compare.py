"""Choosing a concept's teacher: all its candidates edit the same few photos, and the best one is kept."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
from torch import Tensor

from e2gan.pairs import Image, read_table, to_tensor
from farm.artifacts import FileEntry, Manifest, commit, find
from farm.plan import Plan
from farm.quality.score import choose, score_teacher
from farm.stages.ingest import source_images
from farm.stages.pictures import picture_sheet
from farm.stages.select import selected_ids
from farm.stages.units import Unit
from farm.store import Store


def comparison_units(store: Store, plan: Plan, concept_id: str) -> list[Unit]:
    """One unit a candidate: it edits `comparison.probes` training photos, spread over the selection."""
    train = selected_ids(store, plan)["train"]
    count = min(plan.config.comparison.probes, len(train))
    ids = tuple(train[n * len(train) // count] for n in range(count))
    folder = plan.comparison(concept_id).path
    return [
        Unit(concept=concept_id, teacher=name, folder=folder, name=name, ids=ids) for name in plan.teachers[concept_id]
    ]


def commit_comparison(store: Store, plan: Plan, concept_id: str) -> Manifest:
    """Commit `comparisons/<concept>/<digest>`: `choice.json`, `sheet.webp` (rows: photos, then every candidate), and
    each candidate's edits with their measures.

    `choice.json`: `{"teacher": name or null, "scores": {name: TeacherScore}, "failed": {name: reasons}}`.
    """
    units = comparison_units(store, plan, concept_id)
    measured = {unit.teacher: unit.measured(store) for unit in units}
    scores = {name: score_teacher(found, plan.config.quality) for name, found in measured.items()}
    failed = {name: sorted({m.failed for m in found if m.failed is not None}) for name, found in measured.items()}
    chosen = choose(scores)
    choice = {"teacher": chosen, "scores": {name: asdict(score) for name, score in scores.items()}, "failed": failed}
    photos = source_images(store, plan.sources.path)
    rows = [to_tensor(photos[i] for i in units[0].ids)]
    for unit in units:
        rows.append(_row(unit, read_table(store.get(f"{unit.folder}/{unit.files[0]}")), photos))
    receipts = [unit.receipt(store) for unit in units]
    files: dict[str, bytes | FileEntry] = {name: entry for one in receipts for name, entry in one.files.items()}
    files["choice.json"] = (json.dumps(choice, indent=1) + "\n").encode()
    files["sheet.webp"] = picture_sheet(rows)
    seconds = sum(receipt.seconds for receipt in receipts)
    summary = {"teacher": chosen, "images": sum(len(unit.ids) for unit in units)}
    spec = plan.comparison(concept_id)
    return commit(store, spec, files, wall_seconds=seconds, device_seconds=seconds, summary=summary)


def teacher_of(store: Store, plan: Plan, concept_id: str) -> str | None:
    """The name of the concept's teacher; None where the comparison found none fit. Its comparison must be there."""
    if not plan.compared(concept_id):
        return next(iter(plan.teachers[concept_id]))
    manifest = find(store, plan.comparison(concept_id).path)
    assert manifest is not None
    teacher: str | None = manifest.summary["teacher"]
    return teacher


def _row(unit: Unit, edits: dict[str, Image], photos: dict[str, Image]) -> Tensor:
    """A candidate's edits in order; a grey picture where there is none."""
    return to_tensor(edits.get(i, np.full_like(photos[i], 128)) for i in unit.ids)
