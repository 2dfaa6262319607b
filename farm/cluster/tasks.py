"""Ray tasks: the adapters, from the queue."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from e2gan.train import Stopped
from farm.artifacts import find
from farm.cluster.placement import slots, worker_options
from farm.cluster.watch import POLL_SECONDS, WORKER_RETRIES, Failure, Line, ended, failure_of, followed
from farm.device import gpu_used
from farm.errors import StoreError
from farm.events import Spent, Tell, untold
from farm.garbage import size_of
from farm.plan import Plan
from farm.progress import Bar
from farm.queue import Lease, LeaseLostError, Queue, owner_name
from farm.stages import adapt
from farm.standing import quarantined
from farm.stop import Stop
from farm.store import NotFoundError, Store

ADAPTERS_A_PROCESS = 20
"""Adapters a worker process trains before it is replaced, and what has leaked with it. Ray replaces one that has a GPU
after every task, and the next takes seconds to import torch and to open the GPU."""
REMEMBER_SECONDS = 60  # a priority changed by dropping and adding an item anew is seen this late

Train = Callable[[Store, Plan, str, Line], Spent]
"""Trains and commits the adapter of a concept, on a worker, and says what that took."""


class PausedError(Exception):
    """The queue is paused. failures: the concepts that had failed before. left: how many wait."""

    def __init__(self, failures: dict[str, Failure], left: int) -> None:
        super().__init__(f"{left} adapters wait in a paused queue")
        self.failures, self.left = failures, left


def train_adapter(store: Store, plan: Plan, concept_id: str, line: Line) -> Spent:
    """Train and commit one adapter, on the GPU where the configuration gives it one."""
    import torch

    torch.set_num_threads(plan.config.cluster.adapters.cpus)
    device = "cuda" if plan.config.cluster.adapters.gpus and torch.cuda.is_available() else "cpu"
    began = time.monotonic()
    try:
        made = adapt.adapt(store, plan, concept_id, device=device, on_progress=line, should_stop=line.should_stop)
        seconds = time.monotonic() - began
        return Spent(seconds, seconds, size_of(made), **gpu_used())
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()  # others share the GPU while this process waits for its next adapter


def train_adapters(
    store: Store,
    plan: Plan,
    concept_ids: Sequence[str],
    bar: Bar,
    stop: Stop,
    on_done: Callable[[str], None],
    train: Train = train_adapter,
    tell: Tell = untold,
) -> dict[str, Failure]:
    """Put adapters on the queue and work it until none of them is left, nor of the plan's others added meanwhile.

    This driver holds the leases, so that a worker that dies counts as an attempt; another driver may work the same
    queue. `on_done(concept)` is called after each adapter is committed, by one thread, so that no slot waits for it.
    `tell` hears of every attempt.

    Raises:
        PausedError: the queue was paused; what ran has been finished, and what waits stays pending.
        StoppedError: asked to stop; what ran has been finished or left a checkpoint, and its leases were given back.
        StoreError: the store is full or away; leases are left to expire.
    """
    work = _Adapters(store, plan, concept_ids, bar, stop, on_done, train, tell)
    try:
        return work.run()
    except StoreError:
        raise
    except BaseException:
        work.give_back()
        raise
    finally:
        work.close()


class _Adapters:
    """One driver's part in the queue. remaining: keys it waits for. settled: keys done, or not for this run."""

    def __init__(
        self,
        store: Store,
        plan: Plan,
        concept_ids: Sequence[str],
        bar: Bar,
        stop: Stop,
        on_done: Callable[[str], None],
        train: Train,
        tell: Tell,
    ) -> None:
        import ray

        self._store, self._plan, self._bar, self._stop, self._on_done = store, plan, bar, stop, on_done
        self._tell = tell
        self._resources = plan.config.cluster.adapters
        options = {**worker_options(self._resources), "max_retries": 0, "max_calls": ADAPTERS_A_PROCESS}
        self._remote = ray.remote(**options)(_train)
        self._given = ray.put((train, store, plan))
        self._queue, self._owner = Queue(store, "adapters", remember=REMEMBER_SECONDS), owner_name()
        self._keys = {plan.adapter_key(concept.id): concept.id for concept in plan.config.catalogue}
        self._running: dict[Any, Lease] = {}
        self._trained: list[Lease] = []  # committed, but not yet acknowledged
        self._publisher = ThreadPoolExecutor(1)
        self._publishing: list[Future[None]] = []
        self._renewed = time.monotonic()
        self._failures: dict[str, Failure] = {}
        self._remaining = {plan.adapter_key(concept_id) for concept_id in concept_ids}
        self._wanted = set(self._remaining)
        self._settled: set[str] = set()
        self._shares: dict[str, float] = {}  # of each adapter's steps that are done
        given_up = {item.key for item in self._queue.failed()}
        for key in [plan.adapter_key(concept_id) for concept_id in concept_ids]:
            if key in given_up:
                with suppress(NotFoundError):  # another driver was faster
                    self._queue.retry(key)
            else:
                self._queue.enqueue(key, {"concept": self._keys[key]})

    def run(self) -> dict[str, Failure]:
        with followed(self._show, self._stop) as line:
            while True:
                if self._stop.over or (self._stop.asked and not self._running):
                    self._finish()
                    self._published(all=True)
                    self._stop.check()
                most = 0 if self._stop.asked else slots(self._resources, self._plan.config.cluster.autoscaling)
                room = most - len(self._running)
                if room > 0:
                    self._take_up()
                    if not self._remaining:
                        self._published(all=True)
                        return self._failures
                    self._lease(room, line)
                self._finish()  # once the slots are taken again
                self._published()
                self._collect()
                self._renew()
                if not self._running and not self._trained:
                    self._wait()

    def close(self) -> None:
        """Let what is being published end; what is committed and not published yet, the next run publishes."""
        self._publisher.shutdown(cancel_futures=True)

    def give_back(self) -> None:
        """Release what is still held: the run was interrupted."""
        import ray

        for result in self._running:
            ray.cancel(result, force=True)
        for lease in self._queue.leased():  # one may have been taken when the interruption came
            if lease.hold.owner == self._owner:
                with suppress(LeaseLostError):
                    self._queue.release(lease)

    def _take_up(self) -> None:
        """Adapters that were added to the queue meanwhile and can be trained now."""
        waiting = self._queue.waiting() - self._remaining - self._settled
        added = {
            key
            for key in waiting & self._keys.keys()
            if find(self._store, self._plan.quality(self._keys[key]).path)
            and quarantined(self._store, self._plan, self._keys[key]) is None
        }
        self._remaining |= added
        self._wanted |= added
        self._settled |= waiting - added

    def _lease(self, room: int, line: Callable[[str], Line]) -> None:
        seconds = self._plan.config.adapters.lease_seconds
        while room and (lease := self._queue.lease(self._owner, seconds, among=self._remaining)):
            concept_id = self._keys[lease.item.key]
            if find(self._store, self._plan.adapter(concept_id).path):  # enqueued just after another driver made it
                self._trained.append(lease)
                self._tell("done", concept=concept_id, text="made by another run")
                continue
            self._tell("started", concept=concept_id, attempt=lease.item.attempts + 1)
            self._running[self._remote.remote(self._given, concept_id, line(concept_id))] = lease
            room -= 1

    def _collect(self) -> None:
        """What has ended since: done, failed, or stopped."""
        import ray

        config = self._plan.config.adapters
        for result in ended(self._running, POLL_SECONDS if self._running else 0):
            lease = self._running[result]
            which = {"concept": self._keys[lease.item.key], "attempt": lease.item.attempts + 1}
            try:
                spent: Spent | None = ray.get(result)
            except Exception as error:  # one concept's failure, whatever it is, must not stop the others
                failure = failure_of(error)
                # A user's mistake stays one however often it is tried; a machine that was taken back is nobody's.
                attempts = config.max_attempts + (WORKER_RETRIES if failure.lost else 0) if failure.traceback else 1
                told = {"error": failure.message, "traceback": failure.traceback}
                with suppress(LeaseLostError):  # whoever took it from us while we were silent tries again
                    if self._queue.fail(lease, failure.traceback or failure.message, attempts):
                        self._failures[self._keys[lease.item.key]] = failure
                        self._remaining.discard(lease.item.key)
                        self._tell("failed", **which, **told)
                    else:
                        self._tell("retried", **which, **told)
            else:
                if spent is None:
                    self._tell("stopped", **which)
                    with suppress(LeaseLostError):
                        self._queue.release(lease)
                else:
                    self._tell("done", **which, **spent.facts)
                    self._trained.append(lease)
            del self._running[result]

    def _finish(self) -> None:
        """Acknowledge what has been trained since, and have it published."""
        while self._trained:
            lease = self._trained[0]
            key, concept_id = lease.item.key, self._keys[lease.item.key]
            with suppress(LeaseLostError):  # taken from us while we were silent: the adapter is there all the same
                self._queue.ack(lease)
            self._remaining.discard(key)
            self._settle(key, concept_id)
            del self._trained[0]

    def _settle(self, key: str, concept_id: str) -> None:
        self._settled.add(key)
        self._failures.pop(concept_id, None)  # retried by hand after it had been given up
        self._publishing.append(self._publisher.submit(self._on_done, concept_id))

    def _published(self, *, all: bool = False) -> None:
        """Raise what publishing has raised; with `all`, once nothing is left to publish."""
        for future in [future for future in self._publishing if all or future.done()]:
            future.result()
            self._publishing.remove(future)

    def _renew(self) -> None:
        if time.monotonic() - self._renewed > self._plan.config.adapters.lease_seconds / 3:
            for lease in self._running.values():
                with suppress(LeaseLostError):
                    self._queue.renew(lease)
            self._renewed = time.monotonic()

    def _wait(self) -> None:
        """What is left is leased by another driver: wait for it to finish or to fall silent."""
        waiting = self._queue.waiting()
        for key in self._remaining - waiting:
            concept_id = self._keys[key]
            if find(self._store, self._plan.adapter(concept_id).path):
                self._tell("done", concept=concept_id, text="made by another run")
                self._settle(key, concept_id)
            else:
                given_up = Failure("another run gave it up or dropped it: `farm status` says why")
                self._failures[concept_id] = given_up
                self._tell("failed", concept=concept_id, error=given_up.message)
        self._remaining &= waiting
        if self._remaining and self._queue.paused():
            self._published(all=True)
            raise PausedError(self._failures, len(self._remaining))
        time.sleep(POLL_SECONDS if self._remaining else 0)

    def _show(self, told: dict[str, tuple[int, int, str]]) -> None:
        self._shares.update({concept_id: done / steps for concept_id, (done, steps, _) in told.items()})
        under_way = [self._keys[lease.item.key] for lease in list(self._running.values())]
        share = sum(self._shares.get(concept_id, 0) for concept_id in under_way) / max(1, len(under_way))
        shown = ", ".join(under_way[:4]) + (f" and {len(under_way) - 4} more" if len(under_way) > 4 else "")
        self._bar.update(len(self._wanted) - len(self._remaining), len(self._wanted), f"{shown} ({share:.0%})")


def _train(given: tuple[Train, Store, Plan], concept_id: str, line: Line) -> Spent | None:
    """What it took; None where it was stopped before it was done."""
    train, store, plan = given
    try:
        return train(store, plan, concept_id, line)
    except Stopped:
        return None
