"""How little of the base must be adapted: the doubling rank search (E2GAN, Algorithm 1 and appendix B.2).

Every crucial layer starts at rank 1. A round trains, scores, then doubles every layer's rank up to that
layer's threshold. The search ends when the score saturates or every layer is at its threshold, and the ranks
of the best round are the concept's. New concepts use the layer-wise largest ranks over the searched concepts.

What a round does (train e epochs, measure the Fréchet distance) is the caller's; nothing here needs torch. The schemes
the paper compares the search with (table 5) are here as well.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Ranks = dict[str, int]
"""Layer name to LoRA rank, each at least 1."""


@dataclass(frozen=True, kw_only=True)
class RankRound:
    """One round: the ranks it trained with and the score it reached (finite, lower is better)."""

    ranks: Ranks
    score: float


def layer_threshold(kind: Literal["conv", "linear"], in_channels: int, out_channels: int) -> int:
    """The rank ceiling of one layer, from its size: `in * out / 2048` rounded up to a power of two, at least 1.

    Appendix B.2 sets it "by the size of the layer", in numbers lost with the text; this formula is worked out from the
    LoRA parameters in table 5. With stem, head and linear layers kept at 1, two doublings everywhere give 55,574, its
    0.056 M exactly. Its 0.164 M is 163,094: four doublings with 64-128 held at 4 and the larger layers at 16, so the
    ceilings of these must be at least 16, above the 8 the search chose. One formula by size for all of them divides by
    2048 or more, below 4096, which makes no difference at the paper's widths. A linear layer (attention, feed-forward)
    stays at 1, as in the paper.

    At the paper's widths: 3-64 -> 1, 64-128 -> 4, 128-256 -> 16, 256-256 -> 32. At half width: 1, 1, 4, 8.

    Args:
        kind: "conv" for convolutions, transposed ones included; "linear" for linear layers.
        in_channels, out_channels: the layer's widths; the ceiling is symmetric in them.

    Raises:
        ValueError: another kind, or a width below 1.
    """
    if kind not in ("conv", "linear"):
        raise ValueError(f"a layer's kind is 'conv' or 'linear', not {kind!r}")
    if min(in_channels, out_channels) < 1:
        raise ValueError(f"a layer's widths are at least 1, not {in_channels} to {out_channels}")
    if kind == "linear":
        return 1
    ceiling = 1
    while ceiling * 2048 < in_channels * out_channels:
        ceiling *= 2
    return ceiling


def upscaled_ranks(thresholds: Mapping[str, int], doublings: int) -> Ranks:
    """Every layer at rank 1 doubled so many times, capped at its threshold: no search ("upscale" in table 5).

    The paper's 0.056 M "upscale 1" is two doublings, its 0.164 M "upscale 4" is four (see `layer_threshold`).

    Raises:
        ValueError: a threshold or `doublings` is too low.
    """
    _check_thresholds(thresholds)
    if doublings < 0:
        raise ValueError(f"ranks are doubled 0 times or more, not {doublings}")
    return {layer: min(2**doublings, threshold) for layer, threshold in thresholds.items()}


def random_ranks(thresholds: Mapping[str, int], size: Mapping[str, int], target: int, seed: int) -> Ranks:
    """Random ranks of a wanted total size ("random" in table 5, of 0.100 M parameters).

    Of all ways to give every layer a rank from 1 to its threshold, those whose total size is nearest to `target` (the
    lower total of two as near) are counted, by dynamic programming over totals, and one of them is drawn with equal
    chances. The order of the layers does not matter.

    Args:
        thresholds: the highest rank of every layer, at least 1.
        size: LoRA parameters of every layer for each unit of rank.
        target: the wanted total of rank times size.
        seed: of the draw.

    Raises:
        ValueError: `thresholds` and `size` name different layers or hold values below 1, or `target` is less than rank
            1 everywhere takes or more than the thresholds do.
    """
    _check_thresholds(thresholds)
    _check_layers("thresholds", thresholds, "sizes", size)
    small = [layer for layer in size if size[layer] < 1]
    if small:
        raise ValueError(f"the size of {small[0]!r} must be at least 1 parameter, not {size[small[0]]}")
    least, most = sum(size.values()), sum(size[layer] * thresholds[layer] for layer in size)
    if not least <= target <= most:
        raise ValueError(
            f"these layers can have {least} to {most} LoRA parameters, not {target}: choose a target between"
        )

    # ways[i]: total size of the layers from i on -> how many choices of their ranks come to it
    layers = sorted(thresholds)
    ways = [{0: 1}]
    for layer in reversed(layers):
        totals: dict[int, int] = {}
        for rank in range(1, thresholds[layer] + 1):
            for total, count in ways[0].items():
                total += rank * size[layer]
                totals[total] = totals.get(total, 0) + count
        ways.insert(0, totals)

    left = min(ways[0], key=lambda total: (abs(total - target), total))
    rng = random.Random(seed)
    ranks: Ranks = {}
    for layer, after in zip(layers, ways[1:], strict=True):
        options = range(1, thresholds[layer] + 1)
        ranks[layer] = rng.choices(options, [after.get(left - rank * size[layer], 0) for rank in options])[0]
        left -= ranks[layer] * size[layer]
    return {layer: ranks[layer] for layer in thresholds}


def next_ranks(ranks: Mapping[str, int], thresholds: Mapping[str, int]) -> Ranks | None:
    """Every rank doubled and capped at its layer's threshold, or None when all are at their threshold.

    Raises:
        ValueError: `ranks` and `thresholds` name different layers.
    """
    _check_layers("ranks", ranks, "thresholds", thresholds)
    doubled = {layer: min(2 * rank, thresholds[layer]) for layer, rank in ranks.items()}
    return doubled if doubled != ranks else None


def finished(rounds: Sequence[RankRound], thresholds: Mapping[str, int], tolerance: float, patience: int) -> bool:
    """Whether the search ends after `rounds`: every layer at its threshold, or the score saturated.

    Saturated means that the best of the last `patience` rounds improves on the best before them by no more
    than `tolerance`, relative to the latter. It depends on nothing but its arguments, so it may be asked
    after a restart.

    Raises:
        ValueError: the last round's layers are not those of `thresholds`, `tolerance` is negative, or
            `patience` is below 1.
    """
    if tolerance < 0 or patience < 1:
        raise ValueError(f"tolerance must be at least 0 and patience at least 1, not {tolerance} and {patience}")
    if not rounds:
        return False
    if next_ranks(rounds[-1].ranks, thresholds) is None:
        return True
    if len(rounds) <= patience:
        return False
    before = min(done.score for done in rounds[:-patience])
    recent = min(done.score for done in rounds[-patience:])
    return before - recent <= tolerance * abs(before)


def rank_search(
    evaluate: Callable[[Ranks], float],
    thresholds: Mapping[str, int],
    *,
    tolerance: float = 0.01,
    patience: int = 1,
    start: Sequence[RankRound] = (),
) -> list[RankRound]:
    """Algorithm 1 for one concept: its rounds in order, those of `start` first and not evaluated again.

    Args:
        evaluate: trains and scores the concept at the ranks given (a copy of its own); lower is better,
            finite.
        thresholds: the highest rank of every crucial layer, at least 1 (see `layer_threshold`).
        tolerance, patience: the stop rule, see `finished`.
        start: rounds done before an interruption. Any prefix of a search, resumed, ends in the same list.

    Raises:
        ValueError: no layers, a threshold below 1, a score that is not finite, or a `start` that is not the
            beginning of the search over these thresholds.
    """
    _check_thresholds(thresholds)
    rounds: list[RankRound] = []
    ranks: Ranks | None = dict.fromkeys(thresholds, 1)
    for done in start:
        if done.ranks != ranks:
            raise ValueError(
                f"round {len(rounds) + 1} of the rank search to resume has ranks {done.ranks}, but these "
                f"thresholds lead to {ranks}: start the search afresh"
            )
        _check(done)
        rounds.append(done)
        ranks = next_ranks(done.ranks, thresholds)

    while not finished(rounds, thresholds, tolerance, patience):
        assert ranks is not None, "an unfinished search has a next round"
        done = RankRound(ranks=ranks, score=float(evaluate(dict(ranks))))
        _check(done)
        rounds.append(done)
        ranks = next_ranks(ranks, thresholds)
    return rounds


def best(rounds: Sequence[RankRound]) -> Ranks:
    """The ranks of the lowest score; of equal scores the earlier round, which has the smaller ranks.

    Raises:
        ValueError: there are no rounds.
    """
    if not rounds:
        raise ValueError("a rank search without rounds has no best ranks; run at least one round")
    return dict(min(rounds, key=lambda done: done.score).ranks)


def merge(searched: Iterable[Mapping[str, int]]) -> Ranks:
    """The ranks for new concepts: layer by layer the largest over the searched concepts (section 4.2.2).

    Raises:
        ValueError: nothing was searched, or the searches name different layers.
    """
    ranks = [dict(found) for found in searched]
    if not ranks:
        raise ValueError("no searched ranks to merge; search at least one concept")
    for found in ranks:
        if found.keys() != ranks[0].keys():
            odd = min(found.keys() ^ ranks[0].keys())
            raise ValueError(f"searches to merge must be over the same layers; {odd!r} is missing from one of them")
    return {layer: max(found[layer] for found in ranks) for layer in ranks[0]}


def _check_thresholds(thresholds: Mapping[str, int]) -> None:
    if not thresholds:
        raise ValueError("ranks need at least one layer, and no thresholds were given")
    low = [layer for layer, threshold in thresholds.items() if threshold < 1]
    if low:
        raise ValueError(f"the threshold of {low[0]!r} must be at least 1, not {thresholds[low[0]]}")


def _check_layers(name: str, given: Mapping[str, int], other_name: str, other: Mapping[str, int]) -> None:
    if given.keys() != other.keys():
        odd = min(given.keys() ^ other.keys())
        raise ValueError(f"{name} and {other_name} must name the same layers; {odd!r} is in only one of them")


def _check(done: RankRound) -> None:
    if not math.isfinite(done.score):
        raise ValueError(f"the score at ranks {done.ranks} is {done.score}; a round's score must be a finite number")
