"""Ray: the one place that starts it, fans work out over it and follows what the workers do.

Images never go through Ray's object store: a task reads and writes the farm's store itself and returns a number.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2gan.train import DivergedError
from farm.config import ClusterConfig, Resources
from farm.errors import UserError
from farm.plan import Plan
from farm.progress import Bar
from farm.queue import Lease, LeaseLostError, Queue, owner_name
from farm.stages import adapt, edit, pretrain, ranks
from farm.store import LocalStore, Store

POLL_SECONDS = 0.5
WORKER_RETRIES = 3  # of a task whose worker died; a task that raised is not repeated


@contextmanager
def connected(config: ClusterConfig) -> Iterator[None]:
    """Connect to the configured Ray cluster, or start one on this machine for as long as the block lasts.

    Raises:
        UserError: the cluster does not answer, or cannot ever place what the stages ask for.
    """
    import ray

    if ray.is_initialized():
        preflight(config)
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray reads this when it is first imported: on one machine its own ports then listen on loopback alone.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints a table even at verbose=0
    # Ray 2.60 warns at every start that it will stop hiding GPUs from workers that asked for none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = config.address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            ray.init(address="local", num_cpus=config.cpus or os.cpu_count(), include_dashboard=False, **quiet)
    except ConnectionError as error:
        raise UserError(
            f"cluster.address: no Ray cluster answers at {address}; start one with `ray start --head`."
        ) from error
    with suppress(FileNotFoundError):  # Ray writes its token readable by everyone
        (Path.home() / ".ray" / "auth_token").chmod(0o600)
    try:
        preflight(config)
        yield
    finally:
        ray.shutdown()


def preflight(config: ClusterConfig) -> None:
    """Refuse at once what Ray would wait for without end: a worker larger than every node.

    Raises:
        UserError: names the key, what is wanted and what there is.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    for stage in ("edit", "base", "ranks", "adapters"):
        wanted: Resources = getattr(config, stage)
        for key, ray_name, amount in (("cpus", "CPU", wanted.cpus), ("gpus", "GPU", wanted.gpus)):
            most = max((node.get(ray_name, 0) for node in nodes), default=0)
            if amount > most:
                raise UserError(
                    f"cluster.{stage}.{key}: a worker wants {amount:g} {ray_name}s and the largest node has {most:g}; "
                    f"set cluster.{stage}.{key} to at most {most:g} or add larger nodes."
                )


@dataclass(frozen=True)
class Failure:
    """Why a concept failed: a user's mistake in one sentence, or a bug with its traceback."""

    message: str
    traceback: str | None = None


def edit_concepts(store: Store, plan: Plan, concept_ids: Sequence[str], bar: Bar) -> dict[str, Failure]:
    """Have the teachers edit every part of every concept that is not in the store, and commit complete concepts.

    A unit of work is one part of one concept. A concept with a failed unit is given up, the others go on.
    """
    import ray

    resources = plan.config.cluster.edit
    remote = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=WORKER_RETRIES)(edit.edit_part)
    shared = ray.put(plan)
    started = time.monotonic()
    missing = {concept_id: set(edit.missing_parts(store, plan, concept_id)) for concept_id in concept_ids}
    seconds = dict.fromkeys(concept_ids, 0.0)
    failures: dict[str, Failure] = {}
    total = len(concept_ids) * edit.part_count(store, plan)

    def commit(concept_id: str) -> None:
        wall = time.monotonic() - started
        edit.commit_edits(store, plan, concept_id, wall_seconds=wall, device_seconds=seconds[concept_id])

    def show(note: str) -> None:
        bar.update(total - sum(map(len, missing.values())), total, note)

    for concept_id in [concept_id for concept_id, parts in missing.items() if not parts]:
        commit(concept_id)
    units = iter([(concept_id, part) for concept_id, parts in missing.items() for part in sorted(parts)])
    running: dict[Any, tuple[str, int]] = {}
    limit = 2 * _slots(resources)
    show("")
    while True:
        for concept_id, part in units:
            if concept_id not in failures:
                running[remote.remote(store, shared, concept_id, part)] = (concept_id, part)
                if len(running) >= limit:
                    break
        if not running:
            return failures
        for done in ray.wait(list(running), timeout=POLL_SECONDS)[0]:
            concept_id, part = running.pop(done)
            try:
                seconds[concept_id] += ray.get(done)
            except Exception as error:  # one concept's failure, whatever it is, must not stop the others
                failures.setdefault(concept_id, _failure(error))
                continue
            missing[concept_id].discard(part)
            if not missing[concept_id] and concept_id not in failures:
                commit(concept_id)
            show(concept_id)


def pretrain_base(store: Store, plan: Plan, bar: Bar) -> None:
    """Train the base on Ray Train; a run that was killed goes on at its last checkpoint.

    Raises:
        UserError: a mistake of the user's that a worker found.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources = plan.config.cluster.base
    scratch = _scratch(store)
    name = f"base-{plan.base.digest}"
    with _board(lambda told: bar.update(*told["base"])) as tell:
        trainer = TorchTrainer(
            pretrain.train_base_worker,
            train_loop_config={"store": store, "plan": plan, "on_progress": tell("base")},
            scaling_config=ScalingConfig(
                num_workers=plan.config.base.workers,
                use_gpu=resources.gpus > 0,
                resources_per_worker={"CPU": resources.cpus, "GPU": resources.gpus},
            ),
            run_config=RunConfig(
                name=name,
                storage_path=str(scratch),
                failure_config=FailureConfig(max_failures=WORKER_RETRIES),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
            ),
        )
        try:
            trainer.fit()
        except Exception as error:
            if user_error := _user_error(error):
                raise user_error from error
            raise
    _clear(scratch / name)


def search_ranks(store: Store, plan: Plan, bar: Bar) -> None:
    """Run the rank search on Ray Tune, one trial a concept, and commit the merged ranks.

    Raises:
        UserError: a mistake of the user's that a trial found.
    """
    from ray import tune

    from e2gan.ranks import RankRound

    started = time.monotonic()
    resources = plan.config.cluster.ranks
    concepts = plan.config.ranks.concepts
    scratch = _scratch(store)
    name = f"ranks-{plan.ranks.digest}"

    def show(told: dict[str, tuple[int, int, str]]) -> None:
        done, total = (sum(values) for values in zip(*[(d, t) for d, t, _ in told.values()], strict=True))
        bar.update(done, total, "steps of the rounds under way")

    with _board(show) as tell:
        progress = {concept: tell(concept) for concept in concepts}

        def trial(config: dict[str, Any]) -> None:
            shared = {"store": store, "plan": plan, "on_progress": progress[config["concept"]]}
            ranks.search_trial({**config, **shared})

        trainable = tune.with_resources(trial, {"CPU": resources.cpus, "GPU": resources.gpus})
        folder = str(scratch / name)
        if tune.Tuner.can_restore(folder):
            tuner = tune.Tuner.restore(folder, trainable, resume_unfinished=True, resume_errored=True)
        else:
            tuner = tune.Tuner(
                trainable,
                param_space={"concept": tune.grid_search(list(concepts))},
                run_config=tune.RunConfig(
                    name=name,
                    storage_path=str(scratch),
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=WORKER_RETRIES),
                ),
            )
        results: Any = tuner.fit()
    for error in results.errors:
        raise _user_error(error) or error
    searched = {result.config["concept"]: [RankRound(**r) for r in result.metrics["rounds"]] for result in results}
    ranks.commit_ranks(store, plan, searched, wall_seconds=time.monotonic() - started)
    _clear(scratch / name)


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
    slots = _slots(resources)
    running: dict[Any, Lease] = {}
    renewed = time.monotonic()
    total = len(keys)
    shares: dict[str, float] = {}

    def show(told: dict[str, tuple[int, int, str]]) -> None:
        shares.update({key: done / steps for key, (done, steps, _) in told.items()})
        under_way = [lease.item.payload["concept"] for lease in list(running.values())]
        share = sum(shares.get(concept_id, 0) for concept_id in under_way)
        bar.update(total - len(remaining), total, f"{', '.join(under_way)} ({share / max(1, len(under_way)):.0%})")

    with _board(show) as tell:
        remaining = set(keys)
        while remaining:
            while len(running) < slots and (lease := queue.lease(owner, config.lease_seconds, among=remaining)):
                concept_id = keys[lease.item.key]
                running[remote.remote(store, shared, concept_id, tell(concept_id))] = lease
            for done in ray.wait(list(running), timeout=POLL_SECONDS)[0] if running else ():
                lease = running.pop(done)
                concept_id = keys[lease.item.key]
                try:
                    ray.get(done)
                except Exception as error:  # one concept's failure, whatever it is, must not stop the others
                    failure = _failure(error)
                    # A user's mistake stays one however often it is tried.
                    attempts = 1 if failure.traceback is None else config.max_attempts
                    if queue.fail(lease, failure.traceback or failure.message, attempts):
                        failures[concept_id] = failure
                        remaining.discard(lease.item.key)
                else:
                    with suppress(
                        LeaseLostError
                    ):  # taken from us while we were silent: the adapter is there all the same
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
                for key in remaining - waiting:
                    on_done(keys[key])
                remaining &= waiting
                time.sleep(POLL_SECONDS if remaining else 0)
    return failures


def _adapt(store: Store, plan: Plan, concept_id: str, on_progress: Callable[[Any], None]) -> None:
    import torch

    torch.set_num_threads(plan.config.cluster.adapters.cpus)
    device = "cuda" if plan.config.cluster.adapters.gpus and torch.cuda.is_available() else "cpu"
    adapt.adapt(store, plan, concept_id, device=device, on_progress=on_progress)


def _slots(resources: Resources) -> int:
    """How many workers of this size the cluster takes at once."""
    import ray

    whole = ray.cluster_resources()  # type: ignore[no-untyped-call]
    by_cpu = int(whole.get("CPU", 0) // resources.cpus)
    return max(1, min(by_cpu, int(whole.get("GPU", 0) / resources.gpus)) if resources.gpus else by_cpu)


@contextmanager
def _board(
    show: Callable[[dict[str, tuple[int, int, str]]], None],
) -> Iterator[Callable[[str], Callable[[Any], None]]]:
    """A place where workers leave their progress: yields `tell(key)`, a callable for a worker; `show` runs here."""
    import ray

    class Board:
        def __init__(self) -> None:
            self.told: dict[str, tuple[int, int, str]] = {}

        def tell(self, key: str, done: int, total: int, note: str) -> None:
            self.told[key] = (done, total, note)

        def read(self) -> dict[str, tuple[int, int, str]]:
            return self.told

    board: Any = ray.remote(num_cpus=0)(Board).remote()

    def tell(key: str) -> Callable[[Any], None]:
        def progress(done: Any) -> None:
            note = ", ".join(f"{name} {value:.3f}" for name, value in done.losses.items())
            board.tell.remote(key, done.step, done.steps, note)

        return progress

    stop = threading.Event()

    def follow() -> None:
        while not stop.wait(POLL_SECONDS):
            if told := ray.get(board.read.remote()):
                show(told)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield tell
    finally:
        stop.set()
        thread.join()
        ray.kill(board)


def _scratch(store: Store) -> Path:
    """Where Ray Train and Ray Tune keep the checkpoints of runs under way."""
    assert isinstance(store, LocalStore), "only LocalStore is built so far"
    return store.path("scratch")


def _clear(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and everything it wraps, as Ray wraps what a worker raised."""
    while error is not None:
        yield error
        for inner in getattr(error, "worker_failures", {}).values():
            yield from _causes(inner)
        error = getattr(error, "cause", None) or error.__cause__


def _user_error(error: BaseException) -> UserError | None:
    from ray.exceptions import RayTaskError

    for cause in _causes(error):
        if isinstance(cause, UserError | DivergedError) and not isinstance(cause, RayTaskError):
            return UserError(str(cause))
    return None


def _failure(error: BaseException) -> Failure:
    if user_error := _user_error(error):
        return Failure(str(user_error))
    last = list(_causes(error))[-1]
    return Failure(f"{type(last).__name__}: {last}".splitlines()[0], "".join(traceback.format_exception(error)))
