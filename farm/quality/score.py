"""Comparing teachers: how well each one edits the same few photos for a concept."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from farm.quality.judge import QualityConfig, judge

if TYPE_CHECKING:
    from farm.quality.measure import Measures

ENOUGH_STRUCTURE = 0.6
"""More than this, as far as `Measures.structure` goes, is no better: it would prefer the weaker edit."""

STRONG = 5.0
"""Times `quality.min_change`: an edit that changes so much is strong enough."""

MUCH, TOO_MUCH = 0.6, 1.0
"""Where `Measures.change` begins to be too much, and where hardly anything can be left of the photo."""

FULL_DIRECTION = 0.25
"""CLIP's directional similarity of an edit that follows its prompt well; few reach it."""

PLAIN = {"structure": 0.4, "strength": 0.3, "consistency": 0.3}
WITH_CLIP = {"prompt": 0.4, "identity": 0.2, "structure": 0.15, "strength": 0.15, "consistency": 0.1}
"""What the parts weigh without CLIP and with it."""


@dataclass(frozen=True, kw_only=True)
class TeacherScore:
    """How good a teacher is for a concept. All parts are 0 (bad) to 1, and of its good edits alone.

    total: `good` times the weighted mean of the other parts. good: share of the edits that are. acceptable: whether
    that share is `quality.min_good`. structure: the photo's structure is kept. strength: the edit is neither hardly
    there nor the whole picture. consistency: the edits are equally strong and keep equally much. prompt: they go where
    the prompt points, identity: what CLIP sees in the photo is still there; None without CLIP. uses: the parts in it.
    """

    total: float
    good: float
    acceptable: bool
    structure: float
    strength: float
    consistency: float
    prompt: float | None
    identity: float | None
    uses: tuple[str, ...]


def score_teacher(measures: Sequence[Measures], config: QualityConfig) -> TeacherScore:
    """Score a teacher by its edits of some photos, at least one, for one concept."""
    verdicts = judge(measures, config)
    kept = [one for one in measures if verdicts[one.id].good]
    share = len(kept) / len(measures)
    directions = [one.text_direction for one in kept if one.text_direction is not None]
    identities = [one.identity for one in kept if one.identity is not None]
    parts = {
        "structure": _mean([min(1.0, one.structure / ENOUGH_STRUCTURE) for one in kept]),
        "strength": _mean([_strength(one.change, config.min_change) for one in kept]),
        "consistency": _mean([_evenness([one.change for one in kept]), _evenness([one.structure for one in kept])]),
    }
    if directions and identities:
        parts["prompt"] = _mean([min(1.0, max(0.0, one / FULL_DIRECTION)) for one in directions])
        parts["identity"] = _mean([max(0.0, one) for one in identities])
    weights = WITH_CLIP if "prompt" in parts else PLAIN
    return TeacherScore(
        total=share * sum(weight * parts[name] for name, weight in weights.items()),
        good=share,
        acceptable=share >= config.min_good,
        structure=parts["structure"],
        strength=parts["strength"],
        consistency=parts["consistency"],
        prompt=parts.get("prompt"),
        identity=parts.get("identity"),
        uses=("good", *weights),
    )


def choose(scores: Mapping[str, TeacherScore]) -> str | None:
    """The name of the best teacher, the first one of equals; None when none has enough good edits."""
    fit = {name: score.total for name, score in scores.items() if score.acceptable}
    return max(fit, key=lambda name: fit[name]) if fit else None


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0


def _strength(change: float, least: float) -> float:
    return max(0.0, min(1.0, (change / least - 1) / (STRONG - 1), (TOO_MUCH - change) / (TOO_MUCH - MUCH)))


def _evenness(values: Sequence[float]) -> float:
    """1 for equal positive values, 0 when they differ as much as they are large; 0 for fewer than two."""
    mean = _mean(values)
    return max(0.0, 1 - statistics.pstdev(values) / mean) if len(values) > 1 and mean > 0 else 0.0


def parts_shown(scores: Iterable[Mapping[str, Any]]) -> list[str]:
    """The parts that any of these scores, as dicts, has a value for."""
    every = ("good", *PLAIN, *WITH_CLIP)
    return [part for part in dict.fromkeys(every) if any(score[part] is not None for score in scores)]
