"""The base's concepts, chosen to stand for all: by clustering what their edits look like (E2GAN section 4.2.1)."""

from __future__ import annotations

import json
import time

from e2gan.embeddings import ClipImageEmbedding, thumbnail_embedding
from e2gan.selection import representative_concepts
from farm.artifacts import Manifest, commit, find
from farm.errors import UserError
from farm.plan import Plan
from farm.stages.quality import edited_pairs
from farm.standing import usable
from farm.store import Store

SAMPLED = 50
"""Edits of a concept that are embedded; the paper samples uniformly and does not say how many."""


def choose_base(store: Store, plan: Plan) -> Manifest:
    """Commit `representatives/<digest>/concepts.json`: `base.representatives` concepts, of each cluster the one nearest
    its centre. Embedded with CLIP where `quality.clip` names it, as in the paper, else with thumbnails. Concepts that
    have no edits, since their teacher failed, are left out.

    Raises:
        UserError: too few concepts are left that are not quarantined, or CLIP's weights are missing.
    """
    started = time.monotonic()
    count, clip = plan.config.base.representatives, plan.config.quality.clip
    assert count is not None
    edited = [concept_id for concept_id in plan.config.eligible if find(store, plan.quality(concept_id).path)]
    eligible = usable(store, plan, edited)
    if count > len(eligible):
        raise UserError(
            f"base.representatives: {count} concepts cannot be chosen among the {len(eligible)} whose edits are good."
        )
    try:
        embed = ClipImageEmbedding(clip) if clip else thumbnail_embedding
        means = {}
        for concept_id in eligible:
            edits = edited_pairs(store, plan, concept_id, "train").target
            means[concept_id] = embed(edits[:: max(1, len(edits) // SAMPLED)][:SAMPLED]).mean(axis=0)
    except ValueError as error:
        raise UserError(f"quality.clip: {error}") from error
    chosen = representative_concepts(means, count, plan.seed("representatives"))
    files = {"concepts.json": (json.dumps(chosen, indent=1) + "\n").encode()}
    left_out = sorted({*plan.config.eligible} - {*eligible})
    summary = {"concepts": chosen, "embedding": "clip" if clip else "thumbnail", "left_out": left_out}
    return commit(store, plan.representatives, files, wall_seconds=time.monotonic() - started, summary=summary)
