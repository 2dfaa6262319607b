import itertools
import subprocess
import sys
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2gan.ranks import (
    RankRound,
    Ranks,
    best,
    finished,
    layer_threshold,
    merge,
    next_ranks,
    random_ranks,
    rank_search,
    upscaled_ranks,
)

LAYERS = {"input": 1, "down_1": 4, "down_2": 16, "middle": 32, "attention": 1}
"""The full-width generator's thresholds."""


def scripted(*scores: float) -> tuple[Callable[[Ranks], float], list[Ranks]]:
    """An evaluation that hands out scores in turn, and the list of ranks it was asked about."""
    asked: list[Ranks] = []

    def evaluate(ranks: Ranks) -> float:
        asked.append(ranks)
        return scores[len(asked) - 1]

    return evaluate, asked


def ranks(down_1: int, down_2: int, middle: int) -> Ranks:
    return {"input": 1, "down_1": down_1, "down_2": down_2, "middle": middle, "attention": 1}


def test_traced_to_the_thresholds() -> None:
    evaluate, asked = scripted(130.0, 120.0, 110.0, 105.0, 102.0, 100.0)
    rounds = rank_search(evaluate, LAYERS)
    expected = [ranks(1, 1, 1), ranks(2, 2, 2), ranks(4, 4, 4), ranks(4, 8, 8), ranks(4, 16, 16), ranks(4, 16, 32)]
    assert asked == expected
    assert [done.ranks for done in rounds] == expected
    assert [done.score for done in rounds] == [130.0, 120.0, 110.0, 105.0, 102.0, 100.0]
    assert best(rounds) == ranks(4, 16, 32)


def test_traced_to_the_papers_ranks() -> None:
    evaluate, asked = scripted(130.0, 120.0, 112.0, 109.37, 111.42)
    rounds = rank_search(evaluate, LAYERS)
    assert len(asked) == 5  # worse at 16 than at 8: saturated
    assert best(rounds) == ranks(4, 8, 8)


def test_traced_to_saturation() -> None:
    evaluate, asked = scripted(130.0, 110.0, 109.5)
    rounds = rank_search(evaluate, LAYERS, tolerance=0.01)
    assert len(asked) == 3
    assert best(rounds) == ranks(4, 4, 4)  # the best seen, though its gain was below the tolerance

    evaluate, asked = scripted(130.0, 110.0, 140.0)
    assert best(rank_search(evaluate, LAYERS)) == ranks(2, 2, 2)


def test_patience_looks_past_one_bad_round() -> None:
    evaluate, _asked = scripted(130.0, 135.0, 100.0, 90.0, 95.0, 90.0)
    assert len(rank_search(evaluate, LAYERS, patience=2)) == 6
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
        ("conv", (128, 256), 16),
        ("conv", (256, 128), 16),
        ("conv", (256, 256), 32),
        ("linear", (256, 256), 1),
        ("linear", (768, 256), 1),
        ("linear", (256, 2048), 1),
        ("linear", (1024, 256), 1),
        # half width
        ("conv", (3, 32), 1),
        ("conv", (32, 64), 1),
        ("conv", (64, 128), 4),
        ("conv", (128, 128), 8),
    ],
)
def test_layer_thresholds(kind: str, widths: tuple[int, int], threshold: int) -> None:
    assert layer_threshold(kind, *widths) == threshold  # type: ignore[arg-type]


@given(st.integers(1, 1024), st.integers(1, 1024))
def test_layer_threshold_is_a_small_power_of_two(a: int, b: int) -> None:
    threshold = layer_threshold("conv", a, b)
    assert threshold & (threshold - 1) == 0
    assert 1 <= threshold <= min(a, b)
    assert threshold == layer_threshold("conv", b, a) <= layer_threshold("conv", 2 * a, 2 * b)


def test_schemes_of_the_papers_table() -> None:
    """LoRA parameters of the full generator, counted from the layers' weights: 0.056, 0.164, 0.092 and 0.100 M."""
    import torch
    from torch import nn

    from e2gan.config import GeneratorConfig
    from e2gan.lora import crucial_layers, searched_ranks
    from e2gan.model import Generator

    with torch.device("meta"):
        generator = Generator(GeneratorConfig())
    thresholds, size = {}, {}
    for name, layer in crucial_layers(generator).items():
        rows, columns, *kernel = layer.weight.shape
        if isinstance(layer, nn.Linear):
            thresholds[name], size[name] = layer_threshold("linear", columns, rows), rows + columns
        else:
            into, out = (rows, columns) if isinstance(layer, nn.ConvTranspose2d) else (columns, rows)
            thresholds[name], size[name] = layer_threshold("conv", into, out), into * kernel[0] * kernel[1] + out

    def total(found: Ranks) -> int:
        return sum(size[name] * rank for name, rank in found.items())

    assert total(upscaled_ranks(thresholds, 2)) == 55_574
    assert total(upscaled_ranks(thresholds, 4)) == 163_094
    assert total(searched_ranks(generator)) == 91_414
    assert all(searched_ranks(generator)[name] <= threshold for name, threshold in thresholds.items())
    found = random_ranks(thresholds, size, 100_000, seed=0)
    assert abs(total(found) - 100_000) <= 32  # totals are 64 apart
    assert all(1 <= found[name] <= threshold for name, threshold in thresholds.items())


def test_upscaled_ranks_are_the_searchs_rounds() -> None:
    evaluate, asked = scripted(*range(10, 0, -1))
    rank_search(evaluate, LAYERS)
    assert [upscaled_ranks(LAYERS, doublings) for doublings in range(len(asked))] == asked
    assert upscaled_ranks(LAYERS, 20) == LAYERS


layers_of = st.dictionaries(
    st.text(max_size=3), st.tuples(st.integers(1, 5), st.integers(1, 30)), min_size=1, max_size=4
)


@given(layers_of, st.data())
def test_random_ranks_come_as_near_as_any(layers: dict[str, tuple[int, int]], data: st.DataObject) -> None:
    """Against every choice there is."""
    thresholds = {layer: threshold for layer, (threshold, _) in layers.items()}
    size = {layer: size for layer, (_, size) in layers.items()}
    choices = list(itertools.product(*(range(1, threshold + 1) for threshold in thresholds.values())))
    totals = [sum(rank * s for rank, s in zip(choice, size.values(), strict=True)) for choice in choices]
    target, seed = data.draw(st.integers(min(totals), max(totals))), data.draw(st.integers(0, 2**32))
    found = random_ranks(thresholds, size, target, seed)
    assert list(found) == list(thresholds) and tuple(found.values()) in choices
    total = sum(size[layer] * rank for layer, rank in found.items())
    assert total == min(totals, key=lambda one: (abs(one - target), one))
    turned = dict(reversed(thresholds.items()))
    assert random_ranks(turned, size, target, seed) == found


def test_random_ranks_have_equal_chances() -> None:
    """Eight choices come to 10: three layers of sizes 1, 2 and 1, ranks up to 4."""
    thresholds, size = dict.fromkeys("abc", 4), {"a": 1, "b": 2, "c": 1}
    wanted = {c for c in itertools.product(range(1, 5), repeat=3) if c[0] + 2 * c[1] + c[2] == 10}
    found = [tuple(random_ranks(thresholds, size, 10, seed).values()) for seed in range(700)]
    assert set(found) == wanted
    expected = 700 / len(wanted)
    assert (
        sum((found.count(choice) - expected) ** 2 / expected for choice in wanted) < 30
    )  # chi-squared of 7 degrees: about 7


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
    with pytest.raises(ValueError, match="doubled 0 times or more, not -1"):
        upscaled_ranks({"a": 1}, -1)
    with pytest.raises(ValueError, match="at least one layer"):
        upscaled_ranks({}, 1)
    for target in (2, 13):
        with pytest.raises(
            ValueError, match=f"can have 3 to 12 LoRA parameters, not {target}: choose a target between"
        ):
            random_ranks({"a": 4}, {"a": 3}, target, seed=0)
    with pytest.raises(ValueError, match="thresholds and sizes must name the same layers; 'b'"):
        random_ranks({"a": 4}, {"a": 3, "b": 1}, 5, seed=0)
    with pytest.raises(ValueError, match="size of 'a' must be at least 1 parameter, not 0"):
        random_ranks({"a": 4}, {"a": 0}, 0, seed=0)
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
