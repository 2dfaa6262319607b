"""Events: what a run tells is in the store, in few calls, and can be read while it comes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farm import journal as journal_module
from farm.errors import IntegrityError, UserError
from farm.events import Event, Feed, events_of, need_run, newest_key, newest_run, runs_of, segment_key
from farm.journal import SEGMENT_BYTES, Journal, Line
from farm.progress import JsonLines, Screen
from farm.stop import StoppedError
from farm.store import LocalStore, StoreUnreachableError


class Away(LocalStore):
    """A store that counts what is put, and is away when told so."""

    away = False

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.puts: list[tuple[str, int]] = []

    def put(self, key: str, data: bytes) -> None:
        if self.away:
            raise StoreUnreachableError(self.url)
        self.puts.append((key, len(data)))
        super().put(key, data)


@pytest.fixture
def store(tmp_path: Path) -> Away:
    return Away(tmp_path)


@pytest.fixture(autouse=True)
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal's thread writes at the end and no sooner: tests say when it does."""
    monkeypatch.setattr(journal_module, "WRITE_SECONDS", 1000.0)


def texts(events: Any) -> list[str | None]:
    return [event.text for event in events if event.state == "note" and event.stage == "run"]


def test_what_is_told_is_read_and_nothing_else(store: Away) -> None:
    journal = Journal(store, "here", "r1")
    with journal.kept(stages=("base",), todo={"adapters": ("night",)}):
        journal.tell("adapter", "failed", concept="night", attempt=2, error="no luck", traceback="x" * 10_000 + "end")
        journal.note("Straße\u2028\n")
        journal.tell("run", "done", failures={"night": "no luck"})
    started, failed, note, done = events_of(store, "r1")
    assert (started.farm, started.stages, started.todo) == ("here", ("base",), {"adapters": ("night",)})
    assert (failed.concept, failed.attempt, failed.error) == ("night", 2, "no luck")
    assert failed.traceback and len(failed.traceback) == 8000 and failed.traceback.endswith("xend")
    assert note.text == "Straße\u2028\n" and note.facts.keys() == {"at", "stage", "state", "text"}
    assert done.ends_run and not started.ends_run
    assert started.at <= failed.at <= note.at <= done.at and started.at.tzinfo is not None
    assert json.loads(failed.line)["state"] == "failed" and Event.model_validate_json(note.line) == note
    assert newest_run(store, "here") == "r1" and newest_run(store, "there") is None
    assert list(events_of(store, "r2")) == []


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 4000), st.booleans()), max_size=60))
def test_segments_are_bounded_and_a_feed_misses_nothing(steps: list[tuple[int, bool]]) -> None:
    """Whenever it is written and whoever looks in between."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal_module, "SEGMENT_BYTES", 5000)
        store = Away(Path(folder))
        journal, feed = Journal(store, "here", "r1"), Feed(store, "r1")
        seen = []
        for number, (length, write) in enumerate(steps):
            journal.note(f"{number} {'x' * length}")
            if write:
                journal.write()
                seen += feed.news()
        journal.write()
        seen += feed.news()
        told = [f"{number} {'x' * length}" for number, (length, _) in enumerate(steps)]
        assert texts(seen) == texts(events_of(store, "r1")) == told
        assert feed.news() == []
        assert all(size <= 5000 for _, size in store.puts)
        assert len(store.puts) <= sum(write for _, write in steps) + 1 + len({key for key, _ in store.puts})


def test_a_large_farm_costs_few_calls(store: Away) -> None:
    """280 concepts of 20 units: their events take some thirty objects, each put again while it grows and then left."""
    journal = Journal(store, "here", "r1")
    facts = {"seconds": 12.345, "device_seconds": 11.234, "bytes": 1_234_567, "images": 50}
    for concept in range(280):
        for unit in range(20):
            journal.tell("edits", "done", concept=f"concept-{concept}", unit=f"part-{unit:05d}", attempt=1, **facts)
        journal.write()  # far more often than every two seconds
    objects = list(store.list("runs/"))
    assert len(objects) < 35 and len(store.puts) < 280 + 35
    assert max(size for _, size in store.puts) <= SEGMENT_BYTES
    assert sum(1 for _ in events_of(store, "r1")) == 280 * 20


def test_a_store_that_is_away_loses_nothing(store: Away, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(store, "here", "r1")
    journal.note("before")
    journal.write()
    store.away = True
    journal.note("meanwhile")
    with pytest.raises(StoreUnreachableError):
        journal.write()
    store.away = False
    journal.note("after")
    journal.write()
    assert texts(events_of(store, "r1")) == ["before", "meanwhile", "after"]


def test_threads_tell_at_once(store: Away) -> None:
    journal, told = Journal(store, "here", "r1"), list[Event]()
    journal._listeners = (told.append,)
    with journal.kept():
        threads = [
            threading.Thread(target=lambda n=n: [journal.note(f"{n}-{i}") for i in range(100)])  # type: ignore[misc]
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert list(events_of(store, "r1")) == told and len(texts(told)) == 400


def test_what_concerns_the_run_is_written_at_once(store: Away) -> None:
    """The thread is woken: with its pause of 1000 s it would not come to it otherwise."""
    journal, there = Journal(store, "here", "r1"), threading.Event()
    put = store.put

    def watched(key: str, data: bytes) -> None:
        put(key, data)
        if b'"base"' in data:
            there.set()

    store.put = watched  # type: ignore[method-assign]
    with journal.kept():
        journal.tell("base", "progress", done=1, total=2)
        journal.tell("base", "started")
        assert there.wait(60)


@pytest.mark.parametrize(
    ("error", "state", "says"),
    [
        (StoppedError(), "stopped", None),
        (KeyboardInterrupt(), "stopped", None),
        (UserError("store: it is full."), "failed", "store: it is full."),
        (ValueError("a bug\nof two lines"), "failed", "ValueError: a bug"),
    ],
)
def test_a_run_that_ends_early_says_how(store: Away, error: BaseException, state: str, says: str | None) -> None:
    with pytest.raises(type(error)), Journal(store, "here", "r1").kept():
        raise error
    *_, last = events_of(store, "r1")
    assert last.ends_run and (last.state, last.error) == (state, says)
    assert bool(last.traceback) == isinstance(error, ValueError)


def test_how_a_run_ended_is_raised_though_the_store_is_away(store: Away, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="a bug"), Journal(store, "here", "r1").kept():
        store.away = True
        raise ValueError("a bug")
    assert "the last events of the run r1 are lost" in caplog.text


def test_a_silent_run_says_that_it_goes_on(store: Away, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "WRITE_SECONDS", 0.01)
    monkeypatch.setattr(journal_module, "ALIVE_SECONDS", 0.0)
    alive = threading.Event()

    def listen(event: Event) -> None:
        if (event.stage, event.state) == ("run", "progress"):
            alive.set()

    with Journal(store, "here", "r1", listen).kept():
        assert alive.wait(60)


def test_progress_is_told_now_and_then(store: Away, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: clock[0])
    shown: list[int] = []

    class Bar:
        def update(self, done: int, total: int, note: str = "") -> None:
            shown.append(done)

    told: list[Event] = []
    line = Line(Bar(), Journal(store, "here", "r1", told.append), "edits")
    for done in range(101):
        clock[0] += 0.125
        line.update(done, 100, "charcoal")
    line.update(100, 100)
    assert shown == [*range(101), 100]
    assert [event.done for event in told] == [0, 40, 80, 100]
    assert {(event.stage, event.state, event.total, event.text) for event in told} == {
        ("edits", "progress", 100, "charcoal")
    }


def test_runs_are_their_farms(store: Away) -> None:
    """Also those that farms before this one left, of one file each; the newest is found without its note too."""
    for run_id, farm in (("20260102T000000Z-b", "here"), ("20260103T000000Z-c", "there")):
        with Journal(store, farm, run_id).kept():
            pass
    old = {"at": "2026-01-01T00:00:00+00:00", "stage": "run"}
    lines = [{**old, "state": "started", "farm": "here"}, {**old, "state": "finished", "failures": {}}]
    store.put("runs/20260101T000000Z-a/events.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    store.put("runs/20260104T000000Z-d/report.html", b"of a run without events")
    store.put(segment_key("20260105T000000Z-e", 1), b"{damaged")
    assert runs_of(store, "here") == ["20260101T000000Z-a", "20260102T000000Z-b"]
    assert [event.state for event in events_of(store, "20260101T000000Z-a")] == ["started", "done"]
    assert newest_run(store, "here") == "20260102T000000Z-b"
    store.put(newest_key("here"), b"{")
    assert newest_run(store, "here") == "20260102T000000Z-b"
    store.delete(newest_key("there"))
    assert need_run(store, "there") == "20260103T000000Z-c"
    assert need_run(store, "there", "20260102T000000Z-b") == "20260102T000000Z-b"


@pytest.mark.parametrize("run_id", ["20260102T000000Z-x", "", "../secret", "a b", "runs/x"])
def test_an_unknown_run_is_a_mistake(store: Away, run_id: str) -> None:
    with Journal(store, "here", "20260102T000000Z-b").kept():
        pass
    with pytest.raises(UserError, match=r"^--run: file:.* holds no run .*20260102T000000Z-b"):
        need_run(store, "here", run_id)
    with pytest.raises(UserError, match=r"^there has not been run in file:.*; `farm run` starts it\.$"):
        need_run(store, "there")


@pytest.mark.parametrize("data", [b"{", b"[]\n", b'{"at": "yesterday"}\n', b'{"stage": "run"}\n', b"\xff\xfe\n"])
def test_a_damaged_segment_is_one_sentence(store: Away, data: bytes) -> None:
    store.put(segment_key("r1", 1), data)
    with pytest.raises(IntegrityError, match=r"000001\.jsonl is damaged \(line 1: .*\): delete it\.$"):
        list(events_of(store, "r1"))


def test_a_newer_farms_facts_are_passed_over(store: Away) -> None:
    event = {"at": "2026-01-01T00:00:00Z", "stage": "base", "state": "done", "kilowatt_hours": 3, "seconds": 2}
    store.put(segment_key("r1", 1), json.dumps(event).encode())
    assert [event.seconds for event in events_of(store, "r1")] == [2]


def shown(screen: Callable[[], Screen], capsys: pytest.CaptureFixture[str], store: Away) -> tuple[str, str]:
    here = screen()
    journal = Journal(store, "here", "r1", here.event)
    with journal.kept(), here.bar("edits") as bar:
        journal.note("starting [Ray]")
        Line(bar, journal, "edits").update(1, 1)
    here.table("failed: 1 of 2", {"night": "no luck"})
    return capsys.readouterr()


def test_a_log_is_lines_of_json_or_sentences(store: Away, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = shown(JsonLines, capsys, store)
    assert out == ""
    rows = [json.loads(line) for line in err.splitlines()]
    assert [row["state"] for row in rows] == ["started", "note", "progress", "note", "note"]
    assert rows[1]["text"] == "starting [Ray]" and rows[-1]["text"] == "  night  no luck"
    out, err = shown(Screen, capsys, store)
    assert out == "" and err.startswith("starting [Ray]\nedits      1/1") and "{" not in err
