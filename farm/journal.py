"""A run's journal: it takes events from many threads and puts them into the store, a few calls a minute."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from farm.errors import UserError
from farm.events import Event, Newest, State, newest_key, segment_key
from farm.progress import Bar
from farm.stop import StoppedError
from farm.store import Store

SEGMENT_BYTES = 64 << 10
"""A segment that has grown to this is left, and another one begun: what is put again at a time is no more."""
WRITE_SECONDS = 2.0
"""Events wait as long to be put together; what happens to the run, to a stage or goes wrong, does not."""
PROGRESS_SECONDS = 5.0
"""A stage's progress is told no more often."""
ALIVE_SECONDS = 30.0
"""A run that has nothing to tell for as long tells that it goes on."""
TRACEBACK_CHARACTERS = 8000
"""The end of a traceback is kept."""

_log = logging.getLogger(__name__)

Listener = Callable[[Event], None]


class Journal:
    """What a run tells, for its listeners at once and for the store soon after.

    All store calls but the first and the last are made by a thread of its own, so that nobody waits for them. A store
    that is away is tried again; a driver that is killed takes the last seconds with it and nothing else.
    """

    def __init__(self, store: Store, farm: str, run_id: str, *listeners: Listener) -> None:
        self._store, self._farm, self.run_id, self._listeners = store, farm, run_id, listeners
        self._telling, self._writing = threading.RLock(), threading.Lock()
        self._segments: dict[int, bytearray] = {}  # that are to be put, the last one last
        self._number, self._tail = 0, bytearray()
        self._beginning: Event | None = None
        self._told_at = time.monotonic()
        self._wake, self._over = threading.Event(), threading.Event()

    def listen(self, listener: Listener) -> None:
        """Have another one hear how the run began, and what is told from now on."""
        with self._telling:
            if self._beginning:
                listener(self._beginning)
            self._listeners = (*self._listeners, listener)

    def tell(self, stage: str, state: State, **facts: Any) -> None:
        """Something has happened. facts: fields of `Event`."""
        if trace := facts.get("traceback"):
            facts["traceback"] = trace[-TRACEBACK_CHARACTERS:]
        assert facts.keys() <= Event.model_fields.keys(), facts.keys()
        with self._telling:
            event = Event(at=datetime.now(UTC), stage=stage, state=state, **facts)
            self._told_at = time.monotonic()
            self._add(event.line.encode() + b"\n")
            self._beginning = self._beginning or event
            for listener in self._listeners:
                listener(event)
        if event.of_run or state == "failed":
            self._wake.set()

    def note(self, text: str) -> None:
        """A sentence about the run."""
        self.tell("run", "note", text=text)

    @contextmanager
    def kept(self, **facts: Any) -> Iterator[None]:
        """Tell of the run's start, and of its end where the block raises; write while it runs, and to the end.

        Raises:
            UserError: the store does not take the first or the last events.
        """
        self.tell("run", "started", farm=self._farm, **facts)
        self.write()
        self._store.put(newest_key(self._farm), Newest(run=self.run_id).model_dump_json().encode())
        writer = threading.Thread(target=self._write_on, name=f"journal {self.run_id}", daemon=True)
        writer.start()
        try:
            yield
        except BaseException as error:
            self._end(writer)
            self.tell("run", **_ending(error))
            try:
                self.write()
            except Exception as trouble:  # what ended the run is to be heard of
                _log.warning("the last events of the run %s are lost: %s", self.run_id, trouble)
            raise
        self._end(writer)
        self.write()

    def write(self) -> None:
        """Put what has been told and is not in the store yet."""
        with self._writing:
            with self._telling:
                todo = {number: bytes(segment) for number, segment in self._segments.items()}
            for number, data in todo.items():
                self._store.put(segment_key(self.run_id, number), data)
                with self._telling:
                    if len(self._segments[number]) == len(data):
                        del self._segments[number]

    def _add(self, line: bytes) -> None:
        if not self._number or len(self._tail) + len(line) > SEGMENT_BYTES:
            self._number, self._tail = self._number + 1, bytearray()
        self._tail += line
        self._segments[self._number] = self._tail

    def _write_on(self) -> None:
        while not self._over.is_set():
            self._wake.wait(WRITE_SECONDS)
            self._wake.clear()
            if time.monotonic() - self._told_at > ALIVE_SECONDS:
                self.tell("run", "progress")
            try:
                self.write()
            except Exception as error:
                _log.warning("the events of the run %s are not written yet, trying again: %s", self.run_id, error)

    def _end(self, writer: threading.Thread) -> None:
        self._over.set()
        self._wake.set()
        writer.join()


class Line:
    """A stage's bar that tells the journal too, and what the stage tells besides."""

    def __init__(self, bar: Bar, journal: Journal, stage: str) -> None:
        self._bar, self._journal, self.stage = bar, journal, stage
        self._told: tuple[int, int] | None = None
        self._told_at = -PROGRESS_SECONDS

    def update(self, done: int, total: int, note: str = "") -> None:
        """How far it is; the journal is told now and then, and when all is done."""
        self._bar.update(done, total, note)
        now = time.monotonic()
        if (done, total) != self._told and (0 < done == total or now - self._told_at >= PROGRESS_SECONDS):
            self._told, self._told_at = (done, total), now
            self.tell("progress", done=done, total=total, text=note or None)

    def tell(self, state: State, **facts: Any) -> None:
        """An event of this stage."""
        self._journal.tell(self.stage, state, **facts)


def _ending(error: BaseException) -> dict[str, Any]:
    """How a run ended that something was raised from."""
    if isinstance(error, StoppedError) or not isinstance(error, Exception):  # the latter is a Ctrl-C
        return {"state": "stopped"}
    if isinstance(error, UserError):
        return {"state": "failed", "error": str(error)}
    message = f"{type(error).__name__}: {error}".splitlines()[0]
    return {"state": "failed", "error": message, "traceback": "".join(traceback.format_exception(error))}
