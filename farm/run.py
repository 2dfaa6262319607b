"""The farm's run: the stages in order, each doing only what the store does not have yet."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from farm.artifacts import Spec, find
from farm.boards import board_of
from farm.config import FarmConfig
from farm.errors import UserError
from farm.garbage import size_of
from farm.glance import Documents, kept_at
from farm.journal import Journal, Line
from farm.layout import mark_layout
from farm.mlflow_runs import Tracker
from farm.plan import make_plan
from farm.progress import Screen
from farm.publishing import Publisher, unpublished
from farm.queue import Queue
from farm.reporting import latest_report, new_run_id, put_report
from farm.signing import open_keys
from farm.standing import Seen, look, need, need_edits, quarantines
from farm.stop import Stop
from farm.store import open_store, where
from farm.todo import Todo, make_todo
from farm.turn import turn

if TYPE_CHECKING:
    from farm.cluster import Failure
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
    """One execution of a farm: its plan, its store and the events it leaves under `runs/<id>/` (`farm.events`)."""

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
        self.outcome = Outcome(new_run_id())
        self._ray = ExitStack()
        self._connected = False
        self._tracker: Tracker | None = None

    @cached_property
    def _documents(self) -> Documents:
        return Documents(self.store, kept_at(self.config.name))

    @property
    def _board(self) -> str | None:
        """The folder of this run's TensorBoard event files."""
        return board_of(self.outcome.run_id) if self.config.tracking.tensorboard else None

    @cached_property
    def _journal(self) -> Journal:
        return Journal(self.store, self.config.name, self.outcome.run_id, self.screen.event)

    def execute(self, stages: Sequence[str], *, dry_run: bool) -> Outcome:
        seen = look(self._documents, self.plan)
        todo = self._narrowed(make_todo(self.store, self.plan, seen))
        if dry_run:
            for line in todo.lines(stages) or ["nothing to do: it is all in the store"]:
                self.screen.say(line)
            return self.outcome
        if not todo:
            self.screen.say("everything is in the store already: nothing to do")
            self._conclude(seen)
            self.outcome.report = latest_report(self.store, self.plan) or self._report()
            if self._documents.news > KEEP_AGAIN:
                self._documents.keep()
            return self.outcome
        if address := self.config.tracking.mlflow:
            self._tracker = Tracker(address, self.config.name, self.outcome.run_id, self._journal.note)
        if "adapters" in stages:
            self.keys.need_private()  # better known now than when the first adapter is to be published
        mark_layout(self.store)
        self._foretell(seen, todo)
        with self._told(stages, todo, seen):
            try:
                with self._ray:
                    self._stages(stages)
            except UserError:
                for concept_id, reason in sorted(self.outcome.failures.items()):
                    self.screen.say(f"failed: {concept_id}: {reason}")
                raise
            seen = look(self._documents, self.plan)
            self._conclude(seen)
            self._documents.keep()
            self.outcome.report = self._report()
        return self.outcome

    @contextmanager
    def _told(self, stages: Sequence[str], todo: Todo, seen: Seen) -> Iterator[None]:
        """A journal while the block runs, from the run's start to how it ended."""
        with self._journal.kept(
            stages=tuple(stages), concepts=len(self.config.catalogue), todo=self._lacking(todo, seen)
        ):
            began = time.monotonic()
            yield
            facts = {name: getattr(self.outcome, name) for name in ("failures", "unpublished", "paused", "report")}
            self._journal.tell("run", "done", seconds=round(time.monotonic() - began, 2), **facts)

    def _lacking(self, todo: Todo, seen: Seen) -> dict[str, tuple[str, ...]]:
        return {**todo.names, "quarantined": tuple(quarantines(seen, self.plan))}

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
            self._journal.note(f"another run ({owner}) is at {name}: waiting for it to end")

        return turn(self.store, name, seconds=self.config.adapters.lease_seconds, on_wait=wait, stop=self.stop)

    def compare(self, concept_ids: Sequence[str]) -> None:
        """Have the candidates of these concepts edit the same few photos, and choose each one's teacher."""
        seen = look(self._documents, self.plan)
        with self._told(["comparison"], make_todo(self.store, self.plan, seen), seen):
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
        with self._stage(name) as line:
            self._failed(
                name, cluster.edit_concepts(self.store, self.plan, concept_ids, line, self.stop, goal, tell=line.tell)
            )
        reasons = quarantines(look(self._documents, self.plan), self.plan)
        for concept_id in concept_ids:
            if concept_id in reasons:
                line.tell("quarantined", concept=concept_id, error=reasons[concept_id])

    def _select(self) -> None:
        from farm.stages.ingest import ingest
        from farm.stages.select import select

        if find(self.store, self.plan.sources.path) is None:
            with self._stage("sources", self.plan.sources) as line:
                manifest = ingest(self.store, self.plan, line.update)
            for skipped in manifest.summary["skipped"]:
                self._journal.note(f"  skipped {skipped['name']}: {skipped['reason']}")
        if find(self.store, self.plan.selection.path) is None:
            with self._stage("selection", self.plan.selection) as line:
                manifest = select(self.store, self.plan)
                line.update(
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

            self._journal.note(
                f"the base, as it is trained: {where(self.store, f'{live_base(self.plan)}/samples.webp')}"
            )
            with self._stage("base", self.plan.base) as line:
                board = f"{self._board}/base" if self._board else None
                cluster.pretrain_base(self.store, self.plan, line, self.stop, board)
            if self._tracker and (base := find(self.store, self.plan.base.path)):
                self._tracker.trained("base", base)

    def _represent(self) -> None:
        from farm.stages.represent import choose_base

        with self._stage("representatives", self.plan.representatives) as line:
            chosen = choose_base(self.store, self.plan).summary["concepts"]
            line.update(1, 1, ", ".join(chosen))

    def _ranks(self) -> None:
        if find(self.store, self.plan.ranks.path) is None:
            need(self.store, self.plan.base, "the base", "jobs/pretrain_base.py")
            self._need_edits("ranks.concepts", self.config.ranks.concepts)
            self._connect()
            from farm import cluster

            with self._stage("ranks", self.plan.ranks) as line:
                cluster.search_ranks(self.store, self.plan, line, self.stop)

    def _adapters(self) -> None:
        need(self.store, self.plan.base, "the base", "jobs/pretrain_base.py")
        need(self.store, self.plan.ranks, "the rank search", "jobs/search_ranks.py")
        seen = look(self._documents, self.plan)
        whole = make_todo(self.store, self.plan, seen)
        todo = self._narrowed(whole)
        ready = [c for c in todo.adapters if c not in todo.edits]
        queue = Queue(self.store, "adapters")
        committed = {self.plan.adapter_key(c.id) for c in self.config.catalogue if c.id not in whole.adapters}
        for item in [*queue.pending(), *queue.failed()]:
            if item.key in committed:  # its driver died between the adapter's commit and the queue's
                queue.drop(item.key)
        for concept_id in todo.edits:
            self.outcome.failures.setdefault(concept_id, "it has no edits: run jobs/build_concepts.py first")

        publisher = Publisher(self.store, self.plan, self.keys, self._journal.tell, self._board, self._tracker)
        if ready:
            self._connect()
            from farm import cluster

            with self._stage("adapter", todo=self._lacking(todo, seen)) as line:
                try:
                    failures = cluster.train_adapters(
                        self.store, self.plan, ready, line, self.stop, publisher.trained, tell=line.tell
                    )
                except cluster.PausedError as paused:
                    failures, self.outcome.paused = paused.failures, paused.left
                self._failed("adapter", failures)
        for concept_id in set(todo.publish) - set(todo.adapters):
            publisher.publish(concept_id)

    def _connect(self) -> None:
        """Ray, from the first stage that needs it to the end of the run."""
        if not self._connected:
            from farm.cluster import Metrics, connected

            self._journal.note("starting Ray")
            self._ray.enter_context(connected(self.config.cluster, self.config.base))
            self._journal.listen(Metrics(self.outcome.run_id, self.config.name))
            self._ray.enter_context(self.stop.on_sigterm())  # Ray has put its own handler in the place
            self._connected = True

    @contextmanager
    def _stage(self, name: str, spec: Spec | None = None, **begin: Any) -> Iterator[Line]:
        """A stage's bar. spec: of the one artifact that it makes. begin: what to tell of its start."""
        started = time.monotonic()
        self._journal.tell(name, "started", **begin)
        with self.screen.bar(name) as bar:
            yield (line := Line(bar, self._journal, name))
        self.outcome.seconds[name] = round(time.monotonic() - started, 2)
        self.outcome.built += 1
        facts: dict[str, Any] = {"seconds": self.outcome.seconds[name]}
        if spec and (manifest := find(self.store, spec.path)):
            facts |= {"device_seconds": round(manifest.device_seconds, 2), "bytes": size_of(manifest)}
        line.tell("done", **facts)

    def _failed(self, stage: str, failures: Mapping[str, Failure]) -> None:
        for concept_id, failure in sorted(failures.items()):
            self.outcome.failures[concept_id] = f"{stage}: {failure.message}"

    def _need_edits(self, key: str, concept_ids: Sequence[str]) -> None:
        need_edits(self.store, self.plan, concept_ids, key, self.outcome.failures)

    def _conclude(self, seen: Seen) -> None:
        """Note what became of the concepts that nobody is served."""
        for concept_id, reason in quarantines(seen, self.plan).items():
            if concept_id in self.wanted:
                self.outcome.failures[concept_id] = f"quarantined: {reason}"
        held = unpublished(self.plan, seen)
        self.outcome.unpublished |= {concept_id: held[concept_id] for concept_id in self.wanted if concept_id in held}

    def _report(self) -> str:
        outcome = self.outcome
        return put_report(self.store, self.plan, outcome.run_id, failures=outcome.failures, seconds=outcome.seconds)

    def _foretell(self, seen: Seen, todo: Todo) -> None:
        """Keep what this run is to take, as far as that is known, to be held against what it took."""
        from farm.cost.predict import forecast
        from farm.cost.reconcile import keep

        keep(self.store, self.outcome.run_id, forecast(self.store, self.plan, seen, todo))
