"""Ray tasks: the adapters, from the queue."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from farm.artifacts import find
from farm.cluster.connect import slots
from farm.cluster.watch import POLL_SECONDS, Failure, failure_of, followed
from farm.plan import Plan
from farm.progress import Bar
from farm.queue import Lease, LeaseLostError, Queue, owner_name
from farm.stages import adapt
from farm.standing import quarantined
from farm.store import NotFoundError, Store

REMEMBER_SECONDS = 60  # a priority changed by dropping and adding an item anew is seen this late
PAUSED = Failure("the queue of adapters is paused; `farm queue resume` and then the same command go on")


def train_adapters(
    store: Store, plan: Plan, concept_ids: Sequence[str], bar: Bar, on_done: Callable[[str], None]
) -> dict[str, Failure]:
    """Put adapters on the queue and work it until none of them is left, nor of the plan's others added meanwhile.

    This driver holds the leases, so that a worker that dies counts as an attempt; another driver may work the same
    queue. `on_done(concept)` is called here after each adapter is committed. When the queue is paused, what runs is
    finished and what waits stays pending: those concepts come back as failures that say so.
    """
    import ray

    config = plan.config.adapters
    resources = plan.config.cluster.adapters
    remote = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=0)(_adapt)
    shared = ray.put(plan)
    queue, owner = Queue(store, "adapters", remember=REMEMBER_SECONDS), owner_name()
    keys = {plan.adapter_key(concept.id): concept.id for concept in plan.config.catalogue}
    given_up = {item.key for item in queue.failed()}
    for key in (asked := [plan.adapter_key(concept_id) for concept_id in concept_ids]):
        if key in given_up:
            with suppress(NotFoundError):  # another driver was faster
                queue.retry(key)
        else:
            queue.enqueue(key, {"concept": keys[key]})
    failures: dict[str, Failure] = {}
    most = slots(resources)
    running: dict[Any, Lease] = {}
    renewed = time.monotonic()
    remaining = set(asked)
    wanted = set(asked)
    settled: set[str] = set()  # done, or not for this run
    shares: dict[str, float] = {}

    def show(told: dict[str, tuple[int, int, str]]) -> None:
        shares.update({key: done / steps for key, (done, steps, _) in told.items()})
        under_way = [lease.item.payload["concept"] for lease in list(running.values())]
        share = sum(shares.get(concept_id, 0) for concept_id in under_way)
        bar.update(
            len(wanted) - len(remaining), len(wanted), f"{', '.join(under_way)} ({share / max(1, len(under_way)):.0%})"
        )

    def finish(lease: Lease) -> None:
        with suppress(LeaseLostError):  # taken from us while we were silent: the adapter is there all the same
            queue.ack(lease)
        remaining.discard(lease.item.key)
        settled.add(lease.item.key)
        failures.pop(keys[lease.item.key], None)  # retried by hand after it had been given up
        on_done(keys[lease.item.key])

    with followed(show) as tell:
        while True:
            if len(running) < most:
                added, unready = _added(store, plan, keys, queue.waiting() - remaining - settled)
                remaining |= added
                settled |= unready
                wanted |= added
            if not remaining:
                return failures
            while len(running) < most and (lease := queue.lease(owner, config.lease_seconds, among=remaining)):
                concept_id = keys[lease.item.key]
                if find(store, plan.adapter(concept_id).path):  # enqueued just after another driver was done with it
                    finish(lease)
                    continue
                running[remote.remote(store, shared, concept_id, tell(concept_id))] = lease
            for done in ray.wait(list(running), timeout=POLL_SECONDS)[0] if running else ():
                lease = running.pop(done)
                concept_id = keys[lease.item.key]
                try:
                    ray.get(done)
                except Exception as error:  # one concept's failure, whatever it is, must not stop the others
                    failure = failure_of(error)
                    # A user's mistake stays one however often it is tried.
                    attempts = 1 if failure.traceback is None else config.max_attempts
                    with suppress(LeaseLostError):  # whoever took it from us while we were silent tries again
                        if queue.fail(lease, failure.traceback or failure.message, attempts):
                            failures[concept_id] = failure
                            remaining.discard(lease.item.key)
                else:
                    finish(lease)
            if time.monotonic() - renewed > config.lease_seconds / 3:
                for lease in running.values():
                    with suppress(LeaseLostError):
                        queue.renew(lease)
                renewed = time.monotonic()
            if not running:
                # What is left is leased by another driver: wait for it to finish or to fall silent.
                waiting = queue.waiting()
                for key in remaining - waiting:
                    if find(store, plan.adapter(keys[key]).path):
                        settled.add(key)
                        failures.pop(keys[key], None)
                        on_done(keys[key])
                    else:
                        failures[keys[key]] = Failure("another run gave it up or dropped it: `farm status` says why")
                remaining &= waiting
                if queue.paused():
                    return failures | dict.fromkeys((keys[key] for key in remaining), PAUSED)
                time.sleep(POLL_SECONDS if remaining else 0)


def _added(store: Store, plan: Plan, keys: Mapping[str, str], waiting: set[str]) -> tuple[set[str], set[str]]:
    """Of the keys that wait in the queue: the plan's that can be trained now, and all others."""
    added = {
        key
        for key in waiting & keys.keys()
        if find(store, plan.quality(keys[key]).path) and quarantined(store, plan, keys[key]) is None
    }
    return added, waiting - added


def _adapt(store: Store, plan: Plan, concept_id: str, on_progress: Callable[[Any], None]) -> None:
    import torch

    torch.set_num_threads(plan.config.cluster.adapters.cpus)
    device = "cuda" if plan.config.cluster.adapters.gpus and torch.cuda.is_available() else "cpu"
    adapt.adapt(store, plan, concept_id, device=device, on_progress=on_progress)
