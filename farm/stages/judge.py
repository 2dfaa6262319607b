"""Judging a generator on a concept's test split."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from e2gan.features import CleanFidFeatures, FeatureExtractor, UntrainedFeatures
from e2gan.infer import edit_images
from e2gan.metrics import Scores, evaluate
from e2gan.model import Generator
from e2gan.text import ClipTextEncoder, HashingTextEncoder, TextEncoder
from farm.config import FarmConfig, TextConfig
from farm.errors import UserError
from farm.plan import Plan
from farm.stages.pictures import Pictures
from farm.stages.quality import edited_pairs
from farm.store import Store


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
        UserError: CLIP's weights are missing, or the prompt has no words or more than are read.
    """
    encoder = _text_encoder(config.text)
    try:
        if lost := encoder.cut(prompt):
            raise UserError(
                f"catalogue: the text encoder reads the first 75 tokens of the prompt {prompt[:40]!r}…, so {lost!r} "
                "would be cut off; shorten the prompt."
            )
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
