"""Runs that tests of readers have told, event by event, without a farm."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from farm.events import Event, Newest, newest_key, segment_key
from farm.store import Store

BEGAN = datetime(2026, 1, 1, 12, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return BEGAN + timedelta(seconds=seconds)


def event(after: float, stage: str, state: Any, concept: str | None = None, /, **facts: Any) -> Event:
    """What was told so many seconds after the run began."""
    return Event(at=at(after), stage=stage, state=state, concept=concept, **facts)


def started(*, concepts: int, farm: str = "stages", stages: Iterable[str] = (), **todo: Iterable[str]) -> Event:
    """The beginning of a run of four stages that has this to do."""
    asked = tuple(stages) or ("concepts", "base", "ranks", "adapters")
    lacking = {name: tuple(names) for name, names in todo.items()}
    return event(0, "run", "started", farm=farm, stages=asked, concepts=concepts, todo=lacking)


def told(store: Store, run_id: str, events: Iterable[Event]) -> None:
    """A run that has told this."""
    events = list(events)
    store.put(segment_key(run_id, 1), "".join(f"{event.line}\n" for event in events).encode())
    store.put(newest_key(events[0].farm or ""), Newest(run=run_id).model_dump_json().encode())
