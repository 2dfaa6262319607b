"""The base on Ray Train and the rank search on Ray Tune, both resumed where they were killed."""

from __future__ import annotations

import time
from typing import Any

from farm.artifacts import find
from farm.cluster.placement import bundle
from farm.cluster.scratch import scratch
from farm.cluster.watch import WORKER_RETRIES, causes, followed, in_thread, user_error
from farm.errors import StoreError
from farm.plan import Plan
from farm.progress import Bar
from farm.stages import pretrain, ranks
from farm.standing import usable
from farm.stop import Stop, StoppedError
from farm.store import Store


def pretrain_base(store: Store, plan: Plan, bar: Bar, stop: Stop, board: str | None = None) -> None:
    """Train the base on Ray Train; a run that was killed goes on at its last checkpoint. board: see `pretrain`.

    Raises:
        UserError: a mistake of the user's that a worker found; a StoreError when Ray Train could not write.
        StoppedError: asked to stop, the workers have left a checkpoint, or had no time for one.
    """
    from ray.exceptions import RayActorError

    name = f"base-{plan.base.digest}"
    with followed(lambda told: bar.update(*told["base"]), stop) as line:
        progress = line("base")
        settings = {"store": store, "plan": plan, "on_progress": progress, "should_stop": progress.should_stop}
        settings["board"] = board
        for retries_left in reversed(range(WORKER_RETRIES + 1)):
            try:
                in_thread(_trainer(plan, settings, name).fit, stop)
                break
            except Exception as error:
                told = meaning(error, store)
                # What Ray Train does not mend: the actor that oversees the workers has died, or could not write.
                if not isinstance(told, RayActorError | StoreError) or not retries_left:
                    raise told from error
    if find(store, plan.base.path) is None:
        raise StoppedError
    _clear(store, name)


def _trainer(plan: Plan, settings: dict[str, Any], name: str) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    base, resources = plan.config.base, plan.config.cluster.base
    system, folder = scratch(settings["store"])
    scaling: dict[str, Any] = {
        "num_workers": base.workers if base.min_workers in (None, base.workers) else (base.min_workers, base.workers),
        "use_gpu": resources.gpus > 0,
        "resources_per_worker": bundle(resources),
        "label_selector": resources.labels,
    }
    return TorchTrainer(
        pretrain.train_base_worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(**scaling),
        run_config=RunConfig(
            name=name,
            storage_path=folder,
            storage_filesystem=system,
            failure_config=FailureConfig(max_failures=WORKER_RETRIES),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )


def search_ranks(store: Store, plan: Plan, bar: Bar, stop: Stop) -> None:
    """Run the rank search on Ray Tune, one trial a concept, and commit the merged ranks.

    Raises:
        UserError: a mistake of the user's that a trial found; a StoreError when Ray Tune could not write.
        StoppedError: asked to stop, and the rounds under way did not end in time; they are done again.
    """
    from ray import tune

    from e2gan.ranks import RankRound

    started = time.monotonic()
    resources = plan.config.cluster.ranks
    concepts = usable(store, plan, plan.config.ranks.concepts)
    system, folder = scratch(store)
    name = f"ranks-{plan.ranks.digest}"

    def show(told: dict[str, tuple[int, int, str]]) -> None:
        done, total = (sum(values) for values in zip(*[(d, t) for d, t, _ in told.values()], strict=True))
        bar.update(done, total, "steps of the rounds under way")

    with followed(show, stop) as line:
        progress = {concept: line(concept) for concept in concepts}

        def trial(config: dict[str, Any]) -> None:
            shared = {"store": store, "plan": plan, "on_progress": progress[config["concept"]]}
            ranks.search_trial({**config, **shared})

        place = tune.PlacementGroupFactory([bundle(resources)], bundle_label_selector=[resources.labels])
        trainable = tune.with_resources(trial, place)
        if tune.Tuner.can_restore(f"{folder}/{name}", storage_filesystem=system):
            tuner = tune.Tuner.restore(
                f"{folder}/{name}",
                trainable,
                resume_unfinished=True,
                resume_errored=True,
                storage_filesystem=system,
            )
        else:
            tuner = tune.Tuner(
                trainable,
                param_space={"concept": tune.grid_search(concepts)},
                tune_config=tune.TuneConfig(max_concurrent_trials=resources.workers),
                run_config=tune.RunConfig(
                    name=name,
                    storage_path=folder,
                    storage_filesystem=system,
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=WORKER_RETRIES),
                ),
            )
        results: Any = in_thread(tuner.fit, stop)
    for error in results.errors:
        raise meaning(error, store) from error
    searched = {result.config["concept"]: [RankRound(**r) for r in result.metrics["rounds"]] for result in results}
    ranks.commit_ranks(store, plan, searched, wall_seconds=time.monotonic() - started)
    _clear(store, name)


def meaning(error: Exception, store: Store) -> Exception:
    """What to raise of an error that Ray Train or Ray Tune raised: itself, unless a user can do something about it."""
    if mistake := user_error(error):
        return mistake
    for cause in causes(error):
        if isinstance(cause, OSError) and "AWS Error" in str(cause):  # pyarrow's
            reason = str(cause).partition("AWS Error ")[2].partition(";")[0]
            return StoreError(f"The store {store.url} did not take Ray's checkpoints ({reason}): run again to go on.")
    return error


def _clear(store: Store, name: str) -> None:
    """Remove the checkpoints of a run that is over."""
    system, folder = scratch(store)
    system.delete_dir(f"{folder}/{name}")
