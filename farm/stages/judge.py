"""Judging a generator on a concept's test split, and the pictures that show it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from e2gan.features import CleanFidFeatures, FeatureExtractor, UntrainedFeatures
from e2gan.infer import edit_images
from e2gan.metrics import Scores, evaluate
from e2gan.model import Generator
from e2gan.text import ClipTextEncoder, HashingTextEncoder, TextEncoder
from farm.config import FarmConfig, TextConfig
from farm.errors import UserError
from farm.plan import Plan
from farm.stages.edit import edited_pairs
from farm.store import Store

Pictures = tuple[Tensor, Tensor, Tensor]
"""Photos, the teacher's edits and the student's, each uint8 `[n, 3, h, w]`."""


def judge(
    store: Store, plan: Plan, concept_id: str, generator: Generator, text: Tensor, *, split: str = "test"
) -> tuple[Scores, Pictures]:
    """Edit the split's photos and score the result against the teacher's edits, in -1..1."""
    pairs = edited_pairs(store, plan, concept_id, split)
    edited = edit_images(generator, text, pairs.source)
    scores = evaluate(edited, pairs.target, pairs.source, [extractor(plan.config.evaluation.inception)])
    return scores, (pairs.source, pairs.target, edited)


@lru_cache(maxsize=1)
def extractor(inception: str | None) -> FeatureExtractor:
    """Inception's features where its weights are given, else untrained ones.

    Raises:
        UserError: the weights are not at `evaluation.inception`.
    """
    if inception is None:
        return UntrainedFeatures()
    try:
        return CleanFidFeatures(inception)
    except ValueError as error:
        raise UserError(f"evaluation.inception: {error}") from error


def text_embedding(config: FarmConfig, prompt: str) -> Tensor:
    """A prompt's embedding, float32 `[77, 768]`.

    Raises:
        UserError: CLIP's weights are missing, or the prompt has no words.
    """
    encoder = _text_encoder(config.text)
    try:
        return encoder(prompt)
    except ValueError as error:
        raise UserError(f"catalogue: the prompt {prompt!r} cannot be encoded: {error}.") from error


@lru_cache(maxsize=1)
def _text_encoder(config: TextConfig) -> TextEncoder:
    if config.encoder == "hashing":
        return HashingTextEncoder()
    try:
        return ClipTextEncoder(config.path or "")
    except ValueError as error:
        raise UserError(f"text.path: {error}") from error


def spread(pictures: Pictures, count: int) -> Pictures:
    """`count` pictures spread evenly over the split, so that several photographs are seen."""
    n = len(pictures[0])
    rows = torch.linspace(0, n - 1, min(count, n)).round().long()
    photos, targets, edited = pictures
    return photos[rows], targets[rows], edited[rows]


def picture_sheet(rows: Sequence[Tensor]) -> bytes:
    """Rows of uint8 pictures `[n, 3, h, w]` as one lossless WebP, small ones enlarged, 2 px apart."""
    from PIL import Image as PILImage

    height, width = rows[0].shape[2:]
    factor = max(1, 128 // height)
    gap = 2
    columns = max(len(row) for row in rows)
    sheet = np.full(
        (len(rows) * (height * factor + gap) - gap, columns * (width * factor + gap) - gap, 3),
        255,
        dtype=np.uint8,
    )
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            image = PILImage.fromarray(picture.permute(1, 2, 0).numpy())
            large = np.asarray(image.resize((width * factor, height * factor), PILImage.Resampling.BICUBIC))
            top, left = r * (height * factor + gap), c * (width * factor + gap)
            sheet[top : top + height * factor, left : left + width * factor] = large
    buffer = io.BytesIO()
    PILImage.fromarray(sheet).save(buffer, format="WEBP", lossless=True)
    return buffer.getvalue()
