from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farm.quality import Measures, QualityConfig, TeacherScore, choose, score_teacher

CONFIG = QualityConfig()


def probes(count: int = 8, **fields: Any) -> list[Measures]:
    ordinary = {"change": 0.3, "structure": 0.7, "match": 9.0, "misalignment": -0.2, "lightness_spread": 0.2}
    descriptors = [
        {"descriptor": bytes([25 * n] * 768), "source_descriptor": bytes([28 * n] * 768)} for n in range(count)
    ]
    return [Measures(id=f"probe-{n}", **{**ordinary, **descriptors[n], **fields}) for n in range(count)]


def score(*measures: Measures, config: QualityConfig = CONFIG) -> TeacherScore:
    return score_teacher(measures, config)


def test_a_teacher_without_fault() -> None:
    assert score(*probes()) == TeacherScore(
        total=pytest.approx(1),
        good=1,
        acceptable=True,
        structure=1,
        strength=1,
        consistency=pytest.approx(1),
        prompt=None,
        identity=None,
        uses=("good", "structure", "strength", "consistency"),
    )


def test_the_total_is_the_good_share_of_the_weighted_parts() -> None:
    measures = probes()
    measures[0:2] = probes(2, change=0.0)
    found = score(*measures)
    assert (found.good, found.structure, found.strength) == (0.75, 1, 1)
    assert found.total == pytest.approx(0.75)
    half = score(*probes(structure=0.3))
    assert half.structure == pytest.approx(0.5)
    assert half.total == pytest.approx(0.4 * 0.5 + 0.6)


@pytest.mark.parametrize(("change", "strength"), [(0.012, 0), (0.036, 0.5), (0.06, 1), (0.6, 1), (0.8, 0.5), (1.0, 0)])
def test_strength_has_a_useful_band(change: float, strength: float) -> None:
    assert score(*probes(change=change)).strength == pytest.approx(strength)


def test_uneven_teachers_are_less_consistent() -> None:
    uneven = [*probes(4, change=0.1), *probes(8, change=0.3)[4:]]
    # of change: mean 0.2, standard deviation 0.1; of structure: none
    assert score(*uneven).consistency == pytest.approx((0.5 + 1) / 2)
    assert score(*probes(1)).consistency == 0


def test_clip_counts_when_it_was_asked() -> None:
    follows = score(*probes(text_direction=0.25, identity=0.8))
    ignores = score(*probes(text_direction=0.0, identity=0.8))
    assert follows.uses == ("good", "prompt", "identity", "structure", "strength", "consistency")
    assert (follows.prompt, ignores.prompt) == (1, 0)
    assert follows.identity == pytest.approx(0.8)
    assert follows.total - ignores.total == pytest.approx(0.4)


def test_teachers_that_do_nothing_or_fail_are_not_chosen() -> None:
    failed = [Measures(id=f"probe-{n}", failed="NaN") for n in range(8)]
    scores = {"lazy": score(*probes(change=0.001)), "broken": score(*failed)}
    assert [one.total for one in scores.values()] == [0, 0]
    assert choose(scores) is None
    assert choose({}) is None
    assert choose({**scores, "works": score(*probes(change=0.03, structure=0.2))}) == "works"


def test_equals_are_taken_in_the_order_given() -> None:
    best, worse = score(*probes()), score(*probes(structure=0.3))
    assert choose({"z": worse, "y": best, "a": best}) == "y"
    assert choose({"a": best, "y": best, "z": worse}) == "a"


def test_too_few_good_edits_lose_against_any_that_are_enough() -> None:
    dazzling = score(*probes(3), *probes(8, change=0.0)[3:])
    dull = score(*probes(structure=0.1, change=0.8))
    assert dazzling.total > dull.total / 2
    assert not dazzling.acceptable
    assert choose({"dazzling": dazzling, "dull": dull}) == "dull"
    lenient = QualityConfig(min_good=0.3)
    assert score_teacher([*probes(3), *probes(8, change=0.0)[3:]], lenient).acceptable


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(0, 1),
            st.floats(0, 1),
            st.floats(-5, 30),
            st.none() | st.floats(-1, 1),
            st.none() | st.floats(-1, 1),
        ),
        min_size=1,
        max_size=10,
    )
)
def test_every_part_is_in_its_range(rows: list[tuple[float, float, float, float | None, float | None]]) -> None:
    measures = [
        probes(10, change=change, structure=structure, match=match, text_direction=direction, identity=identity)[n]
        for n, (change, structure, match, direction, identity) in enumerate(rows)
    ]
    found = score_teacher(measures, CONFIG)
    parts = [value for value in asdict(found).values() if isinstance(value, float)]
    assert all(0 <= part <= 1 + 1e-9 for part in parts)
    assert json.loads(json.dumps(asdict(found)))["total"] == found.total
