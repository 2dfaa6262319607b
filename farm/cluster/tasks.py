"""Ray tasks: the adapters, from the queue."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from farm.artifacts import find
from farm.cluster.connect import slots
from farm.cluster.watch import POLL_SECONDS, Failure, failure_of, followed
from farm.plan import Plan
from farm.progress import Bar
from farm.queue import Lease, LeaseLostError, Queue, owner_name
from farm.stages import adapt
from farm.store import Store


def train_adapters(
    store: Store, plan: Plan, concept_ids: Sequence[str], bar: Bar, on_done: Callable[[str], None]
) -> dict[str, Failure]:
    """Put adapters on the queue and work it until none of them is left.

    This driver holds the leases, so that a worker that dies counts as an attempt; another driver may work the same
    queue. `on_done(concept)` is called here after each adapter is committed.
    """
    import ray

    config = plan.config.adapters
    resources = plan.config.cluster.adapters
    remote = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=0)(_adapt)
    shared = ray.put(plan)
    queue, owner = Queue(store, "adapters"), owner_name()
    keys = {plan.adapter_key(concept_id): concept_id for concept_id in concept_ids}
    given_up = {item.key for item in queue.failed()}
    for key, concept_id in keys.items():
        if key in given_up:
            queue.retry(key)
        else:
            queue.enqueue(key, {"concept": concept_id})
    failures: dict[str, Failure] = {}
    most = slots(resources)
    running: dict[Any, Lease] = {}
    renewed = time.monotonic()
    total = len(keys)
    shares: dict[str, float] = {}

    def show(told: dict[str, tuple[int, int, str]]) -> None:
        shares.update({key: done / steps for key, (done, steps, _) in told.items()})
        under_way = [lease.item.payload["concept"] for lease in list(running.values())]
        share = sum(shares.get(concept_id, 0) for concept_id in under_way)
        bar.update(total - len(remaining), total, f"{', '.join(under_way)} ({share / max(1, len(under_way)):.0%})")

    with followed(show) as tell:
        remaining = set(keys)
        while remaining:
            while len(running) < most and (lease := queue.lease(owner, config.lease_seconds, among=remaining)):
                concept_id = keys[lease.item.key]
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
                    if queue.fail(lease, failure.traceback or failure.message, attempts):
                        failures[concept_id] = failure
                        remaining.discard(lease.item.key)
                else:
                    # Taken from us while we were silent: the adapter is there all the same.
                    with suppress(LeaseLostError):
                        queue.ack(lease)
                    remaining.discard(lease.item.key)
                    on_done(concept_id)
            if time.monotonic() - renewed > config.lease_seconds / 3:
                for lease in running.values():
                    with suppress(LeaseLostError):
                        queue.renew(lease)
                renewed = time.monotonic()
            if not running:
                # What is left is leased by another driver: wait for it to finish or to fall silent.
                waiting = {item.key for item in queue.pending()}
                for concept_id in [keys[key] for key in remaining - waiting]:
                    if find(store, plan.adapter(concept_id).path):
                        on_done(concept_id)
                    else:
                        failures[concept_id] = Failure("another run gave it up: `farm status` says why")
                remaining &= waiting
                time.sleep(POLL_SECONDS if remaining else 0)
    return failures


def _adapt(store: Store, plan: Plan, concept_id: str, on_progress: Callable[[Any], None]) -> None:
    import torch

    torch.set_num_threads(plan.config.cluster.adapters.cpus)
    device = "cuda" if plan.config.cluster.adapters.gpus and torch.cuda.is_available() else "cpu"
    adapt.adapt(store, plan, concept_id, device=device, on_progress=on_progress)
