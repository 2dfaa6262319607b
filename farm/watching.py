"""How far a run is, from its events alone: whoever sees the store can follow it, without photos, weights or cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from farm.events import Event

SILENT_SECONDS = 90.0
"""A run that has told nothing for as long, three times what it may, is silent: its driver may be gone."""
GONE_SECONDS = 600.0
"""And after as long, which is how long a driver waits for a store that is away, it is taken to be."""
PACE_SECONDS = 300.0
"""Rates are of so many last seconds."""
ORDER = ("sources", "selection", "comparison", "edits", "representatives", "base", "ranks", "adapter")
OPTIONAL = ("comparison", "representatives")
"""Shown only where they come up."""
KINDS = ("edits", "adapters", "published")
"""What every concept needs, in the order in which it gets it."""


@dataclass
class Stage:
    """A stage of the run. state: waiting, running, done, stopped with the run, or not asked for. told: when it had done
    how much."""

    state: str = "waiting"
    began: datetime | None = None
    seconds: float | None = None
    done: int | None = None
    total: int | None = None
    text: str = ""
    told: list[tuple[datetime, int]] = field(default_factory=list)

    def rate(self, now: datetime) -> float | None:
        """Of its progress, a second, lately; None where that is not known yet.

        What was there when it began, as the steps before a checkpoint, is no pace.
        """
        before = [told for told in self.told if told[0] < now - timedelta(seconds=PACE_SECONDS)]
        first = before[-1] if before else self.told[0] if self.told else None
        if first is None:
            return None
        span, made = (now - first[0]).total_seconds(), self.told[-1][1] - first[1]
        return made / span if span > 0 and made > 0 else None


class Watched:
    """What has been told of a run so far: `add` takes its events in order, `facts` says where it stands."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.farm: str | None = None
        self.began: datetime | None = None
        self.told_at: datetime | None = None
        self.end: Event | None = None
        self.note = ""
        self.stages = {name: Stage() for name in ORDER}
        self.concepts: int | None = None
        self.states: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}  # of the concepts that are not done
        self.running: dict[str, tuple[str, datetime]] = {}  # concept: what is made of it, since when
        self.trouble: dict[str, dict[str, Any]] = {}
        self.retried = 0
        self._made: dict[str, list[tuple[datetime, float]]] = {"units": [], "adapters": []}  # when, device seconds
        self._device: tuple[str, float] | None = None

    def add(self, events: Iterable[Event]) -> None:
        """What has been told since."""
        for event in events:
            self.told_at = event.at
            if event.device:
                self._device = event.device, event.device_memory or 0.0
            if event.stage == "run":
                self._of_run(event)
            elif event.concept is None:
                self._of_stage(self.stages.setdefault(event.stage, Stage()), event)
            elif event.unit is None or event.state == "failed":  # of a unit for good: its concept is given up
                self._of_concept(event, event.concept)
            if event.unit and event.state == "done":
                self._made["units"].append((event.at, event.device_seconds or 0.0))
            self.retried += event.state == "retried"

    @property
    def failed(self) -> bool:
        """Whether a run that has ended left something undone."""
        ended = self.end
        return ended is None or ended.state != "done" or bool(ended.failures or ended.paused)

    def state(self, now: datetime) -> str:
        """running, silent, done, failed or stopped."""
        if self.end:
            return self.end.state
        return "silent" if self.silence(now) > SILENT_SECONDS else "running"

    def silence(self, now: datetime) -> float:
        """Seconds since something was told, as far as the two clocks agree."""
        return max(0.0, (now - self.told_at).total_seconds()) if self.told_at else 0.0

    def facts(self, now: datetime) -> dict[str, Any]:
        """Where the run stands, as JSON takes it. Seconds, and rates a second unless they say otherwise.

        `concepts`: of each of `edits`, `adapters` and `published`, how many are in which state; None for a run of a
        farm that did not tell. `stages`: in order, each `{name, state, done, total, rate, eta_seconds, seconds, text}`.
        `busy`: devices that are kept at work on average. `running`: concepts and for how long. `failures`: concepts
        that failed or are quarantined, and why.
        """
        at = self.end.at if self.end else now
        span = min(PACE_SECONDS, (at - self.began).total_seconds()) if self.began else 0.0
        lately = {
            kind: [(t, s) for t, s in made if (at - t).total_seconds() < span] for kind, made in self._made.items()
        }
        adapters = self._pace("adapter", len(lately["adapters"]), at)
        units = self._pace("edits", len(lately["units"]), at)
        held = sum(seconds for made in lately.values() for _, seconds in made)
        return {
            "run": self.run_id,
            "farm": self.farm,
            "state": self.state(now),
            "began_at": self.began.isoformat() if self.began else None,
            "seconds": round((at - self.began).total_seconds(), 1) if self.began else None,
            "silent_seconds": None if self.end else round(self.silence(now), 1),
            "stages": [self._row(name, stage, at) for name, stage in self.stages.items() if self._shown(name, stage)],
            "concepts": self._counts(),
            "units_per_second": None if units is None else round(units, 4),
            "adapters_per_hour": None if adapters is None else round(3600 * adapters, 1),
            "busy": round(held / span, 2) if held and span else None,
            "device": self._device[0] if self._device else None,
            "device_memory": self._device[1] if self._device else None,
            "running": [
                {"concept": concept, "what": what, "seconds": round((at - since).total_seconds(), 1)}
                for concept, (what, since) in self.running.items()
            ],
            "retried": self.retried,
            "failures": list(self.trouble.values()),
            "error": self.end.error if self.end else None,
            "report": self.end.report if self.end else None,
        }

    def _of_run(self, event: Event) -> None:
        if event.state == "started":
            self.farm, self.began, self.concepts = event.farm, event.at, event.concepts
            self._expect(event.todo or {})
            self._ask(event.todo or {}, event.stages or ())
        elif event.ends_run:
            self.end = event
            self.running.clear()
            for stage in self.stages.values():
                if stage.state == "running":
                    stage.state = "stopped"
            if self.concepts is None and event.state == "done":  # what was there, a farm before this one did not tell
                for stage in self.stages.values():
                    stage.state = "done"
            for concept, reason in (event.failures or {}).items():
                self.trouble.setdefault(
                    concept, {"concept": concept, "stage": "run", "state": "failed", "error": reason}
                )
        elif event.state == "note":
            self.note = event.text or ""

    def _expect(self, todo: Mapping[str, Sequence[str]]) -> None:
        """What is still to be made of each concept; other runs may have made the rest meanwhile."""
        left_out = dict.fromkeys(todo.get("quarantined", ()), "quarantined")
        for kind, missing in zip(KINDS, ("edits", "adapters", "publish"), strict=True):
            known = {concept: state for concept, state in self.states[kind].items() if state != "waiting"}
            self.states[kind] = {**dict.fromkeys(todo.get(missing, ()), "waiting"), **left_out, **known}

    def _ask(self, todo: Mapping[str, Sequence[str]], asked: Sequence[str]) -> None:
        """Which stages there will be."""
        if not todo:
            return
        of = {"sources": "concepts", "selection": "concepts", "edits": "concepts", "adapter": "adapters"}
        missing_stages = {*todo.get("stages", ())}
        missing_stages |= {name for name, kind in (("edits", "edits"), ("adapter", "adapters")) if todo.get(kind)}
        for name, stage in self.stages.items():
            if name not in missing_stages:
                stage.state = "done"
            elif of.get(name, name) not in asked:
                stage.state = "not asked for"

    def _of_stage(self, stage: Stage, event: Event) -> None:
        if event.state == "started":
            stage.state, stage.began = "running", event.at
            for name in ORDER[: ORDER.index(event.stage)] if event.stage in ORDER else ():
                if self.stages[name].state == "waiting":
                    self.stages[name].state = "done"  # by another run, for which this one has waited
            if event.todo is not None:
                self._expect(event.todo)
        elif event.state == "progress" and event.done is not None:
            stage.done, stage.total, stage.text = event.done, event.total, event.text or ""
            if not stage.told or stage.told[-1][1] != event.done:
                stage.told = [*stage.told[-200:], (event.at, event.done)]
        elif event.state == "done":
            stage.state, stage.seconds, stage.text = "done", event.seconds, ""
            stage.done = stage.total  # the last of it may not have been told

    def _of_concept(self, event: Event, concept: str) -> None:
        kind = {"adapter": "adapters", "publish": "published"}.get(event.stage, "edits")
        states = self.states[kind]
        self.running.pop(concept, None)
        if event.state == "started":
            states[concept] = "running"
            self.running[concept] = (event.stage, event.at)
        elif event.state == "done":
            states.pop(concept, None)
            self.trouble.pop(concept, None)
            if kind == "adapters" and event.seconds is not None:
                self._made["adapters"].append((event.at, event.device_seconds or 0.0))
        elif event.state in ("failed", "quarantined"):
            for later in KINDS[KINDS.index(kind) :]:
                self.states[later][concept] = event.state
            self._troubled(event)
        elif event.state in ("retried", "stopped"):
            states[concept] = "waiting"

    def _troubled(self, event: Event) -> None:
        self.running.pop(event.concept or "", None)
        row = {"concept": event.concept, "stage": event.stage, "state": event.state, "error": event.error}
        self.trouble[event.concept or ""] = row

    def _counts(self) -> dict[str, dict[str, int]] | None:
        if self.concepts is None:
            return None
        counts = {}
        for kind, states in self.states.items():
            counts[kind] = {"done": self.concepts - len(states), **Counter(states.values())}
        return counts

    def _pace(self, name: str, made: int, at: datetime) -> float | None:
        """How many a second were made lately, or in the stage while it is young or over."""
        stage = self.stages[name]
        if stage.began is None or not made or stage.state != "running":
            return None
        span = min(PACE_SECONDS, (at - stage.began).total_seconds())
        return made / span if span > 0 else None

    def _shown(self, name: str, stage: Stage) -> bool:
        return name not in OPTIONAL or stage.began is not None

    def _row(self, name: str, stage: Stage, at: datetime) -> dict[str, Any]:
        rate = stage.rate(at) if stage.state == "running" else None
        left = stage.total - stage.done if stage.total is not None and stage.done is not None else None
        seconds = (at - stage.began).total_seconds() if stage.began and stage.state == "running" else stage.seconds
        return {
            "name": name,
            "state": stage.state,
            "done": stage.done,
            "total": stage.total,
            "rate": round(rate, 4) if rate else None,
            "eta_seconds": round(left / rate) if rate and left is not None else None,
            "seconds": None if seconds is None else round(seconds, 1),
            "text": stage.text,
        }
