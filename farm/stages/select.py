"""Which source images a concept is edited on: training images by similarity clustering (E2GAN section 4.2.3), or at
random."""

from __future__ import annotations

import json
import time

from torch import Tensor

from e2gan.embeddings import ClipImageEmbedding, Embeddings, OnnxImageEmbedding, thumbnail_embedding
from e2gan.pairs import to_tensor
from e2gan.selection import random_sample, similarity_clusters
from farm.artifacts import Manifest, commit, open_artifact
from farm.config import SelectionConfig
from farm.errors import UserError
from farm.plan import Plan
from farm.stages.ingest import read_images, split_ids
from farm.store import Store


def select(store: Store, plan: Plan) -> Manifest:
    """Commit `selections/<digest>/selection.json`: `{"train": [ids], "validation": [ids], "test": [ids]}`.

    Source images alone decide, so the teacher edits only what was chosen.

    Raises:
        UserError: more clusters than training images, or the embedding's weights are missing.
    """
    started = time.monotonic()
    config = plan.config.selection
    ids = split_ids(store, plan)
    for split in ("validation", "test"):
        if len(ids[split]) < 2:
            raise UserError(
                f"sources.split.{split}: {len(ids[split])} image is too few to judge on, at least 2 are needed; "
                f"raise sources.split.{split} or sources.crops_per_photo, or give more photographs."
            )
    found = len(ids["train"])
    if config.clusters is not None and config.clusters > found:
        raise UserError(
            f"selection.clusters: {config.clusters} clusters need as many training images, there are {found}; "
            f"set selection.clusters to at most {found} or give more photographs."
        )
    if config.clusters is not None and config.method == "random":
        ids["train"] = random_sample(ids["train"], config.clusters, plan.seed("selection"))
    elif config.clusters is not None:
        images = read_images(open_artifact(store, plan.sources.path))
        vectors = _embed(config, to_tensor(images[i] for i in ids["train"]))
        ids["train"] = similarity_clusters(vectors, ids["train"], config.clusters, plan.seed("selection"))
    files = {"selection.json": json.dumps(ids, indent=1).encode()}
    summary = {split: len(chosen) for split, chosen in ids.items()} | {"training_images": found}
    return commit(store, plan.selection, files, wall_seconds=time.monotonic() - started, summary=summary)


def _embed(config: SelectionConfig, images: Tensor) -> Embeddings:
    if config.embedding == "thumbnail":
        return thumbnail_embedding(images)
    assert config.path is not None
    try:
        embed = ClipImageEmbedding(config.path) if config.embedding == "clip" else OnnxImageEmbedding(config.path)
        return embed(images)
    except ValueError as error:
        raise UserError(f"selection.path: {error}") from error


def selected_ids(store: Store, plan: Plan) -> dict[str, list[str]]:
    """The chosen image ids of each split."""
    ids: dict[str, list[str]] = json.loads(open_artifact(store, plan.selection.path).read("selection.json"))
    return ids
