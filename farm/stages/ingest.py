"""Photographs to source images: read once, cut, split by photograph, stored as Parquet parts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import lru_cache

from e2gan.pairs import Image, read_table, write_table
from farm.artifacts import Artifact, FileEntry, Manifest, commit, open_artifact
from farm.errors import UserError
from farm.plan import Plan
from farm.sources import Skipped, crops, list_photos, read_photos, split_photos
from farm.store import Store

PART_ROWS = 500


def ingest(store: Store, plan: Plan, on_progress: Callable[[int, int], None]) -> Manifest:
    """Commit `sources/<kind>/<digest>`: `part-*.parquet` and `photos.json`.

    `photos.json`: `{"photos": [{"id", "name", "sha256", "split", "images": [ids]}], "skipped": [{"name", "reason"}]}`.

    Raises:
        UserError: no photograph can be used, or fewer than three can.
    """
    started = time.monotonic()
    config = plan.config.sources
    spec = plan.sources
    total = len(list_photos(config))
    photos, skipped = [], []
    files: dict[str, bytes | FileEntry] = {}
    rows: dict[str, Image] = {}

    def flush() -> None:
        name = f"part-{len(files):05d}.parquet"
        data = write_table(rows)
        store.put(f"{spec.path}/{name}", data)
        files[name] = FileEntry.of(data)
        rows.clear()

    for done, found in enumerate(read_photos(config), 1):
        if isinstance(found, Skipped):
            skipped.append({"name": found.name, "reason": found.reason})
        else:
            images = crops(found, config, plan.config.seed)
            photos.append({"id": found.id, "name": found.name, "sha256": found.sha256, "images": list(images)})
            rows.update(images)
            if len(rows) >= PART_ROWS:
                flush()
        on_progress(done, total)
    if rows:
        flush()
    if not photos:
        raise UserError(
            f"sources.path: none of the {total} images in {config.path or 'the bundle'} can be used, first "
            f"{skipped[0]['name']} ({skipped[0]['reason'].rstrip('.')}); name a folder of photographs of at least "
            f"{config.size} x {config.size} pixels."
        )
    split = split_photos([str(photo["id"]) for photo in photos], config.split, plan.config.seed)
    part_of = {photo_id: part for part, photo_ids in split.items() for photo_id in photo_ids}
    for photo in photos:
        photo["split"] = part_of[str(photo["id"])]
    files["photos.json"] = _json({"photos": photos, "skipped": skipped})
    summary = {
        "photos": len(photos),
        "skipped": skipped,
        "images": sum(len(photo["images"]) for photo in photos),
    }
    return commit(store, spec, files, wall_seconds=time.monotonic() - started, summary=summary)


def split_ids(store: Store, plan: Plan) -> dict[str, list[str]]:
    """Image ids of each split: `{"train": [...], "validation": [...], "test": [...]}`, in the order stored."""
    ids: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for photo in json.loads(open_artifact(store, plan.sources.path).read("photos.json"))["photos"]:
        ids[photo["split"]] += photo["images"]
    return ids


@lru_cache(maxsize=1)
def source_images(store: Store, path: str) -> dict[str, Image]:
    """The source images at `path`, kept from one call to the next: every concept's stages ask for the same ones."""
    return read_images(open_artifact(store, path))


def read_images(artifact: Artifact) -> dict[str, Image]:
    """Every image of an artifact's Parquet parts."""
    images: dict[str, Image] = {}
    for name in artifact.manifest.files:
        if name.endswith(".parquet"):
            images.update(read_table(artifact.read(name)))
    return images


def _json(document: object) -> bytes:
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()
