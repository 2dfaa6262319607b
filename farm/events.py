"""What runs tell of themselves: events, under `runs/<id>/events/` in the store, and how they are read.

An event is a line of JSON. Lines lie in numbered segments, of which only the last one still grows and is put again
whole, since object stores have no append; so a reader lists the segments and reads those that it has not read yet.
`farm.journal` writes them. `events_of` reads a run, `Feed` follows one, `runs_of` and `newest_run` find a farm's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from farm.artifacts import DOCUMENT_BYTES
from farm.errors import IntegrityError, UserError
from farm.objects import is_key
from farm.spelling import near
from farm.store import NotFoundError, Reader, Store, where
from farm.threads import in_threads

State = Literal["started", "progress", "done", "retried", "failed", "quarantined", "stopped", "note"]


class Event(BaseModel):
    """Something that happened in a run. What does not apply is None.

    at: when, in UTC by the driver's clock. stage: `run`, `sources`, `selection`, `comparison`, `edits`,
        `representatives`, `base`, `ranks`, `adapter` or `publish`. state: of the run or the stage where there is no
        concept, of the concept, or of one unit of its edits:

        started; done; failed, for good; retried, failed and given another attempt; quarantined, edits not worth
        learning from or an adapter that is not good enough; stopped by a SIGTERM or Ctrl-C, to be gone on with;
        progress, at most every few seconds a stage, and of the run when nothing else has been told for a while; note,
        a sentence.
    seconds: that it took. device_seconds: of these, those in which a teacher or a training held its device. bytes: put
        into the store. images: that a unit edited. attempt: 1 for the first one. device: the GPU that worked, None for
        a CPU; device_memory: the largest share of its memory that was taken, 0..1.
    done, total: of the stage's units of work, adapters or steps; text: a note, or a few words on the progress.
    version: that was published.
    farm, stages, concepts, todo: of the run's start: the farm's name, the stages asked for, how many concepts there
        are, and the ids of those that lacked `edits`, `adapters` and `publish`, and of `quarantined` ones; that of the
        start of the stage `adapter` too, since other runs may have made something meanwhile.
    failures, unpublished, paused, report: of its end, as in `farm.run.Outcome`.
    """

    model_config = ConfigDict(frozen=True)  # an unknown key is a newer farm's, and passed over

    at: datetime
    stage: str
    state: State
    concept: str | None = None
    unit: str | None = None
    teacher: str | None = None
    attempt: int | None = None
    seconds: float | None = None
    device_seconds: float | None = None
    bytes: int | None = None
    images: int | None = None
    device: str | None = None
    device_memory: float | None = None
    done: int | None = None
    total: int | None = None
    text: str | None = None
    version: int | None = None
    error: str | None = None
    traceback: str | None = None
    farm: str | None = None
    stages: tuple[str, ...] | None = None
    concepts: int | None = None
    todo: dict[str, tuple[str, ...]] | None = None
    failures: dict[str, str] | None = None
    unpublished: dict[str, str] | None = None
    paused: int | None = None
    report: str | None = None

    @field_validator("state", mode="before")
    @classmethod
    def _of_old(cls, state: Any) -> Any:
        return "done" if state == "finished" else state  # as farms before this one wrote it

    @property
    def line(self) -> str:
        """The event as JSON, without an end of line."""
        return json.dumps(self.facts, ensure_ascii=False)

    @property
    def facts(self) -> dict[str, Any]:
        """What applies, as JSON takes it."""
        return self.model_dump(mode="json", exclude_none=True)

    @property
    def of_run(self) -> bool:
        """Whether it is of the run or a whole stage, and neither of a concept nor a sign of life."""
        return self.concept is None and self.state != "progress"

    @property
    def ends_run(self) -> bool:
        return self.stage == "run" and self.state in ("done", "failed", "stopped")


class Tell(Protocol):
    """Tells of something that happened, of a stage that the teller knows. facts: fields of `Event`."""

    def __call__(self, state: State, **facts: Any) -> None: ...


def untold(state: State, **facts: Any) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class Spent:
    """What a piece of work took, as a worker tells its driver: see `Event`."""

    seconds: float
    device_seconds: float = 0.0
    bytes: int = 0
    images: int | None = None
    device: str | None = None
    device_memory: float | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """As fields of an event."""
        seconds = {"seconds": round(self.seconds, 3), "device_seconds": round(self.device_seconds, 3)}
        return {**vars(self), **seconds}


def events_of(store: Reader, run_id: str) -> Iterator[Event]:
    """What a run has told so far, oldest first; nothing for a run that is not there.

    Raises:
        IntegrityError: a segment is damaged.
    """
    for key in _segments(store, run_id):
        yield from _read(store, key)


@dataclass
class Feed:
    """A run's events as they come, for one thread: each `news` is one listing and a read of what has changed."""

    store: Store
    run_id: str
    _marks: dict[str, str] = field(default_factory=dict)
    _seen: dict[str, int] = field(default_factory=dict)

    def news(self) -> list[Event]:
        """The events since the last call; IntegrityError as `events_of`."""
        found: list[Event] = []
        for key, mark in sorted(self.store.marks(_folder(self.run_id)).items()):
            if self._marks.get(key) != mark:
                events = _read(self.store, key)
                found += events[self._seen.get(key, 0) :]
                self._marks[key], self._seen[key] = mark, len(events)
        return found


def runs_of(store: Store, farm: str) -> list[str]:
    """The ids of a farm's runs, oldest first, by one listing of all runs and the beginning of each."""
    first: dict[str, str] = {}
    for key in store.list("runs/"):
        _, run_id, rest = key.split("/", 2) if key.count("/") > 1 else (key, "", "")
        if rest.startswith("events"):
            first.setdefault(run_id, key)
    began = zip(first, in_threads(partial(_begin, store), first.values(), store.at_once), strict=True)
    return [run_id for run_id, event in began if event and event.farm == farm]


def newest_run(store: Store, farm: str) -> str | None:
    """The id of the farm's newest run, by one read; where no run has left that note, as `runs_of`."""
    try:
        return Newest.model_validate_json(store.get(newest_key(farm), DOCUMENT_BYTES)).run
    except (NotFoundError, ValidationError):
        return max(runs_of(store, farm), default=None)


def need_run(store: Store, farm: str, run_id: str | None = None) -> str:
    """The run of that id, or the farm's newest; UserError when there is none."""
    if run_id is None:
        if newest := newest_run(store, farm):
            return newest
        raise UserError(f"{farm} has not been run in {store.url}; `farm run` starts it.")
    if "/" in run_id or not is_key(run_id) or next(_segments(store, run_id), None) is None:
        raise UserError(f"--run: {store.url} holds no run {run_id!r}; {near(run_id, runs_of(store, farm))}")
    return run_id


class Newest(BaseModel):
    """Which run of a farm began last."""

    run: str = Field(pattern=r"^[A-Za-z0-9-]+$")


def newest_key(farm: str) -> str:
    """Where the farm's newest run notes itself: like all of `glance/`, what can be found out without."""
    return f"glance/{farm}.run.json"


def segment_key(run_id: str, number: int) -> str:
    """The key of a run's segment, counted from 1."""
    return f"{_folder(run_id)}/{number:06d}.jsonl"


def _folder(run_id: str) -> str:
    """Also the beginning of `events.jsonl`, in which farms before this one kept all events."""
    return f"runs/{run_id}/events"


def _segments(store: Reader, run_id: str) -> Iterator[str]:
    return store.list(_folder(run_id))


def _read(store: Reader, key: str) -> list[Event]:
    lines = store.get(key, DOCUMENT_BYTES).splitlines()
    return [_parse(store, key, number, line) for number, line in enumerate(lines, 1)]


def _begin(store: Reader, key: str) -> Event | None:
    """The first event of a segment; None where it is damaged or gone."""
    try:
        return next(iter(_read(store, key)), None)
    except (IntegrityError, NotFoundError):
        return None


def _parse(store: Reader, key: str, number: int, line: bytes) -> Event:
    try:
        return Event.model_validate_json(line)
    except ValidationError as error:
        why = error.errors(include_input=False)[0]["msg"]
        raise IntegrityError(f"{where(store, key)} is damaged (line {number}: {why}): delete it.") from error
