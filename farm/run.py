"""The farm's run: the stages in order, each doing only what the store does not have yet."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from farm.artifacts import find
from farm.config import FarmConfig
from farm.errors import UserError
from farm.glance import Documents, kept_at
from farm.layout import mark_layout
from farm.plan import make_plan
from farm.progress import Screen
from farm.publishing import due, unfit
from farm.queue import Queue
from farm.registry import Registry
from farm.signing import open_keys
from farm.standing import Seen, look, quarantined, usable
from farm.stop import Stop, StoppedError
from farm.store import open_store, where
from farm.todo import Todo, make_todo
from farm.turn import turn

if TYPE_CHECKING:
    from farm.stages.teach import Goal

KEEP_AGAIN = 50
"""Documents that a run with nothing to do reads before it keeps them for the next."""
STAGES = ("concepts", "base", "ranks", "adapters")
"""A run's stages in order: source images and edits; the base; the rank search; adapters, judged and published."""


@dataclass
class Outcome:
    """How a run ended. failures: reason by concept. paused: adapters that wait in a paused queue. report: key of the
    report in the store."""

    run_id: str
    failures: dict[str, str] = field(default_factory=dict)
    unpublished: dict[str, str] = field(default_factory=dict)
    paused: int = 0
    built: int = 0
    report: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def run(
    config: FarmConfig,
    *,
    screen: Screen,
    stages: Sequence[str] = STAGES,
    dry_run: bool = False,
    stop: Stop | None = None,
    only: Collection[str] = (),
) -> Outcome:
    """Run the stages asked for, in order.

    only: concepts; nothing is then made but what they need. All of the catalogue when empty.

    Every stage looks at the store first, so the same command after an interruption, however rough, goes on where it
    stopped. A failed concept is reported in the outcome and does not stop the others. Several runs of one farm may
    go on at once: one makes the edits, the base or the ranks while the others wait for it, and all train adapters.

    Raises:
        UserError: a mistake that leaves nothing to go on with, or a stage whose inputs are not there yet.
        StoppedError: `stop` was asked for.
    """
    return Run(config, screen, stop, only).execute(stages, dry_run=dry_run)


class Run:
    """One execution of a farm: its plan, its store and the events it leaves under `runs/<id>/events.jsonl`."""

    def __init__(
        self, config: FarmConfig, screen: Screen, stop: Stop | None = None, only: Collection[str] = ()
    ) -> None:
        self.config = config
        self.wanted = [concept.id for concept in config.catalogue if not only or concept.id in only]
        self.screen = screen
        self.stop = stop or Stop()
        self.store = open_store(config.store, config.cluster.store_patience_seconds)
        self.plan = make_plan(config)
        self.keys = open_keys(config.signing.private_key, config.signing.public_keys)
        self.outcome = Outcome(f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}")
        self._events: list[dict[str, Any]] = []
        self._ray = ExitStack()
        self._connected = False

    @cached_property
    def _documents(self) -> Documents:
        return Documents(self.store, kept_at(self.config.name))

    def execute(self, stages: Sequence[str], *, dry_run: bool) -> Outcome:
        seen = look(self._documents, self.plan)
        todo = self._narrowed(make_todo(self.store, self.plan, seen))
        if dry_run:
            for line in todo.lines(stages) or ["nothing to do: it is all in the store"]:
                self.screen.say(line)
            return self.outcome
        if not todo:
            self.screen.say("everything is in the store already: nothing to do")
            self._quarantined(seen)
            self.outcome.report = self._latest_report() or self._report()
            self._unpublished(seen)
            if self._documents.news > KEEP_AGAIN:
                self._documents.keep()
            return self.outcome
        if "adapters" in stages:
            self.keys.need_private()  # better known now than when the first adapter is to be published
        mark_layout(self.store)
        self._event("run", "started", farm=self.config.name, stages=list(stages))
        try:
            with self._ray:
                self._stages(stages)
        except (StoppedError, KeyboardInterrupt):
            self._event("run", "stopped", failures=self.outcome.failures)
            raise
        except UserError:
            for concept_id, reason in sorted(self.outcome.failures.items()):
                self.screen.say(f"failed: {concept_id}: {reason}")
            raise
        seen = look(self._documents, self.plan)
        self._quarantined(seen)
        self._unpublished(seen)
        self._documents.keep()
        self.outcome.report = self._report()
        self._event("run", "finished", failures=self.outcome.failures)
        return self.outcome

    def _stages(self, stages: Sequence[str]) -> None:
        if "concepts" in stages:
            with self._turn(f"concepts-{self.config.name}"):
                self._concepts()
        self.stop.check()
        if "base" in stages and find(self.store, self.plan.base.path) is None:
            with self._turn(f"base-{self.plan.base.digest}"):
                self._base()
        self.stop.check()
        if "ranks" in stages and find(self.store, self.plan.ranks.path) is None:
            with self._turn(f"ranks-{self.plan.ranks.digest}"):
                self._ranks()
        self.stop.check()
        if "adapters" in stages:
            self._adapters()

    def _turn(self, name: str) -> AbstractContextManager[None]:
        def wait(owner: str) -> None:
            self.screen.say(f"another run ({owner}) is at {name}: waiting for it to end")

        return turn(self.store, name, seconds=self.config.adapters.lease_seconds, on_wait=wait, stop=self.stop)

    def compare(self, concept_ids: Sequence[str]) -> None:
        """Have the candidates of these concepts edit the same few photos, and choose each one's teacher."""
        self._select()
        todo = self._todo().comparisons
        if chosen := [concept_id for concept_id in concept_ids if concept_id in todo]:
            with self._ray:
                self._edit("comparison", chosen)

    def _todo(self) -> Todo:
        return make_todo(self.store, self.plan, look(self._documents, self.plan))

    def _narrowed(self, todo: Todo) -> Todo:
        base = self.config.base
        shared = base.concepts if base.representatives is None else self.config.eligible
        return todo.of(self.wanted, [*shared, *self.config.ranks.concepts])

    def _concepts(self) -> None:
        self._select()
        todo = self._narrowed(self._todo())
        if wanted := {*todo.comparisons, *todo.edits}:
            self._edit("quality", [concept.id for concept in self.config.catalogue if concept.id in wanted])

    def _edit(self, goal: Goal, concept_ids: Sequence[str]) -> None:
        self._connect()
        from farm import cluster

        name = "comparison" if goal == "comparison" else "edits"
        with self._stage(name) as bar:
            self._failed(name, cluster.edit_concepts(self.store, self.plan, concept_ids, bar, self.stop, goal))

    def _select(self) -> None:
        from farm.stages.ingest import ingest
        from farm.stages.select import select

        if find(self.store, self.plan.sources.path) is None:
            with self._stage("sources") as bar:
                manifest = ingest(self.store, self.plan, bar.update)
            for skipped in manifest.summary["skipped"]:
                self.screen.say(f"  skipped {skipped['name']}: {skipped['reason']}")
        if find(self.store, self.plan.selection.path) is None:
            with self._stage("selection") as bar:
                manifest = select(self.store, self.plan)
                bar.update(
                    1,
                    1,
                    f"{manifest.summary['train']} of {manifest.summary['training_images']} training images",
                )

    def _base(self) -> None:
        if find(self.store, self.plan.base.path) is None:
            if self.config.base.representatives is None:
                self._need_edits("base.concepts", self.config.base.concepts)
            elif find(self.store, self.plan.representatives.path) is None:
                made = [c for c in self.config.eligible if c not in self.outcome.failures]
                self._need_edits("base.representatives", made or self.config.eligible)
                self._represent()
            self._connect()
            from farm import cluster
            from farm.stages.pretrain import live_base

            self.screen.say(f"the base, as it is trained: {where(self.store, f'{live_base(self.plan)}/samples.webp')}")
            with self._stage("base") as bar:
                cluster.pretrain_base(self.store, self.plan, bar, self.stop)

    def _represent(self) -> None:
        from farm.stages.represent import choose_base

        with self._stage("representatives") as bar:
            chosen = choose_base(self.store, self.plan).summary["concepts"]
            bar.update(1, 1, ", ".join(chosen))

    def _ranks(self) -> None:
        if find(self.store, self.plan.ranks.path) is None:
            self._need("the base", self.plan.base.path, "jobs/pretrain_base.py")
            self._need_edits("ranks.concepts", self.config.ranks.concepts)
            self._connect()
            from farm import cluster

            with self._stage("ranks") as bar:
                cluster.search_ranks(self.store, self.plan, bar, self.stop)

    def _adapters(self) -> None:
        from farm.stages.adapt import publish

        self._need("the base", self.plan.base.path, "jobs/pretrain_base.py")
        self._need("the rank search", self.plan.ranks.path, "jobs/search_ranks.py")
        whole = self._todo()
        todo = self._narrowed(whole)
        ready = [c for c in todo.adapters if c not in todo.edits]
        queue = Queue(self.store, "adapters")
        committed = {self.plan.adapter_key(c.id) for c in self.config.catalogue if c.id not in whole.adapters}
        for item in [*queue.pending(), *queue.failed()]:
            if item.key in committed:  # its driver died between the adapter's commit and the queue's
                queue.drop(item.key)
        for concept_id in todo.edits:
            self.outcome.failures.setdefault(concept_id, "it has no edits: run jobs/build_concepts.py first")

        def done(concept_id: str) -> None:
            if not due(Registry(self.store).record(concept_id), self.plan.adapter(concept_id).digest):
                return
            if entry := publish(self.store, self.plan, concept_id, self.keys):
                self._event("publish", "done", concept=concept_id, version=entry.version)

        if ready:
            self._connect()
            from farm import cluster

            with self._stage("adapter") as bar:
                try:
                    failures = cluster.train_adapters(self.store, self.plan, ready, bar, self.stop, done)
                except cluster.PausedError as paused:
                    failures, self.outcome.paused = paused.failures, paused.left
                self._failed("adapter", failures)
        for concept_id in set(todo.publish) - set(todo.adapters):
            done(concept_id)

    def _connect(self) -> None:
        """Ray, from the first stage that needs it to the end of the run."""
        if not self._connected:
            from farm.cluster import connected

            self.screen.say("starting Ray")
            self._ray.enter_context(connected(self.config.cluster, self.config.base))
            self._ray.enter_context(self.stop.on_sigterm())  # Ray has put its own handler in the place
            self._connected = True

    @contextmanager
    def _stage(self, name: str) -> Iterator[Any]:
        started = time.monotonic()
        self._event(name, "started")
        with self.screen.bar(name) as bar:
            yield bar
        seconds = time.monotonic() - started
        self.outcome.seconds[name] = round(seconds, 2)
        self.outcome.built += 1
        self._event(name, "finished", seconds=self.outcome.seconds[name])

    def _failed(self, stage: str, failures: dict[str, Any]) -> None:
        for concept_id, failure in sorted(failures.items()):
            self.outcome.failures[concept_id] = f"{stage}: {failure.message}"
            self._event(stage, "failed", concept=concept_id, error=failure.message, traceback=failure.traceback)

    def _need(self, what: str, path: str, job: str) -> None:
        if find(self.store, path) is None:
            raise UserError(f"{what} of this farm is not in {self.store.url}; run {job} or `farm run` first.")

    def _need_edits(self, key: str, concept_ids: Sequence[str]) -> None:
        for concept_id in concept_ids:
            if find(self.store, self.plan.quality(concept_id).path) is None and not self._why(concept_id):
                reason = self.outcome.failures.get(concept_id, "run jobs/build_concepts.py or `farm run` first.")
                raise UserError(f"{key}: {concept_id} has no edits: {reason}")
        if not usable(self.store, self.plan, concept_ids):
            raise UserError(
                f"{key}: every concept of it is quarantined, first {concept_ids[0]}: {self._why(concept_ids[0])}."
            )

    def _why(self, concept_id: str) -> str | None:
        return quarantined(self.store, self.plan, concept_id)

    def _quarantined(self, seen: Seen) -> None:
        """Note the concepts whose edits are not worth learning from."""
        for concept_id in self.wanted:
            if reason := quarantined(seen.store, self.plan, concept_id):
                self.outcome.failures[concept_id] = f"quarantined: {reason}"

    def _unpublished(self, seen: Seen) -> None:
        """Note the adapters that exist but were not good enough to publish, or were taken out of service by hand."""
        for concept_id in self.wanted:
            manifest = find(seen.store, self.plan.adapter(concept_id).path)
            record = seen.records.get(concept_id)
            if manifest is None or (record and record.published and record.digest == manifest.digest):
                continue
            if reason := unfit(self.plan, manifest):
                self.outcome.unpublished[concept_id] = reason
            elif not due(record, manifest.digest):
                self.outcome.unpublished[concept_id] = (
                    f"taken out of service by hand; `farm publish {concept_id}` puts it back"
                )

    def _report(self) -> str:
        from farm.report import build_report

        key = f"runs/{self.outcome.run_id}/report.html"
        failures, seconds = self.outcome.failures, self.outcome.seconds
        self.store.put(key, build_report(self.store, self.plan, failures=failures, stage_seconds=seconds))
        self.store.put(f"runs/{self.outcome.run_id}/plan.json", json.dumps(self._addresses()).encode())
        return key

    def _latest_report(self) -> str | None:
        """The newest report of exactly these artifacts."""
        plans = [key for key in self.store.list("runs/") if key.endswith("/plan.json")]
        for key in reversed(plans):
            report = key.removesuffix("plan.json") + "report.html"
            if json.loads(self.store.get(key)) == self._addresses() and self.store.exists(report):
                return report
        return None

    def _addresses(self) -> list[str]:
        return [self.plan.adapter(concept.id).path for concept in self.config.catalogue]

    def _event(self, stage: str, state: str, **facts: Any) -> None:
        self._events.append({"at": datetime.now(UTC).isoformat(), "stage": stage, "state": state, **facts})
        lines = "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in self._events)
        self.store.put(f"runs/{self.outcome.run_id}/events.jsonl", lines.encode())
