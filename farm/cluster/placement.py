"""What the nodes of a Ray cluster can take, those that are there and those that its autoscaler may bring."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from farm.config import BaseConfig, ClusterConfig, Resources
from farm.errors import UserError

STAGES = ("edit", "base", "ranks", "adapters")


@dataclass(frozen=True)
class Node:
    """A node's resources, by Ray's names for them (`memory` in bytes), and its labels."""

    resources: Mapping[str, float]
    labels: Mapping[str, str]

    def takes(self, worker: Resources) -> int:
        """How many workers of this size the whole node has room for; 0 when they may not run on it."""
        if not self.may_run(worker):
            return 0
        wanted = {name: amount for name, amount in bundle(worker).items() if amount}
        return min(int(self.resources.get(name, 0) / amount + 1e-6) for name, amount in wanted.items())

    def may_run(self, worker: Resources) -> bool:
        """Whether the labels are as the worker wants them."""
        return all(_meets(self.labels.get(name), wanted) for name, wanted in worker.labels.items())


def _meets(label: str | None, wanted: str) -> bool:
    """As Ray decides it: a label that is not there is not any value."""
    values = wanted.removeprefix("!").removeprefix("in(").removesuffix(")").split(",")
    return (label in values) is not wanted.startswith("!")


def bundle(worker: Resources) -> dict[str, float]:
    """A worker's resources by Ray's names: a bundle of a placement group."""
    memory = {} if worker.memory_gb is None else {"memory": worker.memory_gb * 1e9}
    return {"CPU": worker.cpus, "GPU": worker.gpus, **memory}


def worker_options(worker: Resources) -> dict[str, Any]:
    """What `ray.remote` is told of a worker: its CPUs, GPUs and memory, and the nodes that it may run on."""
    memory = {} if worker.memory_gb is None else {"memory": worker.memory_gb * 1e9}
    return {"num_cpus": worker.cpus, "num_gpus": worker.gpus, **memory, "label_selector": worker.labels}


class _NodeType(BaseModel):
    model_config = ConfigDict(frozen=True)

    resources: dict[str, float] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)
    max_workers: int | None = None


class Launcher(BaseModel):
    """What the file of Ray's cluster launcher says of the nodes that the autoscaler may bring. Unset keys are as Ray
    takes them: a type may have all of `max_workers`, the head's type none."""

    model_config = ConfigDict(frozen=True)

    available_node_types: dict[str, _NodeType]
    head_node_type: str | None = None
    max_workers: int = 2

    @property
    def most(self) -> list[tuple[Node, int]]:
        """The types of workers, and how many nodes of each there may be at most."""
        limits = {name: 0 if name == self.head_node_type else self.max_workers for name in self.available_node_types}
        return [
            (Node(kind.resources, kind.labels), limits[name] if kind.max_workers is None else kind.max_workers)
            for name, kind in self.available_node_types.items()
        ]

    def room(self, worker: Resources) -> int:
        """How many workers of this size there is room for when every node has come that may."""
        room, left = 0, self.max_workers
        for node, most in sorted(self.most, key=lambda pair: -pair[0].takes(worker)):
            room += min(left, most) * node.takes(worker)
            left -= min(left, most)
        return room


@lru_cache
def launcher(path: str) -> Launcher:
    """Read `cluster.autoscaling`.

    Raises:
        UserError: it cannot be read, or does not describe the types of nodes.
    """
    try:
        return Launcher.model_validate(yaml.safe_load(Path(path).expanduser().read_bytes()))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise UserError(
            f"cluster.autoscaling: {path} cannot be read as a file for Ray's cluster launcher "
            f"({str(error).splitlines()[0]}); see cluster.yaml, or leave the key out where nothing adds nodes."
        ) from error


def alive() -> list[Node]:
    """The nodes that are there now."""
    import ray

    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return [Node(node["Resources"], node["Labels"]) for node in nodes if node["Alive"]]


@lru_cache(maxsize=1)
def _alive_at(second: int) -> list[Node]:
    """`alive`, asked once a second: `slots` is called far more often."""
    return alive()


def slots(worker: Resources, autoscaling: str | None = None) -> int:
    """How many workers of this size to keep busy now: as many as the nodes have room for, or `worker.workers`.

    At least one, which an autoscaler, or a node that comes back, sees waiting.

    autoscaling: `cluster.autoscaling`; what it may bring is counted whether it is there yet or not.
    """
    nodes = _alive_at(int(time.monotonic()))
    return packed(worker, nodes, launcher(autoscaling) if autoscaling else None)


def packed(worker: Resources, nodes: Iterable[Node], coming: Launcher | None = None) -> int:
    """`slots` on these nodes."""
    room = max(sum(node.takes(worker) for node in nodes), coming.room(worker) if coming else 0, 1)
    return room if worker.workers is None else min(room, worker.workers)


def preflight(config: ClusterConfig, base: BaseConfig | None = None) -> None:
    """Refuse at once what Ray would wait for without end: a worker that no node can take, now or when it has come.

    base: when given, its workers must fit on the nodes all at once.

    Raises:
        UserError: names the key, what is wanted and what there is.
    """
    _alive_at.cache_clear()  # it may be another cluster's
    coming = launcher(config.autoscaling) if config.autoscaling else None
    check(config, alive(), coming, base)


def check(config: ClusterConfig, nodes: Sequence[Node], coming: Launcher | None, base: BaseConfig | None) -> None:
    """`preflight` on these nodes."""
    possible = [*nodes, *(node for node, most in coming.most if most)] if coming else nodes
    for stage in STAGES:
        worker: Resources = getattr(config, stage)
        if not any(node.takes(worker) for node in possible):
            raise _too_large(f"cluster.{stage}", worker, possible)
    if base is not None:
        fewest = base.min_workers or base.workers
        room = max(sum(node.takes(config.base) for node in nodes), coming.room(config.base) if coming else 0)
        if fewest > room:
            key = "base.min_workers" if base.min_workers else "base.workers"
            raise UserError(
                f"{key}: {fewest} workers of {describe(config.base)} start together and the nodes take {room} of them; "
                f"set {key} to at most {room} or add nodes."
            )


def _too_large(key: str, worker: Resources, nodes: Sequence[Node]) -> UserError:
    """Why none of the nodes takes the worker: their labels, one of the resources, or no node has all of them."""
    labels = _listed(worker.labels.items())
    allowed = [node for node in nodes if node.may_run(worker)]
    if labels and not allowed:
        there = {(name, value) for node in nodes for name, value in node.labels.items() if name in worker.labels}
        return UserError(
            f"{key}.labels: a worker wants a node with {labels} and there are {_listed(there) or 'no such labels'}; "
            "correct it or start a node with `ray start --labels`."
        )
    largest = f"the largest node with {labels}" if labels else "the largest node"
    for field, name in (("cpus", "CPU"), ("gpus", "GPU"), ("memory_gb", "memory")):
        amount = bundle(worker).get(name, 0)
        most = max((node.resources.get(name, 0) for node in allowed), default=0)
        if amount > most:
            number = f"{int(most / 1e8) / 10:g}" if name == "memory" else f"{most:g}"
            lower = f"set {key}.{field} to at most {number} or " if most or name == "GPU" else ""
            return UserError(
                f"{key}.{field}: a worker wants {_amount(name, amount)} and {largest} has {number}; "
                f"{lower}add larger nodes."
            )
    return UserError(f"{key}: a worker wants {describe(worker)} and no one node has it all; add larger nodes.")


def _listed(labels: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(labels))


def _amount(name: str, amount: float) -> str:
    return f"{amount / 1e9:g} GB of memory" if name == "memory" else f"{amount:g} {name}{'s' * (amount > 1)}"


def describe(worker: Resources) -> str:
    """4 CPUs, 0.5 GPU, 16 GB of memory."""
    return ", ".join(_amount(name, amount) for name, amount in bundle(worker).items() if amount)
