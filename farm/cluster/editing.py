"""Teachers on Ray: a pool of workers that keep their model loaded, fed unit by unit."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

from farm.cluster.connect import slots
from farm.cluster.watch import POLL_SECONDS, WORKER_RETRIES, Failure, failure_of
from farm.plan import Plan
from farm.progress import Bar
from farm.stages.teach import Goal, advance
from farm.stages.units import Unit, Worker
from farm.store import Store

IN_FLIGHT = 2
"""Units a worker holds: one being edited while the one before is measured and stored."""


def edit_concepts(
    store: Store, plan: Plan, concept_ids: Sequence[str], bar: Bar, goal: Goal = "quality"
) -> dict[str, Failure]:
    """Have the teachers do for every concept what `farm.stages.teach` says is next, until its goal is reached.

    A concept with a failed unit is given up, the others go on. A worker whose node dies is started again elsewhere and
    repeats what it held.
    """
    import ray

    failures: dict[str, Failure] = {}
    waiting: list[Unit] = []
    left: Counter[str] = Counter()  # units of a concept's present step that are not done
    done = total = 0

    def go_on(concept_id: str) -> None:
        nonlocal total
        try:
            units = advance(store, plan, concept_id, goal)
        except Exception as error:  # one concept's failure, whatever it is, must not stop the others
            failures[concept_id] = failure_of(error)
            return
        left[concept_id] = len(units)
        total += len(units)
        waiting.extend(units)

    def show() -> None:
        bar.update(done, total, ", ".join(sorted({unit.concept for _, unit in pool.running.values()})))

    pool = _Pool(store, plan)
    try:
        for concept_id in concept_ids:
            go_on(concept_id)
        show()
        while waiting or pool.running:
            pool.feed(waiting)
            for result in ray.wait(list(pool.running), timeout=POLL_SECONDS)[0]:
                _, unit = pool.running.pop(result)
                done += 1
                left[unit.concept] -= 1
                try:
                    ray.get(result)
                except Exception as error:  # as above
                    failures.setdefault(unit.concept, failure_of(error))
                    kept = [other for other in waiting if other.concept != unit.concept]
                    total -= len(waiting) - len(kept)
                    waiting[:] = kept
                else:
                    if not left[unit.concept] and unit.concept not in failures:
                        go_on(unit.concept)
                show()
    finally:
        pool.close()
    return failures


class _Actor:
    """A worker that Ray can start again anywhere: what it works on comes with its first unit."""

    def __init__(self) -> None:
        self._starting = threading.Lock()
        self._worker: Worker | None = None

    def work(self, store: Store, plan: Plan, unit: Unit) -> None:
        with self._starting:
            self._worker = self._worker or Worker(store, plan)
        self._worker.work(unit)


class _Pool:
    """As many workers as the cluster takes, started as they are needed. running: (worker, unit) by Ray's result."""

    def __init__(self, store: Store, plan: Plan) -> None:
        import ray

        resources = plan.config.cluster.edit
        options: dict[str, Any] = {
            "num_cpus": resources.cpus,
            "num_gpus": resources.gpus,
            "max_restarts": WORKER_RETRIES,
            "max_task_retries": WORKER_RETRIES,
            "max_concurrency": IN_FLIGHT,
        }
        self._remote = ray.remote(**options)(_Actor)
        self._store, self._plan, self._shared = store, plan, ray.put(plan)
        self._most = slots(resources)
        self._workers: list[Any] = []
        self._models: list[object] = []  # that each worker was last given
        self.running: dict[Any, tuple[int, Unit]] = {}

    def feed(self, waiting: list[Unit]) -> None:
        """Hand out units until every worker has its share."""
        while waiting:
            held = Counter(number for number, _ in self.running.values())
            number = min(range(len(self._workers)), key=lambda number: held[number], default=None)
            if (number is None or held[number]) and len(self._workers) < self._most:
                number = len(self._workers)
                self._workers.append(self._remote.remote())
                self._models.append(None)
            if number is None or held[number] >= IN_FLIGHT:
                return
            unit = waiting.pop(self._best(number, waiting))
            self._models[number] = self._model(unit)
            self.running[self._workers[number].work.remote(self._store, self._shared, unit)] = (number, unit)

    def close(self) -> None:
        """Stop the workers, and so let go of the memory their models take."""
        import ray

        for worker in self._workers:
            ray.kill(worker)

    def _best(self, number: int, waiting: list[Unit]) -> int:
        """The unit whose model the worker has loaded already, else one whose model no worker has, else the first."""
        models = [self._model(unit) for unit in waiting]
        if self._models[number] in models:
            return models.index(self._models[number])
        return next((place for place, model in enumerate(models) if model not in self._models), 0)

    def _model(self, unit: Unit) -> object:
        settings = self._plan.config.candidates(unit.concept)[unit.teacher]
        return settings.kind if settings.kind == "procedural" else settings  # filters are loaded in no time
