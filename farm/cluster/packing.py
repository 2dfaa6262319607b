"""Packs as Ray tasks, one each. A pack that is in the store already is found there."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from farm.artifacts import Manifest
from farm.cluster.placement import slots, worker_options
from farm.cluster.watch import POLL_SECONDS, WORKER_RETRIES, Failure, ended, failure_of
from farm.config import ClusterConfig
from farm.packs import Pack
from farm.progress import Bar
from farm.signing import NOBODY, Keys
from farm.stop import Stop
from farm.store import Store


def export_packs(
    store: Store, packs: Sequence[Pack], config: ClusterConfig, bar: Bar, stop: Stop, keys: Keys = NOBODY
) -> tuple[dict[Pack, Manifest], dict[Pack, Failure]]:
    """Build packs on workers of the size of those that train adapters, less their GPUs; one failure stops no other.

    Raises:
        StoppedError: asked to stop; packs under way have been finished, or had no time to.
    """
    import ray

    worker = config.adapters.model_copy(update={"gpus": 0})
    remote = ray.remote(**{**worker_options(worker), "max_retries": WORKER_RETRIES, "max_calls": 1})(_export)
    waiting, running = deque(packs), dict[Any, Pack]()
    done: dict[Pack, Manifest] = {}
    failed: dict[Pack, Failure] = {}
    try:
        while waiting or running:
            if stop.over or (stop.asked and not running):
                stop.check()
            room = 0 if stop.asked else slots(worker, config.autoscaling) - len(running)
            while waiting and room > 0:
                pack = waiting.popleft()
                running[remote.remote(store, pack, int(worker.cpus) or 1, keys)] = pack
                room -= 1
            bar.update(len(done) + len(failed), len(packs))
            for result in ended(running, POLL_SECONDS):
                pack = running.pop(result)
                try:
                    done[pack] = ray.get(result)
                except Exception as error:  # one pack's failure, whatever it is, must not stop the others
                    failed[pack] = failure_of(error)
    finally:
        for result in running:
            ray.cancel(result, force=True)
    bar.update(len(packs), len(packs))
    return done, failed


def _export(store: Store, pack: Pack, threads: int, keys: Keys) -> Manifest:
    import torch

    from farm.stages.export import export

    torch.set_num_threads(threads)
    return export(store, pack, keys=keys)
