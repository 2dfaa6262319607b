"""The judgement over a concept's edits: which deserve to be learned from, and why the others do not.

Absolute limits catch what is bad in any concept, and a concept that is bad altogether. But a sepia concept has one hue
and a make-up concept changes little, so what lies near a limit is held against the rest of its concept: its distance
from the concept's median in robust standard deviations (1.4826 median absolute deviations), which stand firm while
fewer than half of the edits are bad. The numbers below were found on edits of trained style networks and image filters,
and checked on others; `tests/farm/test_sabotage.py` tells how well they do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from farm.quality.measure import Measures

MIN_CONCEPT = 12
"""With fewer edits nobody can say what is usual in a concept: only the absolute limits judge."""

NEAR_LIMIT = 3.0
"""Robust standard deviations that make an edit beyond a limit an outlier where its concept lies near the limit."""

Flags = NDArray[np.bool_]
Column = NDArray[np.float64]


class QualityConfig(BaseModel):
    """Quality control of the edits.

    enabled: off, every edit that is an image is learned from. retries: further attempts at a rejected edit, where the
        teacher makes another edit of another seed. min_good: a concept of which a smaller share of edits is good is
        quarantined. clip: a CLIP model (a folder or a hub id) to see whether edits follow the prompt; without it
        nothing does.
    The limits, on the scales of `Measures`: min_spread: less is one flat colour. min_change: less is no edit.
        max_monochrome: more has collapsed to one colour. min_match: less is the edit of another photo.
        max_misalignment: more is cropped or moved. min_distinct: edits of unlike photos that are nearer to each other
        than this, root mean square of 0..1, are duplicates. min_text_direction: less is against the prompt.
    outlier: robust standard deviations from the concept's median at which an edit is bad for being unlike the others.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = True
    retries: int = Field(default=2, ge=0)
    min_good: float = Field(default=0.5, ge=0, le=1)
    clip: str | None = None
    min_spread: float = Field(default=0.02, ge=0)
    min_change: float = Field(default=0.012, gt=0)
    max_monochrome: float = Field(default=0.97, ge=0)
    min_match: float = 1.75
    max_misalignment: float = 0.05
    min_distinct: float = Field(default=0.015, ge=0)
    min_text_direction: float = 0.0
    outlier: float = Field(default=5.0, ge=NEAR_LIMIT)


@dataclass(frozen=True)
class Verdict:
    """reasons: none for a good edit, else some of `failed`, `blank`, `no-op`, `colour-collapse`, `wrong-image`,
    `cropped`, `duplicate`, `against-prompt`, in this order; the first two come alone.
    """

    good: bool
    reasons: tuple[str, ...] = ()


def judge(measures: Sequence[Measures], config: QualityConfig) -> dict[str, Verdict]:
    """Judge all edits of one concept together, by id."""
    reasons: dict[str, list[str]] = {one.id: [] for one in measures}
    pictures = []
    for one in measures:
        if one.failed is not None:
            reasons[one.id].append("failed")
        elif config.enabled and one.spread < config.min_spread:
            reasons[one.id].append("blank")
        else:
            pictures.append(one)
    if config.enabled and pictures:
        for reason, found in _findings(pictures, config).items():
            for one, bad in zip(pictures, found, strict=True):
                if bad:
                    reasons[one.id].append(reason)
    return {name: Verdict(good=not why, reasons=tuple(why)) for name, why in reasons.items()}


def quarantine(verdicts: Mapping[str, Verdict], config: QualityConfig) -> str | None:
    """Why a concept is not to be learned at all, as a sentence without a full stop, or None."""
    good = sum(verdict.good for verdict in verdicts.values())
    if good >= config.min_good * len(verdicts):
        return None
    reasons = Counter(verdict.reasons[0] for verdict in verdicts.values() if not verdict.good)
    told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    return f"only {good} of {len(verdicts)} edits are good, quality.min_good asks for {config.min_good:.0%}: {told}"


def _findings(pictures: Sequence[Measures], config: QualityConfig) -> dict[str, Flags]:
    """Which pictures are bad, by reason in the order of `Verdict`."""
    change = _column([one.change for one in pictures])
    monochrome = _column([one.monochrome for one in pictures])
    structure = _column([one.structure for one in pictures])
    match = _column([100.0 if one.match is None else one.match for one in pictures])  # 100: nothing speaks against it
    misalignment = _column([one.misalignment for one in pictures])
    direction = _column([1.0 if one.text_direction is None else one.text_direction for one in pictures])

    found = {
        "no-op": change < config.min_change,
        "colour-collapse": monochrome > config.max_monochrome,
        "wrong-image": match < config.min_match,
        "cropped": misalignment > config.max_misalignment,
        "duplicate": _duplicates(pictures, structure, config.min_distinct),
        "against-prompt": direction < config.min_text_direction,
    }
    if len(pictures) < MIN_CONCEPT:
        return found

    usual = ~np.any(np.stack([*found.values()]), axis=0)
    if 2 * usual.sum() < len(pictures):  # bad altogether, and its few good ones are what is unusual
        usual[:] = True

    def unusual(values: Column, floor: float) -> Column:
        centre = np.median(values[usual])
        deviation = 1.4826 * np.median(np.abs(values[usual] - centre))
        distances: Column = (values - centre) / max(deviation, floor)
        return distances

    # Less sure than the limit, but far from the rest: a no-op that went through an autoencoder, for one.
    found["no-op"] |= (change < 4 * config.min_change) & (unusual(np.log(change + 1e-4), 0.2) < -config.outlier)
    unlike = np.minimum(unusual(np.log(match.clip(0.5)), 0.15), unusual(np.log(structure.clip(0.05)), 0.1))
    found["wrong-image"] |= (match < 2 * config.min_match) & (unlike < -config.outlier)
    found["against-prompt"] |= unusual(direction, 0.02) < -config.outlier

    # Beyond the limit, but in a concept that is itself near it: bad only if it is far from the rest, or if the concept
    # is beyond the limit too.
    for reason, values, limit, floor in (
        ("colour-collapse", monochrome, config.max_monochrome, 0.02),
        ("cropped", misalignment, config.max_misalignment, 0.03),
    ):
        found[reason] &= (unusual(values, floor) > NEAR_LIMIT) | (np.median(values) > limit)

    # Six numbers wander further than one: 6.4 is to six what 5 deviations are to one.
    found["colour-collapse"] |= _unlike_palette(pictures, usual) > np.hypot(config.outlier, 4)
    return found


def _column(values: Sequence[float]) -> Column:
    return np.array(values, np.float64)


def _unlike_palette(pictures: Sequence[Measures], usual: Flags) -> Column:
    """Every edit's distance from the concept's colours: Mahalanobis', with mean and covariance of the nearest three
    quarters of the usual edits.
    """
    floor = 0.02
    means = [[one.lightness, one.red_green, one.yellow_blue] for one in pictures]
    spreads = [[one.lightness_spread, one.red_green_spread, one.yellow_blue_spread] for one in pictures]
    points = np.hstack([means, 0.2 * np.log(np.array(spreads) + floor)])
    dimensions = points.shape[1]
    centre = np.median(points[usual], 0)
    width = 1.4826 * np.median(np.abs(points[usual] - centre), 0)
    distance: Column = np.linalg.norm((points - centre) / np.maximum(width, floor), axis=1)
    for _ in range(3):
        core = points[usual & (distance <= np.quantile(distance[usual], 0.75))]
        covariance = 1.6 * np.cov(core.T)  # 1.6: what leaving the far quarter out makes too small
        own = min(1.0, dimensions / len(core))  # a small sample knows little of how its numbers go together
        covariance = (1 - own) * covariance + np.diag(own * np.diag(covariance) + floor**2)
        offset = points - core.mean(0)
        distance = np.sqrt((offset * np.linalg.solve(covariance, offset.T).T).sum(1))
    return distance


def _duplicates(pictures: Sequence[Measures], structure: Column, min_distinct: float) -> Flags:
    """Edits that have a twin, made of an unlike photo, which keeps more of its own photo's structure than they do."""
    edits = _distances([one.descriptor for one in pictures])
    sources = _distances([one.source_descriptor for one in pictures])
    twins = (edits < min_distinct) & (sources > 4 * min_distinct)
    order = np.argsort(np.argsort(-structure, kind="stable"))  # 0 is the best
    flags: Flags = np.any(twins & (order[None] < order[:, None]), axis=1)
    return flags


def _distances(thumbnails: Sequence[bytes]) -> Column:
    """Root mean square differences, 0..1, of all thumbnails to all: `[n, n]`."""
    pixels = np.stack([np.frombuffer(one, np.uint8) for one in thumbnails]) / 255
    squares = (pixels**2).sum(1)
    between = (squares[:, None] + squares - 2 * pixels @ pixels.T).clip(0)
    distances: Column = np.sqrt(between / pixels.shape[1])
    return distances
