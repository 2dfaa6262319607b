from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from farm.quality import Measures, QualityConfig, Verdict, judge, quarantine

CONFIG = QualityConfig()


def thumbnail(seed: int) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, 768, dtype=np.uint8).tobytes()


def good(number: int, **fields: Any) -> Measures:
    """An ordinary edit, a little different for every number."""
    draw = np.random.default_rng(number).normal
    values: dict[str, Any] = {
        "distance": 0.2 + 0.03 * draw(),
        "change": 0.35 * np.exp(0.2 * draw()),
        "monochrome": 0.1 + 0.02 * draw(),
        "lightness": 0.5 + 0.05 * draw(),
        "red_green": 0.02 * draw(),
        "yellow_blue": 0.02 * draw(),
        "lightness_spread": 0.2 * np.exp(0.1 * draw()),
        "red_green_spread": 0.1 * np.exp(0.1 * draw()),
        "yellow_blue_spread": 0.1 * np.exp(0.1 * draw()),
        "structure": 0.7 * np.exp(0.1 * draw()),
        "match": 9 * np.exp(0.2 * draw()),
        "misalignment": -0.25 + 0.05 * draw(),
        "descriptor": thumbnail(number),
        "source_descriptor": thumbnail(1000 + number),
    }
    return Measures(id=f"photo-{number}", **{**values, **fields})


def concept(count: int, **fields: Any) -> list[Measures]:
    return [good(number, **fields) for number in range(count)]


def reasons(measures: list[Measures], config: QualityConfig = CONFIG) -> dict[str, tuple[str, ...]]:
    """Of the edits that are not good."""
    verdicts = judge(measures, config)
    assert list(verdicts) == [one.id for one in measures]
    assert all(verdict.good == (not verdict.reasons) for verdict in verdicts.values())
    return {name: verdict.reasons for name, verdict in verdicts.items() if not verdict.good}


FLAT = {"lightness_spread": 0.01, "red_green_spread": 0.01, "yellow_blue_spread": 0.01}

ABSOLUTE = [
    ({"failed": "NaN", "descriptor": b"", "source_descriptor": b""}, "failed"),
    (FLAT, "blank"),
    ({"change": 0.011}, "no-op"),
    ({"monochrome": 0.98}, "colour-collapse"),
    ({"match": 1.7}, "wrong-image"),
    ({"misalignment": 0.06}, "cropped"),
    ({"descriptor": thumbnail(0), "structure": 0.01}, "duplicate"),
    ({"text_direction": -0.01}, "against-prompt"),
]


@pytest.mark.parametrize("count", [5, 40])
@pytest.mark.parametrize(("fields", "reason"), ABSOLUTE)
def test_a_bad_edit_is_caught_by_the_limits(fields: dict[str, Any], reason: str, count: int) -> None:
    measures = concept(count)
    if "text_direction" in fields:
        measures = [replace(one, text_direction=0.2) for one in measures]
    assert reasons(measures) == {}
    measures[3] = replace(measures[3], **fields)
    (found,) = reasons(measures).items()
    assert found[0] == "photo-3"
    assert reason in found[1]
    if count < 12:
        assert found[1] == (reason,)


@pytest.mark.parametrize(("fields", "reason"), ABSOLUTE[:-2])
def test_a_concept_bad_altogether_is_caught(fields: dict[str, Any], reason: str) -> None:
    found = reasons(concept(40, **fields))
    assert len(found) == 40
    assert all(why[0] == reason for why in found.values())


def test_what_is_far_from_its_concept_is_bad() -> None:
    """None of these is beyond a limit."""
    measures = concept(40)
    measures[1] = replace(measures[1], change=0.03)  # as through an autoencoder
    measures[2] = replace(measures[2], match=2.0, structure=0.15)
    measures[3] = replace(measures[3], red_green=0.3, yellow_blue=0.15, monochrome=0.6)  # red
    measures[4] = replace(measures[4], red_green_spread=0.005, yellow_blue_spread=0.005)  # grey
    assert reasons(measures[:5]) == {}
    assert reasons(measures) == {
        "photo-1": ("no-op",),
        "photo-2": ("wrong-image",),
        "photo-3": ("colour-collapse",),
        "photo-4": ("colour-collapse",),
    }
    against = [replace(one, text_direction=0.2 + 0.001 * n) for n, one in enumerate(concept(40))]
    against[5] = replace(against[5], text_direction=0.05)
    assert reasons(against) == {"photo-5": ("against-prompt",)}


def test_what_is_usual_in_a_concept_is_good() -> None:
    mild = [replace(one, change=one.change / 9) for one in concept(40)]  # as make-up
    faint = [replace(one, structure=one.structure / 4, match=(one.match or 0) / 3) for one in concept(40)]
    red = [replace(one, red_green=one.red_green + 0.5, monochrome=one.monochrome + 0.5) for one in concept(40)]
    for measures in (mild, faint, red):
        assert reasons(measures) == {}


def test_a_limit_gives_way_in_a_concept_that_lies_at_it() -> None:
    autumn = [replace(one, monochrome=0.8 + 0.005 * n) for n, one in enumerate(concept(40))]  # up to 0.995
    assert reasons(autumn) == {}
    assert set(reasons(autumn[35:])) == {"photo-35", "photo-36", "photo-37", "photo-38", "photo-39"}
    rough = [replace(one, misalignment=-0.1 + 0.005 * n) for n, one in enumerate(concept(40))]  # up to 0.095
    assert reasons(rough) == {}
    rough[7] = replace(rough[7], misalignment=0.4)
    assert reasons(rough) == {"photo-7": ("cropped",)}


def test_what_cannot_be_measured_does_not_count() -> None:
    assert reasons(concept(40, match=None)) == {}
    assert reasons(concept(40, text_direction=None)) == {}


def test_off_only_what_failed_is_left_out() -> None:
    measures = [replace(good(n), **fields) for n, (fields, _) in enumerate(ABSOLUTE)]
    assert reasons(measures, QualityConfig(enabled=False)) == {"photo-0": ("failed",)}


def test_of_duplicates_the_one_true_to_its_photo_stays() -> None:
    measures = concept(6)
    for number, kept in ((1, 0.2), (3, 0.6), (4, 0.3)):
        measures[number] = replace(measures[number], descriptor=thumbnail(77), structure=kept)
    assert reasons(measures) == {"photo-1": ("duplicate",), "photo-4": ("duplicate",)}
    nearly = np.frombuffer(thumbnail(77), np.uint8).clip(2) - 2
    measures[1] = replace(measures[1], descriptor=nearly.tobytes())
    assert set(reasons(measures)) == {"photo-1", "photo-4"}
    same_photo = [replace(one, source_descriptor=thumbnail(5)) for one in measures]
    assert reasons(same_photo) == {}


@settings(max_examples=40, deadline=None)
@given(data=st.data(), count=st.sampled_from([4, 11, 12, 30]))
def test_the_order_of_the_edits_does_not_matter(data: st.DataObject, count: int) -> None:
    measures = concept(count)
    for number in data.draw(st.sets(st.integers(0, count - 1), max_size=count)):
        fields, _ = data.draw(st.sampled_from(ABSOLUTE))
        measures[number] = replace(measures[number], **fields)
    shuffled = data.draw(st.permutations(measures))
    first, second = judge(measures, CONFIG), judge(shuffled, CONFIG)
    # Equals in structure among duplicates: the first one given stays.
    assert all(set(second[name].reasons) ^ set(verdict.reasons) <= {"duplicate"} for name, verdict in first.items())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.builds(
            replace,
            st.integers(0, 5).map(good),
            change=st.floats(0, 1),
            monochrome=st.floats(0, 1),
            match=st.none() | st.floats(-5, 30),
            misalignment=st.floats(-1, 1),
            structure=st.floats(0, 1),
            lightness_spread=st.floats(0, 0.5),
            text_direction=st.none() | st.floats(-1, 1),
        ),
        max_size=30,
    ).map(lambda found: [replace(one, id=str(n)) for n, one in enumerate(found)])
)
def test_the_limits_hold_whatever_the_concept(measures: list[Measures]) -> None:
    """Four of them do not give way, and nothing else than them and outliers makes an edit bad."""
    verdicts = judge(measures, CONFIG)
    for one in measures:
        why = verdicts[one.id].reasons
        if "blank" in why:
            continue
        assert ("no-op" in why) >= (one.change < CONFIG.min_change)
        assert ("wrong-image" in why) >= (one.match is not None and one.match < CONFIG.min_match)
        assert ("against-prompt" in why) >= (one.text_direction is not None and one.text_direction < 0)
        assert ("no-op" in why) <= (one.change < 4 * CONFIG.min_change)
        assert ("cropped" in why) <= (one.misalignment > CONFIG.max_misalignment)


def verdicts(*counts: tuple[int, tuple[str, ...]]) -> dict[str, Verdict]:
    found = [Verdict(good=not why, reasons=why) for count, why in counts for _ in range(count)]
    return {str(number): verdict for number, verdict in enumerate(found)}


def test_quarantine_says_why() -> None:
    bad = verdicts((19, ()), (16, ("no-op",)), (5, ("wrong-image", "cropped")))
    assert quarantine(bad, CONFIG) == (
        "only 19 of 40 edits are good, quality.min_good asks for 50%: 16 no-op, 5 wrong-image"
    )
    assert quarantine(verdicts((20, ()), (20, ("no-op",))), CONFIG) is None
    assert quarantine(bad, QualityConfig(min_good=0.4)) is None
    assert quarantine({}, CONFIG) is None


def test_the_settings_are_checked_and_light() -> None:
    for wrong in ({"min_good": 1.5}, {"retries": -1}, {"outlier": 1}, {"min_chang": 0.1}):
        with pytest.raises(ValidationError):
            QualityConfig.model_validate(wrong)
    code = "import sys, farm.quality; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "cv2", "scipy", "pyarrow", "transformers"} & set(loaded)
