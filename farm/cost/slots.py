"""How many workers of a stage there is room for, and what one of them costs."""

from __future__ import annotations

import os
from dataclasses import dataclass

from farm.cluster.placement import Node, describe, launcher, packed
from farm.config import FarmConfig, Resources
from farm.cost.prices import NodePrice, StageName
from farm.errors import UserError

ENDLESS = 1e18


@dataclass(frozen=True, kw_only=True)
class Slots:
    """count: workers at once. node: the type of node they run on. price: of one worker's second, None where nodes have
    no prices. known: where the count is from."""

    count: int
    node: str | None
    price: float | None
    known: str


def slots_of(config: FarmConfig, stage: StageName) -> Slots:
    """The stage's slots: on the nodes that have prices, else on those that an autoscaler may bring, else here.

    Raises:
        UserError: the worker fits on none of the nodes of `cost.nodes`, or not on the one that `cost.stages` names.
    """
    worker: Resources = getattr(config.cluster, stage)
    if not config.cost.nodes:
        if config.cluster.autoscaling:
            count = packed(worker, [], launcher(config.cluster.autoscaling))
            return Slots(count=count, node=None, price=None, known="cluster.autoscaling")
        there = "this machine, since cost.nodes does not say what the cluster has" if _away(config) else "this machine"
        return Slots(count=packed(worker, [_here(config, worker)]), node=None, price=None, known=there)
    named = config.cost.stages.get(stage)
    fits = {
        name: takes
        for name, node in config.cost.nodes.items()
        if named in (None, name) and (takes := _node(node).takes(worker))
    }
    if not fits:
        place = f"cost.stages.{stage}: a {named} node has no" if named else "cost.nodes: none of them has"
        raise UserError(f"{place} room for a worker of cluster.{stage}, which wants {describe(worker)}.")
    name = min(fits, key=lambda name: config.cost.nodes[name].per_hour / fits[name])
    node, takes = config.cost.nodes[name], fits[name]
    count = takes * node.count if worker.workers is None else min(takes * node.count, worker.workers)
    return Slots(count=count, node=name, price=node.per_hour / 3600 / takes, known="cost.nodes")


def kept(config: FarmConfig, seconds: float) -> float | None:
    """What all nodes cost that are kept for so long; None where they have no prices."""
    if not config.cost.nodes:
        return None
    return sum(node.per_hour * node.count for node in config.cost.nodes.values()) * seconds / 3600


def _away(config: FarmConfig) -> bool:
    return (config.cluster.address or os.environ.get("RAY_ADDRESS")) not in (None, "", "local")


def _here(config: FarmConfig, worker: Resources) -> Node:
    """This machine; whether it has GPUs is asked only where a worker wants one."""
    gpus = 0
    if worker.gpus:
        import torch

        gpus = torch.cuda.device_count()
    return Node({"CPU": config.cluster.cpus or os.cpu_count() or 1, "GPU": gpus, "memory": ENDLESS}, worker.labels)


def _node(price: NodePrice) -> Node:
    memory = ENDLESS if price.memory_gb is None else price.memory_gb * 1e9
    return Node({"CPU": price.cpus, "GPU": price.gpus, "memory": memory}, price.labels)
