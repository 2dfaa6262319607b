import itertools
import subprocess
import sys
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2gan.ranks import RankRound, Ranks, best, finished, layer_threshold, merge, next_ranks, rank_search

LAYERS = {"input": 1, "down_1": 4, "down_2": 8, "attention": 1}


def scripted(*scores: float) -> tuple[Callable[[Ranks], float], list[Ranks]]:
    """An evaluation that hands out scores in turn, and the list of ranks it was asked about."""
    asked: list[Ranks] = []

    def evaluate(ranks: Ranks) -> float:
        asked.append(ranks)
        return scores[len(asked) - 1]

    return evaluate, asked


def ranks(input_: int, down_1: int, down_2: int, attention: int) -> Ranks:
    return {"input": input_, "down_1": down_1, "down_2": down_2, "attention": attention}


def test_traced_to_the_thresholds() -> None:
    evaluate, asked = scripted(130.0, 120.0, 110.0, 105.0)
    rounds = rank_search(evaluate, LAYERS)
    expected = [ranks(1, 1, 1, 1), ranks(1, 2, 2, 1), ranks(1, 4, 4, 1), ranks(1, 4, 8, 1)]
    assert asked == expected
    assert [done.ranks for done in rounds] == expected
    assert [done.score for done in rounds] == [130.0, 120.0, 110.0, 105.0]
    assert best(rounds) == ranks(1, 4, 8, 1)


def test_traced_to_saturation() -> None:
    evaluate, asked = scripted(130.0, 110.0, 109.5)
    rounds = rank_search(evaluate, LAYERS, tolerance=0.01)
    assert len(asked) == 3
    assert best(rounds) == ranks(1, 4, 4, 1)  # the best seen, though its gain was below the tolerance

    evaluate, asked = scripted(130.0, 110.0, 140.0)
    assert best(rank_search(evaluate, LAYERS)) == ranks(1, 2, 2, 1)


def test_patience_looks_past_one_bad_round() -> None:
    evaluate, _asked = scripted(130.0, 135.0, 100.0, 90.0)
    assert len(rank_search(evaluate, LAYERS, patience=2)) == 4
    evaluate, _asked = scripted(130.0, 135.0, 130.0)
    assert len(rank_search(evaluate, LAYERS, patience=2)) == 3


def test_cap_that_is_no_power_of_two() -> None:
    assert next_ranks({"a": 4, "b": 1}, {"a": 6, "b": 1}) == {"a": 6, "b": 1}
    assert next_ranks({"a": 6, "b": 1}, {"a": 6, "b": 1}) is None


def test_one_round_where_nothing_may_grow() -> None:
    evaluate, _asked = scripted(5.0)
    assert rank_search(evaluate, {"a": 1, "b": 1}) == [RankRound(ranks={"a": 1, "b": 1}, score=5.0)]


def test_perfect_score_stops() -> None:
    evaluate, _asked = scripted(0.0, 0.0)
    assert len(rank_search(evaluate, LAYERS)) == 2


def test_ties_go_to_the_smaller_ranks() -> None:
    assert best([RankRound(ranks={"a": 1}, score=3.0), RankRound(ranks={"a": 2}, score=3.0)]) == {"a": 1}


def test_merge_takes_the_largest_by_layer() -> None:
    assert merge([{"a": 1, "b": 8}, {"a": 4, "b": 2}]) == {"a": 4, "b": 8}


@pytest.mark.parametrize(
    ("kind", "widths", "threshold"),
    [
        ("conv", (3, 64), 1),
        ("conv", (64, 3), 1),
        ("conv", (64, 128), 4),
        ("conv", (128, 64), 4),
        ("conv", (128, 256), 8),
        ("conv", (256, 128), 8),
        ("conv", (256, 256), 8),
        ("linear", (256, 256), 1),
        ("linear", (768, 256), 1),
        ("linear", (256, 2048), 1),
        ("linear", (1024, 256), 1),
        # half width
        ("conv", (3, 32), 1),
        ("conv", (32, 64), 2),
        ("conv", (64, 128), 4),
        ("conv", (128, 128), 4),
    ],
)
def test_layer_thresholds(kind: str, widths: tuple[int, int], threshold: int) -> None:
    assert layer_threshold(kind, *widths) == threshold  # type: ignore[arg-type]


@given(st.integers(1, 4096), st.integers(1, 4096))
def test_layer_threshold_is_a_small_power_of_two(a: int, b: int) -> None:
    threshold = layer_threshold("conv", a, b)
    assert threshold & (threshold - 1) == 0
    assert 1 <= threshold <= min(a, b)
    assert threshold == layer_threshold("conv", b, a) <= layer_threshold("conv", 2 * a, 2 * b)


thresholds_of = st.dictionaries(st.text(max_size=3), st.integers(1, 40), min_size=1, max_size=5)
scores_of = st.lists(st.floats(0, 1e6), min_size=7, max_size=7)


@given(thresholds_of, scores_of, st.floats(0, 0.5), st.integers(1, 3))
def test_search_stays_below_thresholds_ends_and_resumes(
    thresholds: Ranks, scores: list[float], tolerance: float, patience: int
) -> None:
    evaluate, asked = scripted(*scores)  # 2**6 > 40: seven rounds suffice, an eighth is an IndexError
    rounds = rank_search(evaluate, thresholds, tolerance=tolerance, patience=patience)
    assert asked[0] == dict.fromkeys(thresholds, 1)
    for done in rounds:
        assert all(1 <= rank <= thresholds[layer] for layer, rank in done.ranks.items())
    for before, after in itertools.pairwise(rounds):
        assert after.ranks == next_ranks(before.ranks, thresholds)
        assert all(after.ranks[layer] >= rank for layer, rank in before.ranks.items())
    assert min(scores[: len(rounds)]) == scores[[done.ranks for done in rounds].index(best(rounds))]

    for length in range(len(rounds) + 1):
        prefix = rounds[:length]
        assert finished(prefix, thresholds, tolerance, patience) == (length == len(rounds))
        evaluate, asked = scripted(*scores[length:])
        resumed = rank_search(evaluate, thresholds, tolerance=tolerance, patience=patience, start=prefix)
        assert resumed == rounds
        assert len(asked) == len(rounds) - length


def test_evaluation_cannot_spoil_the_record() -> None:
    def evaluate(given: Ranks) -> float:
        score = 100.0 / given["a"]
        given["a"] = 99
        return score

    assert [done.ranks for done in rank_search(evaluate, {"a": 4})] == [{"a": 1}, {"a": 2}, {"a": 4}]


def test_errors() -> None:
    evaluate, _ = scripted(1.0)
    with pytest.raises(ValueError, match="at least one layer"):
        rank_search(evaluate, {})
    with pytest.raises(ValueError, match="'b' must be at least 1, not 0"):
        rank_search(evaluate, {"a": 1, "b": 0})
    with pytest.raises(ValueError, match="is nan; a round's score must be"):
        rank_search(lambda _: float("nan"), {"a": 2})
    with pytest.raises(ValueError, match="round 2 of the rank search to resume"):
        done = [RankRound(ranks={"a": 1}, score=1.0), RankRound(ranks={"a": 4}, score=1.0)]
        rank_search(evaluate, {"a": 4}, start=done)
    with pytest.raises(ValueError, match="same layers; 'b'"):
        next_ranks({"a": 1}, {"a": 1, "b": 1})
    with pytest.raises(ValueError, match="patience at least 1"):
        finished([], {"a": 1}, 0.1, 0)
    with pytest.raises(ValueError, match="at least one round"):
        best([])
    with pytest.raises(ValueError, match="at least one concept"):
        merge([])
    with pytest.raises(ValueError, match="'b' is missing"):
        merge([{"a": 1}, {"a": 1, "b": 1}])
    with pytest.raises(ValueError, match="not 'dense'"):
        layer_threshold("dense", 1, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not 0 to 3"):
        layer_threshold("conv", 0, 3)


def test_needs_no_torch() -> None:
    script = "import sys, e2gan.ranks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
