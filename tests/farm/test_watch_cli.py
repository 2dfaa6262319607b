"""`farm watch`: what a terminal, a pipe and a program are shown of a run."""

from __future__ import annotations

import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from stage_farm import write_config
from terminal import Terminal
from told import event, started, told

from farm import cli_watch, watching
from farm.cli_watch import Looks
from farm.store import LocalStore
from farm.watching import Watched

CONCEPTS = tuple(f"concept-{n:03d}" for n in range(280))


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(monkeypatch, capsys, "watch")


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Of photos that this machine does not have."""
    sources = {"kind": "folder", "path": "/nowhere", "size": 32}
    return write_config(tmp_path / "farm.yaml", tmp_path / "store", sources=sources)


@pytest.fixture(autouse=True)
def never_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs of these tests told all they tell long ago."""
    monkeypatch.setattr(watching, "SILENT_SECONDS", math.inf)
    monkeypatch.setattr(watching, "GONE_SECONDS", math.inf)


BEGUN = (
    started(concepts=4, adapters=("fog", "night"), publish=("fog", "night")),
    event(1, "adapter", "started"),
    event(2, "adapter", "progress", done=0, total=2, text="fog, night (10%)"),
    event(2, "adapter", "started", "fog", attempt=1),
    event(2, "adapter", "started", "night", attempt=1),
    event(30, "adapter", "failed", "fog", attempt=1, error="no [luck]"),
    event(60, "adapter", "progress", done=1, total=2, text="night (60%)"),
)
ENDED = (*BEGUN, event(90, "run", "done", failures={"fog": "adapter: no [luck]"}, report="runs/r1/report.html"))


def test_once_without_photos_or_weights(terminal: Terminal, config: Path, store: LocalStore) -> None:
    told(store, "r1", BEGUN)
    text = terminal.good("-c", config, "--once")
    assert text.startswith("stages  run r1  running  ")
    assert re.search(r"adapter +running .* 1/2 .* night \(60%\)", text)
    assert re.search(r"published +2 +0 +1 +1 *\n", text)
    assert "failed: fog  adapter: no [luck]" in text and "\x1b" not in text


def test_it_ends_with_the_run_and_says_how_it_went(terminal: Terminal, config: Path, store: LocalStore) -> None:
    told(store, "r1", ENDED)
    assert terminal.farm("-c", config) == (1, "r1 done; 2 of 4 published; 1 failed: fog\n", "")
    status, out, _ = terminal.farm("-c", config, "--json")
    [line] = map(json.loads, out.splitlines())
    assert status == 1 and (line["run"], line["state"], line["seconds"]) == ("r1", "done", 90)
    assert line["failures"] == [{"concept": "fog", "stage": "adapter", "state": "failed", "error": "no [luck]"}]
    told(store, "r2", [*BEGUN[:2], event(5, "run", "done", failures={})])
    assert terminal.farm("-c", config)[0] == 0
    assert terminal.farm("-c", config, "--run", "r1")[0] == 1
    assert "farm.yaml" not in terminal.mistake("-c", config, "--run", "r3")


def test_a_run_nothing_is_heard_of_is_given_up(
    terminal: Terminal, config: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "SILENT_SECONDS", 90)
    monkeypatch.setattr(watching, "GONE_SECONDS", 600)
    told(store, "r1", BEGUN)
    status, out, _ = terminal.farm("-c", config)
    assert status == 1 and out.startswith("r1 silent; adapter 1/2 ")
    assert out.endswith("; 2 of 4 published; 1 failed: fog\n") and out.count("\n") == 1
    assert "its driver may be gone" in terminal.good("-c", config, "--once")


def test_a_farm_that_has_not_been_run(terminal: Terminal, config: Path, tmp_path: Path) -> None:
    assert terminal.mistake("-c", config).startswith("stages has not been run in file://")
    assert list(LocalStore(tmp_path / "store").list()) == []


@pytest.fixture
def coming(monkeypatch: pytest.MonkeyPatch, store: LocalStore) -> Iterator[list[tuple[str, int]]]:
    """At every pause something more is told: of which run how many events there are then."""
    steps: list[tuple[str, int]] = []

    def sleep(seconds: float) -> None:
        run_id, count = steps.pop(0)
        told(store, run_id, ENDED[:count])

    monkeypatch.setattr(cli_watch.time, "sleep", sleep)
    yield steps
    assert not steps


def test_each_change_is_a_line_of_json(
    terminal: Terminal, config: Path, store: LocalStore, coming: list[tuple[str, int]]
) -> None:
    told(store, "r1", ENDED[:2])
    coming += [("r1", 5), ("r1", 6), ("r1", len(ENDED))]
    status, out, _ = terminal.farm("-c", config, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 1 and [len(line["running"]) for line in lines] == [0, 2, 1, 0]
    assert [line["state"] for line in lines] == ["running"] * 3 + ["done"]


def test_it_goes_on_to_a_newer_run(
    terminal: Terminal, config: Path, store: LocalStore, coming: list[tuple[str, int]]
) -> None:
    """As after a driver that was killed; with --run it does not."""
    told(store, "r1", ENDED[:2])
    coming += [("r2", 2), ("r2", len(ENDED))]
    out = terminal.farm("-c", config, "--json")[1]
    assert [json.loads(line)["run"] for line in out.splitlines()] == ["r1", "r2", "r2"]
    coming += [("r2", 2), ("r1", len(ENDED))]
    told(store, "r1", ENDED[:2])
    out = terminal.farm("-c", config, "--json", "--run", "r1")[1]
    assert [json.loads(line)["run"] for line in out.splitlines()] == ["r1", "r1"]


def test_a_terminal_gets_one_table_that_stays(
    terminal: Terminal, config: Path, store: LocalStore, coming: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn anew in its place: the cursor goes up and lines are overwritten, but the screen is never cleared."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    told(store, "r1", ENDED[:2])
    coming += [("r1", 6), ("r1", len(ENDED))]
    out = terminal.farm("-c", config)[1]
    assert out.count("concepts") >= 3 and "\x1b[1A" in out
    assert "\x1b[2J" not in out and "\x1b[?1049h" not in out


class Asked(LocalStore):
    """A store that counts what is asked of it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.calls = Counter[str]()

    def get(self, key: str, at_most: int | None = None) -> bytes:
        self.calls["get"] += 1
        return super().get(key, at_most)

    def marks(self, prefix: str = "") -> dict[str, str]:
        self.calls["marks"] += 1
        return super().marks(prefix)

    def list(self, prefix: str = "") -> Iterator[str]:
        self.calls["list"] += 1
        return super().list(prefix)


def test_a_look_is_three_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest run's id, a listing, and the segment that has grown: of a large farm too."""
    store = Asked(tmp_path)
    begun = started(concepts=280, edits=CONCEPTS, adapters=CONCEPTS, publish=CONCEPTS, farm="large")
    units = [event(n, "edits", "done", c, unit=f"part-{u}") for n, c in enumerate(CONCEPTS) for u in range(20)]
    told(store, "r1", [begun, *units])
    monkeypatch.setattr(cli_watch.time, "sleep", lambda seconds: None)
    looks = iter(Looks(store, "large", "r1", newest=True))
    next(looks)
    store.calls.clear()
    next(looks)
    assert store.calls["list"] == 0 and store.calls["marks"] == 1 and store.calls["get"] <= 2


@pytest.mark.parametrize(("height", "width"), [(24, 80), (40, 120)])
def test_it_is_no_higher_than_the_terminal(height: int, width: int) -> None:
    """However many concepts fail, and however long their reasons are."""
    watched = Watched("r1")
    watched.add([started(concepts=280, adapters=CONCEPTS, publish=CONCEPTS), event(1, "adapter", "started")])
    watched.add(event(2, "adapter", "failed", c, error="a long reason " * 20) for c in CONCEPTS)
    console = Console(width=width, height=height, record=True, file=io.StringIO())
    console.print(cli_watch.table(watched.facts(datetime.now(UTC)), console))
    lines = console.export_text().splitlines()
    assert len(lines) < height and all(len(line) <= width for line in lines)
    assert "more: `farm logs` shows them all" in "\n".join(lines)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (200, "3:20"), (7400, "2:03:20"), (273_600, "3 d 4 h")],
)
def test_times(seconds: float, said: str) -> None:
    assert cli_watch._clock(seconds) == said


def test_rates_are_shown(store: LocalStore) -> None:
    watched = Watched("r1")
    facts: dict[str, Any] = {"device": "NVIDIA H200", "device_memory": 0.625, "device_seconds": 2.5}
    watched.add([started(concepts=1, edits=("fog",)), event(0, "edits", "started")])
    watched.add(event(n, "edits", "done", "fog", unit=f"part-{n}", **facts) for n in range(1, 101))
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(cli_watch.table(watched.facts(event(100, "run", "progress").at), console))
    assert "1 units/s, 2.5 GPUs at work (NVIDIA H200, up to 62% of memory)" in console.export_text()
