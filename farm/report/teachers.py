"""The report's part on teachers: which one every concept got, what became of its edits, and the ones left out."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence

import numpy as np
import PIL.Image

from e2gan.pairs import Image, read_table
from farm.artifacts import Artifact, Manifest, open_artifact
from farm.plan import Plan
from farm.quality.score import parts_shown
from farm.report.pictures import Facts, pictures_of
from farm.stages.ingest import read_images
from farm.store import Store

PAPER_IMAGES = 1000
"""Images a teacher edits for one concept in the paper, where the selection comes after it."""
SHEETS = 40  # contact sheets shown; the others are in the store
LEFT_OUT = 24  # edits shown of those left out
PICTURE_SIDE = 128

Made = tuple[Manifest | None, Manifest | None, Manifest | None]
"""A concept's comparison, edits and quality control."""


def teaching_facts(store: Store, plan: Plan, made: Sequence[Made]) -> Facts:
    """What the template shows; `made` is in the catalogue's order.

    Raises:
        IntegrityError: a file is missing or damaged.
    """
    concepts = plan.config.catalogue
    rows = [row_of(plan, concept.id, *found) for concept, found in zip(concepts, made, strict=True)]
    done = [row for row in rows if row["images"]]
    sheets = [(c.id, Artifact(store, found[0])) for c, found in zip(concepts, made, strict=True) if found[0]]
    return {
        "rows": rows,
        "clip": plan.config.quality.clip is not None,
        "paper": PAPER_IMAGES,
        "images": sum(row["generated"] for row in rows) / len(done) if done else None,
        "reasons": dict(sum((Counter(row["reasons"]) for row in rows), Counter()).most_common()),
        "good": sum(row["good"] or 0 for row in rows),
        "edits": sum(row["images"] or 0 for row in rows),
        "attempts": sum(row["attempts"] or 0 for row in rows),
        "rescued": sum(row["rescued"] or 0 for row in rows),
        "comparisons": [comparison_of(concept_id, artifact) for concept_id, artifact in sheets[:SHEETS]],
        "more": max(0, len(sheets) - SHEETS),
        "left_out": left_out(store, plan, [found[2] for found in made]),
    }


def row_of(
    plan: Plan, concept_id: str, comparison: Manifest | None, edits: Manifest | None, quality: Manifest | None
) -> Facts:
    """One concept's row. generated: every image a teacher made for it, probes and further attempts too."""
    names = list(plan.teachers[concept_id])
    chosen = comparison.summary["teacher"] if comparison else names[0] if len(names) == 1 else None
    checked = quality.summary if quality else {}
    parts = (comparison and comparison.summary["images"], edits and edits.summary["images"], checked.get("attempts"))
    quarantined = checked.get("quarantined")
    if comparison and chosen is None:
        quarantined = "none of its teachers makes good edits"
    return {
        "id": concept_id,
        "teacher": chosen,
        "candidates": len(names),
        "generated": sum(part or 0 for part in parts),
        "images": edits.summary["images"] if edits else None,
        **{key: checked.get(key) for key in ("good", "attempts", "rescued")},
        "reasons": checked.get("reasons", {}),
        "quarantined": quarantined,
    }


def comparison_of(concept_id: str, artifact: Artifact) -> Facts:
    """A concept's candidates, best first, and their contact sheet: the photos, then a row a candidate as listed."""
    choice = json.loads(artifact.read("choice.json"))
    scores = choice["scores"]
    return {
        "id": concept_id,
        "teacher": choice["teacher"],
        "scores": sorted(scores.items(), key=lambda item: -item[1]["total"]),
        "parts": parts_shown(scores.values()),
        "failed": choice["failed"],
        "names": list(scores),
        "picture": pictures_of(artifact.read("sheet.webp"))[0],
    }


def left_out(store: Store, plan: Plan, checked: Sequence[Manifest | None]) -> list[Facts]:
    """Some of the edits that are not learned from, spread over the concepts: photo and edit side by side (grey
    where the teacher gave none), and why."""
    import pyarrow.parquet as pq

    found = [
        (concept.id, manifest, list(manifest.summary["left_out"].items()))
        for concept, manifest in zip(plan.config.catalogue, checked, strict=True)
        if manifest and manifest.summary["left_out"]
    ]
    photos = read_images(open_artifact(store, plan.sources.path)) if found else {}
    shown: list[Facts] = []
    for concept_id, manifest, edits in found[:LEFT_OUT]:
        share = max(1, LEFT_OUT // len(found))
        wanted = dict(edits[:: max(1, len(edits) // share)][:share])
        artifact = Artifact(store, manifest)
        columns = ["id", "attempts", "file"]
        for row in pq.read_table(io.BytesIO(artifact.read("quality.parquet")), columns=columns).to_pylist():
            if row["id"] in wanted:
                home = artifact if row["attempts"] > 1 else open_artifact(store, plan.edits(concept_id).path)
                photo = photos[row["id"]]
                edit = read_table(home.read(row["file"])).get(row["id"], np.full_like(photo, 128))
                facts = {"concept": concept_id, "id": row["id"], "reasons": wanted[row["id"]]}
                shown.append(facts | {"attempts": row["attempts"], "picture": _side_by_side(photo, edit)})
    return shown


def _side_by_side(photo: Image, edit: Image) -> Facts:
    both = PIL.Image.fromarray(np.hstack([photo, edit]))
    buffer = io.BytesIO()
    both.resize((2 * PICTURE_SIDE, 2 * PICTURE_SIDE * both.height // both.width)).save(buffer, format="PNG")
    return pictures_of(buffer.getvalue())[0]
