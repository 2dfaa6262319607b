"""Teachers on Ray: a pool of workers that keep their model loaded, fed unit by unit."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from statistics import quantiles
from typing import Any, Protocol

from farm.cluster.placement import slots, worker_options
from farm.cluster.watch import POLL_SECONDS, WORKER_RETRIES, Failure, ended, failure_of
from farm.events import Spent, Tell, untold
from farm.plan import Plan
from farm.progress import Bar
from farm.stages.teach import Goal, advance
from farm.stages.units import Unit, Worker
from farm.stop import Stop
from farm.store import Store

IN_FLIGHT = 2
"""Units a worker holds: one being edited while the one before is measured and stored."""
OPENING = 8
"""Concepts whose next step is looked up, or whose finished one is committed, at once."""
STRAGGLER = 3.0
"""A unit that takes this many times as long as nine of ten others is given to an idle worker as well."""


class Works(Protocol):
    """What a pool's worker does: see `farm.stages.units.Worker`."""

    def work(self, unit: Unit) -> Spent: ...


def edit_concepts(
    store: Store,
    plan: Plan,
    concept_ids: Sequence[str],
    bar: Bar,
    stop: Stop,
    goal: Goal = "quality",
    make_worker: Callable[[Store, Plan], Works] = Worker,
    tell: Tell = untold,
) -> dict[str, Failure]:
    """Have the teachers do for every concept what `farm.stages.teach` says is next, until its goal is reached.

    A concept with a failed unit is given up, the others go on. A worker whose node dies is started again elsewhere,
    and others take what it held; a unit that hangs is done by another worker too. `tell` hears of units and concepts.

    Raises:
        StoppedError: asked to stop; what was under way has been finished, or had no time to.
    """
    return _Editing(store, plan, concept_ids, bar, stop, goal, make_worker, tell).run()


class _Editing:
    """Concepts on their way: opened a few at a time, so that memory and the wait at the start do not grow with them."""

    def __init__(
        self,
        store: Store,
        plan: Plan,
        concept_ids: Sequence[str],
        bar: Bar,
        stop: Stop,
        goal: Goal,
        make_worker: Callable[[Store, Plan], Works],
        tell: Tell,
    ) -> None:
        self._store, self._plan, self._goal, self._bar, self._stop = store, plan, goal, bar, stop
        self._tell = tell
        self._unopened = deque(concept_ids)
        self._opening: dict[Future[list[Unit]], str] = {}
        self._left: dict[str, set[Unit]] = {}  # units of a concept's present step that are not done
        self._failures: dict[str, Failure] = {}
        self._done = self._total = self._opened = 0
        self._pool = _Pool(store, plan, make_worker, tell)

    def run(self) -> dict[str, Failure]:
        with ThreadPoolExecutor(OPENING) as threads:
            try:
                while self._unopened or self._opening or self._left:
                    if self._stop.over or (self._stop.asked and not self._pool.running):
                        self._stop.check()
                    if not self._stop.asked:
                        while self._unopened and len(self._opening) < OPENING and self._pool.hungry:
                            self._tell("started", concept=self._unopened[0])
                            self._open(threads, self._unopened.popleft())
                            self._opened += 1
                        self._pool.feed()
                    self._show()
                    self._collect(threads)
            finally:
                self._pool.close()
                for future in self._opening:
                    future.cancel()
        self._show()
        return self._failures

    def _open(self, threads: ThreadPoolExecutor, concept_id: str) -> None:
        """Look up what is next for the concept, having committed what is complete."""
        self._opening[threads.submit(advance, self._store, self._plan, concept_id, self._goal)] = concept_id

    def _collect(self, threads: ThreadPoolExecutor) -> None:
        """What has come back: units to do, and units that are done."""
        for future in [future for future in self._opening if future.done()]:
            concept_id = self._opening.pop(future)
            try:
                units = future.result()
            except Exception as error:  # one concept's failure, whatever it is, must not stop the others
                self._fail(concept_id, error)
                continue
            if units:
                self._left[concept_id] = set(units)
                self._total += len(units)
                self._pool.add(units)
            else:
                self._tell("done", concept=concept_id)
        for unit, came in self._pool.finished(timeout=0.02 if self._opening else POLL_SECONDS):
            left = self._left.get(unit.concept, set())
            if unit not in left:  # its concept has been given up
                continue
            left.discard(unit)
            self._done += 1
            if isinstance(came, Exception):
                self._fail(unit.concept, came, **_named(unit))
                self._total -= len(left)
                self._pool.drop(unit.concept)
                del self._left[unit.concept]
                continue
            self._tell("done", **_named(unit), **came.facts)
            if not left:
                del self._left[unit.concept]
                self._open(threads, unit.concept)

    def _fail(self, concept_id: str, error: Exception, **facts: Any) -> None:
        self._failures[concept_id] = failure = failure_of(error)
        facts = {"concept": concept_id, **facts}
        self._tell("failed", error=failure.message, traceback=failure.traceback, **facts)

    def _show(self) -> None:
        unopened = round(len(self._unopened) * self._total / max(1, self._opened))
        concepts = sorted({unit.concept for unit in self._pool.running.values()})
        shown = ", ".join(concepts[:4]) + (f" and {len(concepts) - 4} more" if len(concepts) > 4 else "")
        self._bar.update(self._done, self._total + unopened, shown)


class _Actor:
    """A worker that Ray can start again anywhere: what it works on comes with its first unit."""

    def __init__(self) -> None:
        self._starting = threading.Lock()
        self._worker: Works | None = None

    def ready(self) -> None:
        """Answers once the worker runs."""

    def work(self, given: tuple[Callable[[Store, Plan], Works], Store, Plan], unit: Unit) -> Spent:
        make_worker, store, plan = given
        with self._starting:
            self._worker = self._worker or make_worker(store, plan)
        return self._worker.work(unit)


class _Pool:
    """As many workers as the cluster takes, started as they are needed. running: the unit by Ray's result."""

    def __init__(self, store: Store, plan: Plan, make_worker: Callable[[Store, Plan], Works], tell: Tell) -> None:
        import ray

        options = {
            **worker_options(plan.config.cluster.edit),
            "max_restarts": -1,
            "max_concurrency": IN_FLIGHT + 1,
        }
        self._remote = ray.remote(**options)(_Actor)
        self._config = plan.config
        self._tell = tell
        self._given = ray.put((make_worker, store, plan))
        self._workers: list[Any] = []
        self._starting: dict[Any, int] = {}  # number of a worker that does not run yet, by its answer
        self._models: list[object] = []  # that each worker was last given
        self._held: Counter[int] = Counter()  # units of each worker
        self._lost: Counter[Unit] = Counter()  # how often a unit's worker died
        self._waiting: dict[object, deque[Unit]] = defaultdict(deque)  # by model
        self._by: dict[Any, tuple[int, float]] = {}  # worker and start of what runs
        self._seconds: dict[object, deque[float]] = defaultdict(lambda: deque(maxlen=100))  # of units, by model
        self._known_models: dict[tuple[str, str], object] = {}
        self.running: dict[Any, Unit] = {}

    @property
    def _slots(self) -> int:
        return slots(self._config.cluster.edit, self._config.cluster.autoscaling)

    @property
    def hungry(self) -> bool:
        """Whether there are fewer units waiting than the workers take in a while."""
        return self._count() < 2 * IN_FLIGHT * self._slots

    def add(self, units: Iterable[Unit]) -> None:
        for unit in units:
            self._waiting[self._model(unit)].append(unit)

    def drop(self, concept_id: str) -> None:
        """Forget the units of a concept that wait."""
        for model, units in list(self._waiting.items()):
            self._waiting[model] = deque(unit for unit in units if unit.concept != concept_id)

    def feed(self) -> None:
        """Hand out units until every worker that runs has its share; start workers while there is work for more."""
        most = min(self._slots, self._count() + len(set(self.running.values())))
        while len(self._workers) < most:
            number = len(self._workers)
            self._workers.append(self._remote.remote())
            self._models.append(None)
            self._await(number)
        starting = set(self._starting.values())
        free = [number for number in range(len(self._workers)) if number not in starting]
        for share in range(1, IN_FLIGHT + 1):
            for number in free:
                if share > 1 and self._count() <= len(self._workers):
                    break  # the last units wait for whoever is free first, not behind a long one
                if self._held[number] < share and (model := self._best(number)) is not None:
                    self._give(number, self._waiting[model].popleft())
        if not self._count():
            idle = [number for number in free if not self._held[number]]
            for number, unit in zip(idle, self._stragglers(), strict=False):
                self._give(number, unit)

    def finished(self, timeout: float) -> list[tuple[Unit, Spent | Exception]]:
        """Units that have ended since, with what they took or what went wrong; a unit given to two workers ends with
        the first."""
        import ray
        from ray.exceptions import RayActorError

        done: list[tuple[Unit, Spent | Exception]] = []
        for result in ended([*self.running, *self._starting], timeout):
            if result in self._starting:
                del self._starting[result]
                continue
            unit = self.running.pop(result)
            number, started = self._by.pop(result)
            self._held[number] -= 1
            try:
                came: Spent | Exception = ray.get(result)
            except RayActorError as raised:
                # Ray starts the worker again, once it has learned that a node is gone; others take what it held.
                came = raised
                self._await(number)
                self._lost[unit] += 1
                if self._lost[unit] <= WORKER_RETRIES:
                    self._tell("retried", **_named(unit), error=failure_of(raised).message)
                    if unit not in self.running.values():
                        self._waiting[self._model(unit)].appendleft(unit)
                    continue
            except Exception as raised:
                came = raised
            else:
                self._seconds[self._model(unit)].append(time.monotonic() - started)
            if unit not in self.running.values() or not isinstance(came, Exception):
                done.append((unit, came))
        return done

    def close(self) -> None:
        """Stop the workers, and so let go of the memory their models take."""
        import ray

        for worker in self._workers:
            ray.kill(worker)

    def _await(self, number: int) -> None:
        """Give the worker nothing until it says that it runs, however long that takes."""
        if number not in self._starting.values():
            self._starting[self._workers[number].ready.options(max_task_retries=-1).remote()] = number

    def _give(self, number: int, unit: Unit) -> None:
        self._models[number] = self._model(unit)
        self._held[number] += 1
        result = self._workers[number].work.remote(self._given, unit)
        self.running[result], self._by[result] = unit, (number, time.monotonic())

    def _stragglers(self) -> list[Unit]:
        """Units that one worker alone has had for far too long, the oldest first."""
        now, copies = time.monotonic(), Counter(self.running.values())
        late = []
        for result, unit in self.running.items():
            known = self._seconds[self._model(unit)]
            if copies[unit] == 1 and len(known) >= 10:
                age = now - self._by[result][1]
                if age > STRAGGLER * quantiles(known, n=10)[-1]:
                    late.append((age, unit))
        return [unit for _, unit in sorted(late, key=lambda pair: -pair[0])]

    def _best(self, number: int) -> object | None:
        """The model of which the worker should get a unit: the one it has loaded already, else one that no worker has,
        else the first. None when nothing waits."""
        models = [model for model, units in self._waiting.items() if units]
        if not models:
            return None
        if self._models[number] in models:
            return self._models[number]
        return next((model for model in models if model not in self._models), models[0])

    def _count(self) -> int:
        return sum(len(units) for units in self._waiting.values())

    def _model(self, unit: Unit) -> object:
        """What a worker loads for a unit: equal for units that it can do one after another."""
        known = (unit.concept, unit.teacher)
        if known not in self._known_models:
            settings = self._config.candidates(unit.concept)[unit.teacher]
            # Filters are loaded in no time.
            self._known_models[known] = settings.kind if settings.kind == "procedural" else settings
        return self._known_models[known]


def _named(unit: Unit) -> dict[str, Any]:
    """Which unit an event is of."""
    return {"concept": unit.concept, "unit": unit.name, "teacher": unit.teacher, "attempt": unit.attempt + 1}
