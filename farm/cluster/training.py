"""The base on Ray Train and the rank search on Ray Tune, both resumed where they were killed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from farm.cluster.watch import WORKER_RETRIES, followed, in_thread, user_error
from farm.plan import Plan
from farm.progress import Bar
from farm.stages import pretrain, ranks
from farm.standing import usable
from farm.store import LocalStore, Store


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
    with followed(lambda told: bar.update(*told["base"])) as tell:
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
            in_thread(trainer.fit)
        except Exception as error:
            if mistake := user_error(error):
                raise mistake from error
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
    concepts = usable(store, plan, plan.config.ranks.concepts)
    scratch = _scratch(store)
    name = f"ranks-{plan.ranks.digest}"

    def show(told: dict[str, tuple[int, int, str]]) -> None:
        done, total = (sum(values) for values in zip(*[(d, t) for d, t, _ in told.values()], strict=True))
        bar.update(done, total, "steps of the rounds under way")

    with followed(show) as tell:
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
                param_space={"concept": tune.grid_search(concepts)},
                run_config=tune.RunConfig(
                    name=name,
                    storage_path=str(scratch),
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=WORKER_RETRIES),
                ),
            )
        results: Any = in_thread(tuner.fit)
    for error in results.errors:
        raise user_error(error) or error
    searched = {result.config["concept"]: [RankRound(**r) for r in result.metrics["rounds"]] for result in results}
    ranks.commit_ranks(store, plan, searched, wall_seconds=time.monotonic() - started)
    _clear(scratch / name)


def _scratch(store: Store) -> Path:
    """Where Ray Train and Ray Tune keep the checkpoints of runs under way."""
    assert isinstance(store, LocalStore), "only LocalStore is built so far"
    return store.path("scratch")


def _clear(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
