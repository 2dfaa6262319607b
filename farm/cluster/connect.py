"""Connecting to Ray, and what its nodes can take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from farm.config import ClusterConfig, Resources
from farm.errors import UserError


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


def slots(resources: Resources) -> int:
    """How many workers of this size the cluster takes at once."""
    import ray

    whole = ray.cluster_resources()  # type: ignore[no-untyped-call]
    by_cpu = int(whole.get("CPU", 0) // resources.cpus)
    return max(1, min(by_cpu, int(whole.get("GPU", 0) / resources.gpus)) if resources.gpus else by_cpu)
