"""Quality control of a concept's edits: which ones are learned from, after further attempts at the bad ones."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass

from e2gan.pairs import Image, Pairs, read_table
from farm.artifacts import FileEntry, commit, open_artifact
from farm.editors import EditorSettings
from farm.plan import Plan
from farm.quality.judge import Verdict, judge, quarantine
from farm.quality.measure import Measures
from farm.stages.edit import edit_units
from farm.stages.ingest import source_images
from farm.stages.select import selected_ids
from farm.stages.units import Receipt, Unit, cut_units, undone
from farm.store import Store

HOPELESS = 0.5
"""Of `quality.min_good`: a concept with a smaller share of good edits is not edited again, it is quarantined."""


@dataclass
class _Standing:
    """The latest attempt at every edit of a concept. unit: that made it, by id."""

    measures: dict[str, Measures]
    unit: dict[str, Unit]
    verdicts: dict[str, Verdict]
    attempts: int  # further attempts, in images
    todo: list[Unit]  # what must be done before this is final
    receipts: list[Receipt]  # of further attempts


def judge_edits(store: Store, plan: Plan, concept_id: str) -> list[Unit]:
    """Commit `quality/<concept>/<digest>`, or return the further attempts that are to be made first.

    Files: `quality.parquet`, a row an edit, and the further attempts. Its columns: `id`, `good`, `reasons`, `attempts`,
    `file` (where its last attempt is: below this folder with attempts > 1, else below the edits'), and the measures.
    """
    standing = _stand(store, plan, concept_id)
    if standing.todo:
        return standing.todo
    reasons = Counter(reason for verdict in standing.verdicts.values() for reason in verdict.reasons)
    good = {image_id for image_id, verdict in standing.verdicts.items() if verdict.good}
    summary = {
        "images": len(standing.verdicts),
        "good": len(good),
        "left_out": {i: list(v.reasons) for i, v in standing.verdicts.items() if not v.good},
        "reasons": dict(sorted(reasons.items())),
        "attempts": standing.attempts,
        "rescued": sum(standing.unit[image_id].attempt > 0 for image_id in good),
        "quarantined": _quarantine(store, plan, standing, good),
    }
    files: dict[str, bytes | FileEntry] = {n: entry for one in standing.receipts for n, entry in one.files.items()}
    files["quality.parquet"] = _table(standing)
    spec, seconds = plan.quality(concept_id), sum(receipt.seconds for receipt in standing.receipts)
    commit(store, spec, files, wall_seconds=seconds, device_seconds=seconds, summary=summary)
    return []


def edited_pairs(store: Store, plan: Plan, concept_id: str, split: str) -> Pairs:
    """Photos and good edits of one split of a concept."""
    import pyarrow.parquet as pq

    checked = open_artifact(store, plan.quality(concept_id).path)
    table = pq.read_table(io.BytesIO(checked.read("quality.parquet")), columns=["id", "good", "attempts", "file"])
    wanted = set(selected_ids(store, plan)[split])
    rows = [row for row in table.to_pylist() if row["good"] and row["id"] in wanted]
    edits: dict[str, Image] = {}
    first = open_artifact(store, plan.edits(concept_id).path)
    for file, attempts in sorted({(row["file"], row["attempts"]) for row in rows}):
        images = read_table((checked if attempts > 1 else first).read(file))
        edits |= {row["id"]: images[row["id"]] for row in rows if row["file"] == file and row["attempts"] == attempts}
    photos = source_images(store, plan.sources.path)
    return Pairs.from_images(photos, edits, selected_ids(store, plan)[split])


def _stand(store: Store, plan: Plan, concept_id: str) -> _Standing:
    config = plan.config.quality
    standing = _Standing({}, {}, {}, 0, [], [])
    first = edit_units(store, plan, concept_id)
    _take(store, standing, first)
    retries = config.retries if _seeded(plan, concept_id, first[0].teacher) else 0
    for attempt in range(retries + 1):
        standing.verdicts = judge(list(standing.measures.values()), config)
        bad = [image_id for image_id, verdict in standing.verdicts.items() if not verdict.good]
        share = 1 - len(bad) / len(standing.verdicts)
        if not bad or attempt == retries or share < HOPELESS * config.min_good:
            break
        folder, name = plan.quality(concept_id).path, f"retry-{attempt + 1}"
        units = cut_units(concept_id, first[0].teacher, folder, name, bad, attempt + 1)
        standing.todo = undone(store, units)
        if standing.todo:
            break
        _take(store, standing, units)
        standing.receipts += [unit.receipt(store) for unit in units]
        standing.attempts += len(bad)
    return standing


def _take(store: Store, standing: _Standing, units: list[Unit]) -> None:
    for unit in units:
        for measures in unit.measured(store):
            standing.measures[measures.id], standing.unit[measures.id] = measures, unit


def _seeded(plan: Plan, concept_id: str, teacher: str) -> bool:
    settings: EditorSettings = plan.config.candidates(concept_id)[teacher]
    return settings.seeded


def _quarantine(store: Store, plan: Plan, standing: _Standing, good: set[str]) -> str | None:
    if reason := quarantine(standing.verdicts, plan.config.quality):
        return reason
    selected = selected_ids(store, plan)
    for split, fewest in (("train", 1), ("validation", 2), ("test", 2)):
        left = len(good.intersection(selected[split]))
        if left < fewest:
            return f"{left} of its {split} edits are good, at least {fewest} are needed"
    return None


def _table(standing: _Standing) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from farm.quality.measure import as_columns

    rows = [
        {
            "id": image_id,
            "good": verdict.good,
            "reasons": list(verdict.reasons),
            "attempts": standing.unit[image_id].attempt + 1,
            "file": standing.unit[image_id].files[0],
        }
        for image_id, verdict in standing.verdicts.items()
    ]
    table = pa.Table.from_pylist(rows)
    for name, column in as_columns([standing.measures[image_id] for image_id in standing.verdicts]).items():
        if name not in table.column_names:
            table = table.append_column(name, column)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="none")
    return sink.getvalue()
