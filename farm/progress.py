"""Progress on the terminal: live bars where there is one, a line every few seconds where the output is a file, or the
run's events as lines of JSON."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from farm.events import Event

LINE_SECONDS = 10.0


class Bar(Protocol):
    """One bar: what is done, of how much, and a few words about it."""

    def update(self, done: int, total: int, note: str = "") -> None: ...


class Screen:
    """Where a run shows how far it is (standard error, so that standard output stays for results)."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    def say(self, line: str) -> None:
        """One line above the bars."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def event(self, event: Event) -> None:
        """Show what a run tells; its bars show the rest."""
        if event.state == "note" and event.text:
            self.say(event.text)

    def table(self, title: str, reasons: Mapping[str, str]) -> None:
        """A title and a row for each concept; nothing when there is none."""
        if reasons:
            self.say(title)
            width = max(map(len, reasons))
            for concept_id, reason in sorted(reasons.items()):
                self.say(f"  {concept_id:<{width}}  {reason}")

    @contextmanager
    def bar(self, name: str) -> Iterator[Bar]:
        """A bar that stays on the screen when it is done."""
        if not self.console.is_terminal:
            yield _Lines(self, name)
            return
        columns = (
            TextColumn(f"{name:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(name, total=None, note="")

            class Live:
                def update(self, done: int, total: int, note: str = "") -> None:
                    progress.update(task, completed=done, total=total, note=note)

            yield Live()


class JsonLines(Screen):
    """A run's events, and whatever else is said, as lines of JSON and nothing between them."""

    def say(self, line: str) -> None:
        self.event(Event(at=datetime.now(UTC), stage="run", state="note", text=line))

    def event(self, event: Event) -> None:
        self.console.out(event.line, highlight=False)

    @contextmanager
    def bar(self, name: str) -> Iterator[Bar]:
        yield _Dark()

    @contextmanager
    def instead_of_logs(self) -> Iterator[None]:
        """Warnings of Python's logging are such lines too, while the block runs."""
        handler = _Notes(self)
        logging.getLogger().addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(handler)


class _Notes(logging.Handler):
    def __init__(self, lines: JsonLines) -> None:
        super().__init__(logging.WARNING)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.say(self.format(record))


class _Dark:
    """A bar that nobody sees."""

    def update(self, done: int, total: int, note: str = "") -> None:
        pass


class _Lines:
    def __init__(self, screen: Screen, name: str) -> None:
        self._screen = screen
        self._name = name
        self._started = time.monotonic()
        self._last = 0.0
        self._complete = False

    def update(self, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        complete = done == total
        if complete != self._complete or (not complete and now - self._last >= LINE_SECONDS):
            self._last, self._complete = now, complete
            self._screen.say(f"{self._name:<10} {done}/{total}  {now - self._started:.0f} s  {note}".rstrip())
