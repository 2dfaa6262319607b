"""The teacher's edits of one concept, in parts that are units of work."""

from __future__ import annotations

import time
from functools import lru_cache

from e2gan.pairs import Image, Pairs, write_table
from farm.artifacts import Manifest, Spec, commit, open_artifact
from farm.editors import open_editor, source_seed
from farm.plan import Plan
from farm.stages.ingest import read_images
from farm.stages.select import selected_ids
from farm.store import Store

PART_IMAGES = 50
"""Images a unit of work edits: what is redone when a worker dies."""


def part_count(store: Store, plan: Plan) -> int:
    """How many parts a concept's edits have."""
    return -(-len(_edited_ids(store, plan)) // PART_IMAGES)


def missing_parts(store: Store, plan: Plan, concept_id: str) -> list[int]:
    """The parts not yet in the store."""
    spec = plan.edits(concept_id)
    return [part for part in range(part_count(store, plan)) if not store.exists(_part_key(spec, part))]


def edit_part(store: Store, plan: Plan, concept_id: str, part: int) -> float:
    """Edit one part's images and put them as Parquet; returns the teacher's seconds.

    Raises:
        UserError: the teacher's model is missing or does not do this.
    """
    concept = plan.config.concept(concept_id)
    ids = _edited_ids(store, plan)[part * PART_IMAGES : (part + 1) * PART_IMAGES]
    images = _sources(store, plan.sources.path)
    editor = open_editor(concept.editor, concept_id)
    started = time.monotonic()
    seeds = [source_seed(plan.config.seed, concept_id, image_id) for image_id in ids]
    edited = editor.edit([images[image_id] for image_id in ids], concept.prompt, seeds)
    seconds = time.monotonic() - started
    store.put(_part_key(plan.edits(concept_id), part), write_table(dict(zip(ids, edited, strict=True))))
    return seconds


def commit_edits(store: Store, plan: Plan, concept_id: str, *, wall_seconds: float, device_seconds: float) -> Manifest:
    """Commit `edits/<concept>/<digest>` once all its parts are in the store."""
    spec = plan.edits(concept_id)
    files: dict[str, bytes | None] = {_part_name(part): None for part in range(part_count(store, plan))}
    summary = {"images": len(_edited_ids(store, plan))}
    return commit(store, spec, files, wall_seconds=wall_seconds, device_seconds=device_seconds, summary=summary)


def edited_pairs(store: Store, plan: Plan, concept_id: str, split: str) -> Pairs:
    """Source and edited images of one split of a concept."""
    edits = read_images(open_artifact(store, plan.edits(concept_id).path))
    return Pairs.from_images(_sources(store, plan.sources.path), edits, selected_ids(store, plan)[split])


def _edited_ids(store: Store, plan: Plan) -> list[str]:
    selected = selected_ids(store, plan)
    return [image_id for split in ("train", "validation", "test") for image_id in selected[split]]


@lru_cache(maxsize=1)
def _sources(store: Store, path: str) -> dict[str, Image]:
    """Source images, kept by a worker process from one unit to the next."""
    return read_images(open_artifact(store, path))


def _part_name(part: int) -> str:
    return f"part-{part:05d}.parquet"


def _part_key(spec: Spec, part: int) -> str:
    return f"{spec.path}/{_part_name(part)}"
