"""`farm logs`: what the runs have told, of a concept or of a run."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from textwrap import indent
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli_watch import LOOK_SECONDS, RunId
from farm.errors import UserError
from farm.options import Config, Override, load_config, naming
from farm.spelling import near

if TYPE_CHECKING:
    from farm.config import FarmConfig
    from farm.events import Event, Feed
    from farm.queue import Item, Queue


def logs(
    config: Config,
    concept: Annotated[
        str | None, typer.Argument(metavar="CONCEPT", help="All that is known of this concept.", show_default=False)
    ] = None,
    override: Override = None,
    run_id: RunId = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the newest run has ended.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON an event.")] = False,
) -> None:
    """What all runs told of a concept, attempts and tracebacks too; without one, what the newest run told of itself."""
    from farm.events import Feed, need_run, runs_of
    from farm.queue import Queue
    from farm.store import open_store
    from farm.threads import in_threads

    loaded = load_config(config, override or [])
    with naming(config):
        store = open_store(loaded.store)
    one = concept is None or run_id is not None or follow
    last = need_run(store, loaded.name, run_id) if one else None
    run_ids = [last] if last and (concept is None or run_id) else runs_of(store, loaded.name)
    feeds = [Feed(store, each) for each in run_ids]
    found = list(in_threads(Feed.news, feeds, store.at_once))
    printer = Printer(concept, as_json)
    if concept is not None:
        _check(concept, loaded, [event.concept for events in found for event in events if event.concept])
    told = [(feed.run_id, event) for feed, events in zip(feeds, found, strict=True) for event in events]
    for run_id, event in sorted(told, key=lambda pair: pair[1].at):  # several runs may go on at once
        printer.event(run_id, event)
    if concept is not None:
        printer.queue(Queue(store, "adapters"))
    if follow:
        with suppress(KeyboardInterrupt):
            _follow(feeds[-1], found[-1], printer)


def _check(concept: str, config: FarmConfig, told: Iterable[str]) -> None:
    known = {each.id for each in config.catalogue}.union(told)
    if concept not in known:
        place = f"in the catalogue of {config.name} or in its runs"
        raise UserError(f"farm logs: there is no {concept!r} {place}; {near(concept, known)}")


def _follow(feed: Feed, events: Sequence[Event], printer: Printer) -> None:
    """What comes from now on, until the run has ended or nothing is heard of it any more."""
    from farm.watching import GONE_SECONDS

    at = events[-1].at if events else datetime.now(UTC)
    while not any(event.ends_run for event in events) and (datetime.now(UTC) - at).total_seconds() < GONE_SECONDS:
        time.sleep(LOOK_SECONDS)
        events = feed.news()
        at = events[-1].at if events else at
        for event in events:
            printer.event(feed.run_id, event)


@dataclass
class Printer:
    """Prints what it is given of a concept, oldest first, or what is of the whole run where that is None."""

    concept: str | None
    as_json: bool
    run_id: str = ""
    traces: set[str] = field(default_factory=set)

    def event(self, run_id: str, event: Event) -> None:
        if event.concept == self.concept or (self.concept is None and (self.as_json or event.error)):
            self._print(run_id, event)

    def queue(self, queue: Queue) -> None:
        """What the queue holds of the concept: its failures, with the traceback where no event has told it."""
        items = [("failed", item) for item in queue.failed()]
        items += [("retried", item) for item in queue.pending() if item.attempts]
        mine = [(state, item) for state, item in items if item.payload["concept"] == self.concept]
        for state, item in mine:
            told = any(item.error.endswith(trace) for trace in self.traces)
            self._item(item, state, item.error if "\n" in item.error.strip() and not told else "")
        if not self.run_id and not mine:
            print(f"no run has told anything of {self.concept} yet", file=sys.stderr)

    def _print(self, run_id: str, event: Event) -> None:
        if event.traceback:
            self.traces.add(event.traceback)
        begins, self.run_id = run_id != self.run_id, run_id
        if self.as_json:
            print(json.dumps({"run": run_id, **event.facts}, ensure_ascii=False), flush=True)
            return
        if event.state == "progress":
            return
        if begins:
            print(f"run {run_id}")
        print(f"  {sentence(event)}", flush=True)
        if event.traceback:
            print(indent(event.traceback.rstrip(), "    "), flush=True)

    def _item(self, item: Item, state: str, traceback: str) -> None:
        last = (item.error.strip() or "no reason given").splitlines()[-1]
        if self.as_json:
            facts = {"stage": "queue", "state": state, "concept": item.payload["concept"], "attempt": item.attempts}
            print(json.dumps({"run": None, **facts, "key": item.key, "error": last, "traceback": traceback or None}))
            return
        times = f"{item.attempts} attempt{'s' * (item.attempts != 1)}"
        fix = "`farm queue retry` tries it again" if state == "failed" else "it waits for another one"
        print(f"in the queue: {state} after {times}: {last}; {fix}")
        if traceback:
            print(indent(traceback.rstrip(), "    "))


def sentence(event: Event) -> str:
    """An event in a line."""
    what = (event.teacher and f"{event.concept} {event.unit} by {event.teacher}") or event.concept or ""
    facts = [f"attempt {event.attempt}"] if event.attempt and (event.attempt > 1 or event.error) else []
    if event.images is not None:
        facts.append(f"{event.images} images")
    if event.seconds is not None:
        facts.append(f"{event.seconds:.1f} s")
    if event.bytes:
        facts.append(f"{event.bytes:,} bytes")
    if event.version is not None:
        facts.append(f"version {event.version}")
    if event.total is not None:
        facts.append(f"{event.done}/{event.total}")
    facts += [text for text in (event.text, event.error) if text]
    if event.failures:
        facts.append(f"{len(event.failures)} failed")
    said = f"{event.at:%Y-%m-%d %H:%M:%S}  {event.stage:<10} {event.state:<11} {what}".rstrip()
    return f"{said}  {', '.join(facts)}".rstrip()
