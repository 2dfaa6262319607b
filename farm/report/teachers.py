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
from farm.report.pictures import Album, Facts
from farm.store import Store
from farm.threads import in_threads

PAPER_IMAGES = 1000
"""Images a teacher edits for one concept in the paper, where the selection comes after it."""
SHEETS = 40  # contact sheets shown; the others are in the store
LEFT_OUT = 24  # edits shown of those left out, unless more concepts are quarantined
QUARANTINED = 2  # edits shown of each of those at least
PICTURE_SIDE = 128

Made = tuple[Manifest | None, Manifest | None, Manifest | None]
"""A concept's comparison, edits and quality control."""


def teaching_facts(plan: Plan, made: Sequence[Made]) -> Facts:
    """The numbers; `made` is in the catalogue's order."""
    concepts = plan.config.catalogue
    rows = [row_of(plan, concept.id, *found) for concept, found in zip(concepts, made, strict=True)]
    done = [row for row in rows if row["images"]]
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
        **{"comparisons": [], "more": 0, "left_out": []},
    }


def sheets_and_left_out(album: Album, store: Store, plan: Plan, made: Sequence[Made]) -> Facts:
    """What there is to see: some contact sheets of comparisons, and some edits that were left out.

    Raises:
        IntegrityError: a file is missing or damaged.
    """
    concepts = plan.config.catalogue
    sheets = [(c.id, Artifact(store, found[0])) for c, found in zip(concepts, made, strict=True) if found[0]]
    shown = in_threads(lambda sheet: comparison_of(album, *sheet), sheets[:SHEETS], store.at_once)
    return {
        "comparisons": list(shown),
        "more": max(0, len(sheets) - SHEETS),
        "left_out": left_out(album, store, plan, made),
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


def comparison_of(album: Album, concept_id: str, artifact: Artifact) -> Facts:
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
        "picture": album.add(artifact.read("sheet.webp"), rows=1 + len(scores))[0],
    }


def left_out(album: Album, store: Store, plan: Plan, made: Sequence[Made]) -> list[Facts]:
    """Some of the edits that are not learned from, of quarantined concepts first, else spread over the concepts: photo
    and edit side by side (grey where the teacher gave none), and why."""
    concerned = [
        (concept.id, edits, quality)
        for concept, (_, edits, quality) in zip(plan.config.catalogue, made, strict=True)
        if edits and quality and quality.summary["left_out"]
    ]
    if not concerned:
        return []
    concerned.sort(key=lambda found: found[2].summary["quarantined"] is None)
    quarantined = sum(found[2].summary["quarantined"] is not None for found in concerned)
    concerned = concerned[: max(LEFT_OUT, quarantined)]
    share = max(1, LEFT_OUT // len(concerned))
    chosen: list[tuple[str, Manifest, Manifest, dict[str, list[str]]]] = []
    for concept_id, edits, quality in concerned:
        count = max(share, QUARANTINED) if quality.summary["quarantined"] else share
        bad = list(quality.summary["left_out"].items())
        chosen.append((concept_id, edits, quality, dict(bad[:: max(1, len(bad) // count)][:count])))
    wanted = {image_id for *_, reasons in chosen for image_id in reasons}
    sources = open_artifact(store, plan.sources.path)
    parts = [name for name in sources.manifest.files if name.endswith(".parquet")]
    photos: dict[str, Image] = {}
    for found in in_threads(lambda name: read_table(sources.read(name), wanted), parts, store.at_once):
        photos |= found
    shown = in_threads(lambda one: _left_out_of(album, store, photos, *one), chosen, store.at_once)
    return [facts for found in shown for facts in found]


def _left_out_of(
    album: Album,
    store: Store,
    photos: dict[str, Image],
    concept_id: str,
    edits: Manifest,
    quality: Manifest,
    reasons: dict[str, list[str]],
) -> list[Facts]:
    """Those of one concept; reasons: by the image's id."""
    import pyarrow.parquet as pq

    checked, shown = Artifact(store, quality), []
    columns = ["id", "attempts", "file"]
    for row in pq.read_table(io.BytesIO(checked.read("quality.parquet")), columns=columns).to_pylist():
        if row["id"] in reasons:
            home = checked if row["attempts"] > 1 else Artifact(store, edits)
            photo = photos[row["id"]]
            edit = read_table(home.read(row["file"]), {row["id"]}).get(row["id"], np.full_like(photo, 128))
            facts = {"concept": concept_id, "id": row["id"], "reasons": reasons[row["id"]]}
            both = PIL.Image.fromarray(np.hstack([photo, edit]))
            size = 2 * PICTURE_SIDE, 2 * PICTURE_SIDE * both.height // both.width
            facts["quarantined"] = quality.summary["quarantined"]
            shown.append(facts | {"attempts": row["attempts"], "picture": album.add_photo(both.resize(size))})
    return shown
