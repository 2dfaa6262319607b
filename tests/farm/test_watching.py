"""How far a run is, folded from its events."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from told import at, event, started

from farm.events import Event
from farm.watching import PACE_SECONDS, SILENT_SECONDS, Watched


def facts(*events: Event, now: float = 0.0) -> dict[str, Any]:
    watched = Watched("r1")
    watched.add(events)
    return watched.facts(at(now))


def stage(found: dict[str, Any], name: str) -> dict[str, Any]:
    [row] = [row for row in found["stages"] if row["name"] == name]
    return row


ALL = ("charcoal", "fog", "night", "sepia")


def test_a_run_that_has_just_begun() -> None:
    found = facts(started(concepts=4, edits=ALL[2:], adapters=ALL[1:], publish=ALL, stages=("concepts", "adapters")))
    assert (found["farm"], found["state"], found["seconds"]) == ("stages", "running", 0)
    states = {row["name"]: row["state"] for row in found["stages"]}
    assert states == {
        "sources": "done",
        "selection": "done",
        "edits": "waiting",
        "base": "done",
        "ranks": "done",
        "adapter": "waiting",
    }
    assert found["concepts"] == {
        "edits": {"done": 2, "waiting": 2},
        "adapters": {"done": 1, "waiting": 3},
        "published": {"done": 0, "waiting": 4},
    }
    only = facts(started(concepts=4, edits=ALL, adapters=ALL, publish=ALL, stages=("concepts",)))
    assert stage(only, "adapter")["state"] == "not asked for"
    lacking = started(concepts=4, edits=ALL, adapters=ALL, publish=ALL)
    assert stage(facts(lacking), "base")["state"] == "done"


def test_a_concepts_way_through_the_run() -> None:
    """Seen after each event; what cannot be trained is left out of what comes later."""
    watched = Watched("r1")
    steps = [
        (started(concepts=4, edits=ALL, adapters=ALL, publish=ALL, quarantined=()), (0, 0, 0), []),
        (event(1, "edits", "started", "night"), (0, 0, 0), ["night"]),
        (event(2, "edits", "done", "night", unit="part-00000", device_seconds=1.0), (0, 0, 0), ["night"]),
        (event(3, "edits", "done", "night"), (1, 0, 0), []),
        (event(4, "edits", "started", "fog"), (1, 0, 0), ["fog"]),
        (event(4, "edits", "failed", "fog", unit="part-00000", error="broken"), (1, 0, 0), []),
        (event(5, "edits", "done", "sepia"), (2, 0, 0), []),
        (event(6, "edits", "quarantined", "sepia", error="none is good"), (1, 0, 0), []),
        (event(7, "adapter", "started", "night", attempt=1), (1, 0, 0), ["night"]),
        (event(8, "adapter", "retried", "night", attempt=1, error="lost"), (1, 0, 0), []),
        (event(9, "adapter", "started", "night", attempt=2), (1, 0, 0), ["night"]),
        (event(10, "adapter", "done", "night", attempt=2, seconds=1.0), (1, 1, 0), []),
        (event(11, "publish", "done", "night", version=1), (1, 1, 1), []),
    ]
    for told, done, running in steps:
        watched.add([told])
        found = watched.facts(at(12))
        assert tuple(counts["done"] for counts in found["concepts"].values()) == done, told
        assert [row["concept"] for row in found["running"]] == running, told
        assert all(sum(counts.values()) == 4 for counts in found["concepts"].values()), told
    assert found["concepts"]["published"] == {"done": 1, "failed": 1, "quarantined": 1, "waiting": 1}
    assert {row["concept"]: (row["state"], row["error"]) for row in found["failures"]} == {
        "fog": ("failed", "broken"),
        "sepia": ("quarantined", "none is good"),
    }
    assert found["retried"] == 1


def test_what_another_run_made_meanwhile_is_done() -> None:
    """This one has waited for it, and begins with what is left."""
    missing = ("sources", "selection", "base", "ranks")
    begun = facts(began := started(concepts=4, stages=(), edits=ALL, adapters=ALL, publish=ALL), now=5)
    assert begun["concepts"]["edits"] == {"done": 0, "waiting": 4}
    began = began.model_copy(update={"todo": {**(began.todo or {}), "stages": missing}})
    left = {"edits": (), "adapters": ("fog", "night"), "publish": ("fog", "night"), "quarantined": ("sepia",)}
    found = facts(began, event(4, "adapter", "started", todo=left), now=5)
    states = {row["name"]: row["state"] for row in found["stages"]}
    assert states == dict.fromkeys((*missing, "edits"), "done") | {"adapter": "running"}
    assert found["concepts"] == {
        "edits": {"done": 3, "quarantined": 1},
        "adapters": {"done": 1, "quarantined": 1, "waiting": 2},
        "published": {"done": 1, "quarantined": 1, "waiting": 2},
    }


def test_a_failure_that_was_retried_by_hand_is_none() -> None:
    adapters = started(concepts=2, adapters=("fog", "night"), publish=("fog", "night"))
    failed = event(1, "adapter", "failed", "night", error="no luck")
    assert facts(adapters, failed)["failures"]
    again = (event(2, "adapter", "started", "night"), event(3, "adapter", "done", "night", seconds=1.0))
    assert facts(adapters, failed, *again)["failures"] == []


@given(
    st.integers(0, 500),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=40),
    st.integers(1, 1000),
)
def test_the_pace_of_a_stage_is_that_of_its_last_minutes(before: int, steps: list[tuple[int, int]], left: int) -> None:
    """By brute force: what was made since the last report before the window, or the first one. A checkpoint's steps
    are none of it."""
    told, now, done = [(0, before)], 0, before
    for seconds, made in steps:
        now, done = now + seconds, done + made
        told.append((now, done))
    total = done + left
    events = [event(0, "base", "started")]
    events += [event(when, "base", "progress", done=count, total=total) for when, count in told]
    row = stage(facts(started(concepts=1, stages=("base",)), *events, now=now), "base")
    early = [pair for pair in told if pair[0] < now - PACE_SECONDS]
    when, count = early[-1] if early else told[0]
    assert row["rate"] == pytest.approx((done - count) / (now - when), abs=1e-4)
    assert row["eta_seconds"] == pytest.approx(left * (now - when) / (done - count), abs=0.51)


def test_rates_and_devices() -> None:
    """A hundred units of 2.5 s on a GPU in a hundred seconds: one a second, two and a half GPUs at work."""
    events = [started(concepts=1, edits=("fog",)), event(0, "edits", "started")]
    gpu = {"device": "NVIDIA H200", "device_memory": 0.625, "device_seconds": 2.5}
    events += [event(n, "edits", "done", "fog", unit=f"part-{n:05d}", **gpu) for n in range(1, 101)]
    found = facts(*events, now=100)
    assert (found["units_per_second"], found["busy"]) == (1.0, 2.5)
    assert (found["device"], found["device_memory"]) == ("NVIDIA H200", 0.625)
    assert found["adapters_per_hour"] is None
    adapters = [started(concepts=9, adapters=ALL), event(0, "adapter", "started")]
    adapters += [event(n * 30, "adapter", "done", name, seconds=30.0) for n, name in enumerate(ALL, 1)]
    assert facts(*adapters, now=120)["adapters_per_hour"] == 120


def test_a_stage_that_is_done_is_done_with_all(  # as the adapters', whose last one is told of by nobody
) -> None:
    progress = event(2, "adapter", "progress", done=11, total=12)
    row = stage(facts(event(1, "adapter", "started"), progress, event(3, "adapter", "done", seconds=2.0)), "adapter")
    assert (row["done"], row["total"], row["state"]) == (12, 12, "done")


def test_silence_and_the_end() -> None:
    begun = started(concepts=1, adapters=("fog",), publish=("fog",))
    assert facts(begun, now=SILENT_SECONDS)["state"] == "running"
    silent = facts(begun, now=SILENT_SECONDS + 1)
    assert (silent["state"], silent["silent_seconds"]) == ("silent", SILENT_SECONDS + 1)
    assert facts(begun, event(80, "run", "progress"), now=160)["state"] == "running"
    assert facts(begun, now=-5)["silent_seconds"] == 0, "its clock is ahead of ours"
    ended = facts(begun, event(40, "run", "done", failures={"fog": "adapter: no luck"}, report="runs/r1/r"), now=9999)
    assert (ended["state"], ended["seconds"], ended["silent_seconds"]) == ("done", 40, None)
    assert ended["report"] == "runs/r1/r"
    assert ended["failures"] == [{"concept": "fog", "stage": "run", "state": "failed", "error": "adapter: no luck"}]


@pytest.mark.parametrize(
    ("end", "failed"),
    [
        ({"state": "done", "failures": {}}, False),
        ({"state": "done", "failures": {"fog": "no luck"}}, True),
        ({"state": "done", "paused": 3}, True),
        ({"state": "failed", "error": "base.concepts: no."}, True),
        ({"state": "stopped"}, True),
        (None, True),
    ],
)
def test_whether_all_went_well(end: dict[str, Any] | None, failed: bool) -> None:
    watched = Watched("r1")
    watched.add([started(concepts=1)])
    if end:
        watched.add([event(1, "run", end.pop("state"), **end)])
    assert watched.failed is failed


def test_a_run_of_an_older_farm_tells_less() -> None:
    began = event(0, "run", "started", farm="stages", stages=("base",))
    found = facts(began, event(1, "base", "started"), event(9, "base", "done", seconds=8.0), event(9, "run", "done"))
    assert found["concepts"] is None and stage(found, "base")["seconds"] == 8.0
    assert {row["state"] for row in found["stages"]} == {"done"}
