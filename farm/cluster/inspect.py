"""Looking at what Ray has before a run: the token, the nodes, what fits on them, and each node from within."""

from __future__ import annotations

import os
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from farm.cluster import node as within
from farm.cluster.connect import connected, silent
from farm.cluster.placement import STAGES, Launcher, Node, check, describe, launcher, packed
from farm.config import FarmConfig, Resources
from farm.errors import UserError
from farm.preflight import Check, Weights
from farm.store import Store

if TYPE_CHECKING:
    from farm.cluster.node import Found

ANSWER_SECONDS = 60
"""How long nodes may take to start a process that looks around."""

Model = tuple[str, str, str | None]


def check_token(address: str | None) -> Check:
    """Ray's token: there, readable by its owner alone, and used. address: of the cluster, None to start one here."""
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is not None and mode.lower() != "token":
        return Check(
            "token", "warning", f"RAY_AUTH_MODE={mode}: whoever reaches the cluster runs code on it; set `token`."
        )
    if address and mode is None:
        return Check("token", "warning", "RAY_AUTH_MODE is not set, so no token is sent: export RAY_AUTH_MODE=token.")
    if "RAY_AUTH_TOKEN" in os.environ:
        return Check("token", "ok", "from RAY_AUTH_TOKEN")
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if not file.is_file() or not file.read_text().strip():
        if address:
            return Check("token", "error", f"{file} holds no token: copy the head's, and chmod 600 it.")
        return Check("token", "ok", f"none yet: Ray will make {file}")
    if others := stat.S_IMODE(file.stat().st_mode) & 0o077:
        return Check("token", "warning", f"{file} is open to others ({others:03o}): chmod 600 {file}.")
    return Check("token", "ok", f"{file}, for its owner alone")


def check_cluster(config: FarmConfig, store: Store | None, weights: Sequence[Weights]) -> Iterator[Check]:
    """The nodes, what fits on them, and each one from within; what this machine has where a run would start Ray here.

    store: None when it cannot be used; the nodes are then not looked at from within.
    """
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if address in (None, "", "local"):
        yield from _here(config, weights)
        return
    if problem := silent(address):
        yield Check("cluster", "error", problem)
        return
    from ray.exceptions import RayError

    modest = config.cluster.model_copy(update=dict.fromkeys(STAGES, Resources()))
    try:
        with connected(modest):
            yield from _nodes(config, store, weights)
    except (UserError, RayError, RuntimeError) as error:  # too small, a wrong token, another version
        yield Check("cluster", "error", _why(error, address))


def _why(error: BaseException, address: str) -> str:
    from ray.exceptions import AuthenticationError

    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    # One cause is a RuntimeError with the AuthenticationError's traceback as its text.
    if any(isinstance(cause, AuthenticationError) or "AuthenticationError" in str(cause) for cause in causes):
        return (
            f"the cluster at {address} refuses this machine's token: copy the head's ~/.ray/auth_token here and "
            "export RAY_AUTH_MODE=token."
        )
    return " ".join(str(error).split())


def _here(config: FarmConfig, weights: Sequence[Weights]) -> Iterator[Check]:
    from ray._private.resource_and_label_spec import ResourceAndLabelSpec

    spec = ResourceAndLabelSpec(num_cpus=config.cluster.cpus or os.cpu_count())
    spec.resolve(is_head=True, node_ip_address="127.0.0.1")
    node = Node(spec.to_resource_dict(), {})  # type: ignore[no-untyped-call]
    yield Check("cluster", "ok", f"none is named, so a run starts a Ray on this machine: {_has(node.resources)}")
    yield from _stages(config, [node], None)
    for w in weights:
        if not within.has_model(w.model, w.revision):
            yield Check("models", "error", f"{w.key}: {w.model} is not on this machine: correct the path or fetch it.")


def _nodes(config: FarmConfig, store: Store | None, weights: Sequence[Weights]) -> Iterator[Check]:
    import ray

    found = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    nodes = {node["NodeID"]: Node(node["Resources"], node["Labels"]) for node in found}
    total = ray.cluster_resources()  # type: ignore[no-untyped-call]
    yield Check("cluster", "ok", f"{len(nodes)} node{'s' * (len(nodes) != 1)}: {_has(total)}")
    coming = launcher(config.cluster.autoscaling) if config.cluster.autoscaling else None
    yield from _stages(config, [*nodes.values()], coming)
    models = {
        node_id: [
            (w.key, w.model, w.revision)
            for w in weights
            if any(node.takes(getattr(config.cluster, stage)) for stage in w.stages)
        ]
        for node_id, node in nodes.items()
    }
    differ = look_around(found, store, models)
    for node in found:
        name, differs = f"node {_name(node)}", differ[node["NodeID"]]
        labels = [f"{key}={value}" for key, value in node["Labels"].items() if not key.startswith("ray.io/")]
        has = ", ".join([_has(node["Resources"]), *labels])
        yield Check(name, "ok", has if differs else f"{has}; code, packages, clock and what it reads as here")
        for state, difference in differs:
            yield Check(name, state, difference)


def _stages(config: FarmConfig, nodes: Sequence[Node], coming: Launcher | None) -> Iterator[Check]:
    for stage in STAGES:
        worker: Resources = getattr(config.cluster, stage)
        others = {other: Resources() for other in STAGES if other != stage}
        try:
            base = config.base if stage == "base" else None
            check(config.cluster.model_copy(update=others), nodes, coming, base)
        except UserError as error:
            yield Check(f"stage {stage}", "error", str(error))
            continue
        fit = sum(node.takes(worker) for node in nodes)
        labels = f" on a node with {', '.join(f'{k}={v}' for k, v in worker.labels.items())}" if worker.labels else ""
        later = f", {packed(worker, nodes, coming)} when all nodes have come" if coming else ""
        yield Check(f"stage {stage}", "ok", f"a worker takes {describe(worker)}{labels}; {fit} fit now{later}")


def _has(resources: Mapping[str, float]) -> str:
    """4 CPUs, 1 GPU, 16.4 GB of memory."""
    texts = [f"{amount:g} {name}{'s' * (amount > 1)}" for name in ("CPU", "GPU") if (amount := resources.get(name, 0))]
    return ", ".join([*(texts or ["no CPU"]), f"{decimal(int(resources.get('memory', 0)))} of memory"])


def _name(node: Mapping[str, Any]) -> str:
    """The node's address and the beginning of its id, which tells nodes of one machine apart."""
    return f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})"


def look_around(
    nodes: Sequence[Mapping[str, Any]], store: Store | None, models: Mapping[str, list[Model]]
) -> dict[str, Found]:
    """What a process on each node of the connected cluster finds other than here, by the node's id; all at once.

    nodes: as `ray.nodes` gives them. models: what each should have: key in the configuration, path or hub id, revision.
    The processes take no CPU and no GPU.
    """
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    pickled: Callable[[Any], bytes] = cloudpickle.dumps
    probe, here = f"probe/{uuid.uuid4().hex}", within.facts()
    if store is not None:
        store.put(probe, probe.encode())
    cloudpickle.register_pickle_by_value(within)  # type: ignore[no-untyped-call]
    try:
        pinned = {node["NodeID"]: _pinned(NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)) for node in nodes}
        asked = {
            node["NodeID"]: pinned[node["NodeID"]](within.differences).remote(
                here, pickled((store, probe, models[node["NodeID"]])), node["Resources"].get("GPU", 0)
            )
            for node in nodes
        }
        _, late = ray.wait([*asked.values()], num_returns=len(asked), timeout=ANSWER_SECONDS)
        return {node: _answer(answer, pinned[node], answer in late) for node, answer in asked.items()}
    finally:
        cloudpickle.unregister_pickle_by_value(within)  # type: ignore[no-untyped-call]
        if store is not None:
            store.delete(probe)


def _pinned(where: Any) -> Any:
    import ray

    options: dict[str, Any] = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": where}
    return ray.remote(**options)


def _answer(answer: Any, remote: Any, late: bool) -> Found:
    import ray

    if late:
        ray.cancel(answer, force=True)
        return [("error", f"no process looked around there within {ANSWER_SECONDS} s: see Ray's logs on it.")]
    try:
        found: Found = ray.get(answer)
        sent = time.time()
        there: float = ray.get(remote(within.clock).remote(), timeout=ANSWER_SECONDS)
        return found + within.clock_off(sent, there, time.time())
    except Exception as error:  # what goes wrong on one node, whatever it is, must not hide the others
        return [("error", f"nothing can run there: {str(error).strip().splitlines()[-1]}")]
