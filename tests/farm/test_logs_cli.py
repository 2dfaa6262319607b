"""`farm logs`: what was told of a concept, by all runs and by the queue."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from stage_farm import write_config
from terminal import Terminal
from told import event, started, told

from farm import cli_logs
from farm.queue import Queue
from farm.store import LocalStore

TRACE = "Traceback (most recent call last):\n  …\nValueError: no luck\n"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(monkeypatch, capsys, "logs")


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """Two runs of the farm: in the first night's training failed twice, in the second it did not; and another's."""
    store = LocalStore(tmp_path / "store")
    unit = {"unit": "part-00000", "teacher": "procedural", "images": 50, "bytes": 1234}
    lost = {"attempt": 1, "error": "WorkerCrashedError: gone", "traceback": "Traceback: gone"}
    first = [
        started(concepts=4),
        event(1, "edits", "done", "night", seconds=1.26, **unit),
        event(2, "edits", "progress", done=1, total=2),
        event(3, "adapter", "retried", "night", **lost),
        event(4, "adapter", "failed", "night", attempt=2, error="ValueError: no luck", traceback=TRACE),
        event(5, "adapter", "done", "fog", attempt=1, seconds=3.0),
        event(6, "run", "done", failures={"night": "adapter: ValueError: no luck"}),
    ]
    second = [started(concepts=4), event(9, "publish", "done", "night", version=1), event(10, "run", "stopped")]
    told(store, "r1", first)
    told(store, "r2", second)
    told(store, "r3", [started(concepts=1, farm="another"), event(1, "edits", "done", "night")])
    return store


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Of photos that this machine does not have."""
    sources = {"kind": "folder", "path": "/nowhere", "size": 32}
    return write_config(tmp_path / "farm.yaml", tmp_path / "store", sources=sources)


def test_a_concept_in_all_runs(terminal: Terminal, config: Path, store: LocalStore) -> None:
    assert terminal.good("night", "-c", config).splitlines() == [
        "run r1",
        "  2026-01-01 12:00:01  edits      done        night part-00000 by procedural  50 images, 1.3 s, 1,234 bytes",
        "  2026-01-01 12:00:03  adapter    retried     night  attempt 1, WorkerCrashedError: gone",
        "    Traceback: gone",
        "  2026-01-01 12:00:04  adapter    failed      night  attempt 2, ValueError: no luck",
        "    Traceback (most recent call last):",
        "      …",
        "    ValueError: no luck",
        "run r2",
        "  2026-01-01 12:00:09  publish    done        night  version 1",
    ]
    assert terminal.good("night", "-c", config, "--run", "r2").startswith("run r2\n")
    rows = [json.loads(line) for line in terminal.good("night", "-c", config, "--json").splitlines()]
    assert [(row["run"], row["state"]) for row in rows] == [
        ("r1", "done"),
        ("r1", "retried"),
        ("r1", "failed"),
        ("r2", "done"),
    ]
    assert rows[2]["traceback"] == TRACE


def fail(store: LocalStore, concept: str, error: str, most: int) -> None:
    queue = Queue(store, "adapters")
    queue.enqueue(f"{concept}-0f3a", {"concept": concept})
    lease = queue.lease("here:1:1", 60, among={f"{concept}-0f3a"})
    assert lease is not None
    queue.fail(lease, error, most)


def test_what_the_queue_holds_of_it(terminal: Terminal, config: Path, store: LocalStore) -> None:
    """A traceback that an event has told is not shown again; a dead letter that no run tells of is."""
    fail(store, "night", TRACE, 1)
    out = terminal.good("night", "-c", config)
    assert out.count("Traceback (most") == 1
    assert out.endswith(
        "in the queue: failed after 1 attempt: ValueError: no luck; `farm queue retry` tries it again\n"
    )
    fail(store, "sepia", TRACE, 1)
    fail(store, "charcoal", TRACE, 9)
    assert "    ValueError: no luck\n" in terminal.good("sepia", "-c", config)
    assert "retried after 1 attempt: ValueError: no luck; it waits" in terminal.good("charcoal", "-c", config)
    [row] = map(json.loads, terminal.good("sepia", "-c", config, "--json").splitlines())
    assert (row["stage"], row["state"], row["attempt"], row["traceback"]) == ("queue", "failed", 1, TRACE)


def test_the_runs_own(terminal: Terminal, config: Path, store: LocalStore) -> None:
    """The newest run's, and of concepts what went wrong."""
    assert terminal.good("-c", config).splitlines() == [
        "run r2",
        "  2026-01-01 12:00:00  run        started",
        "  2026-01-01 12:00:10  run        stopped",
    ]
    lines = terminal.good("-c", config, "--run", "r1").splitlines()
    assert [line.split()[2:5] for line in lines if line.startswith("  2026")] == [
        ["run", "started"],
        ["adapter", "retried", "night"],
        ["adapter", "failed", "night"],
        ["run", "done", "1"],
    ]
    assert len(terminal.good("-c", config, "--run", "r1", "--json").splitlines()) == 7


def test_names_that_nobody_knows(terminal: Terminal, config: Path, store: LocalStore) -> None:
    assert terminal.mistake("nigth", "-c", config) == (
        "farm logs: there is no 'nigth' in the catalogue of stages or in its runs; did you mean night?"
    )
    assert terminal.good("fog", "-c", config).count("\n") == 2, "it is not in the catalogue any more, but in a run"
    status, out, err = terminal.farm("cyanotype", "-c", config)
    assert (status, out, err) == (0, "", "no run has told anything of cyanotype yet\n")
    assert terminal.mistake("-c", config, "--run", "r9").startswith("--run: ")


def test_following_ends_with_the_run(
    terminal: Terminal, config: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = [started(concepts=4), event(1, "adapter", "started", "night", attempt=1)]
    told(store, "r4", events)

    def sleep(seconds: float) -> None:
        events.append(event(len(events), "adapter", "retried", "night", attempt=1, error="lost"))
        events.append(event(len(events), "adapter", "done", "fog", seconds=1.0))
        if len(events) > 5:
            events.append(event(len(events), "run", "done"))
        told(store, "r4", events)

    monkeypatch.setattr(cli_logs.time, "sleep", sleep)
    monkeypatch.setattr("farm.watching.GONE_SECONDS", float("inf"))
    lines = terminal.good("night", "-c", config, "--run", "r4", "--follow").splitlines()
    assert [line.split()[3] for line in lines if line.startswith("  2026")] == ["started", "retried", "retried"]
    assert len(events) == 7
    assert terminal.good("night", "-c", config, "--run", "r4", "--follow").splitlines() == lines
