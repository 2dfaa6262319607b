"""A farm on a cluster whose nodes come when work waits for them: Ray's autoscaler, whose nodes are processes here."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from ports import free_ports
from ray_head import RAY, started
from stage_farm import plan_of

from farm.artifacts import find
from farm.cluster import connected, edit_concepts
from farm.cluster.connect import keep_token_private
from farm.cluster.placement import slots, worker_options
from farm.config import BaseConfig, ClusterConfig
from farm.errors import UserError
from farm.stages.ingest import ingest
from farm.stages.select import select
from farm.stop import Stop
from farm.store import LocalStore

pytestmark = [pytest.mark.ray, pytest.mark.slow]

HEAD_ID = "f" * 51 + "00000"  # the provider's own name for it
LABELS = {"farm": "edit"}
STAGES = ("edit", "base", "ranks", "adapters")


class Bar:
    def update(self, done: int, total: int, note: str = "") -> None:
        pass


def launcher_file(folder: Path, gcs: str) -> Path:
    """A head that takes no work, and up to two nodes of one CPU that go when they have been idle for six seconds."""
    commands = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
    starts = ("head_start_ray_commands", "worker_start_ray_commands")
    lists = (*commands, *starts, "cluster_synced_files", "rsync_exclude", "rsync_filter")
    config = {
        "cluster_name": "here",
        "max_workers": 2,
        "idle_timeout_minutes": 0.1,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "launch_multiple": True,
            "disable_node_updaters": True,
            "head_node_id": HEAD_ID,
            "gcs_address": gcs,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "edit": {"resources": {"CPU": 1}, "labels": LABELS, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        "auth": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in lists},
    }
    path = folder / "bootstrap.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """`ray start --head` with an autoscaler and our own token: its address, and the launcher's file."""
    import ray

    for name in [name for name in os.environ if name.startswith("RAY_")]:  # left by farms that ran in this process
        monkeypatch.delenv(name)
    for name, value in {
        "HOME": str(tmp_path),
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",  # as `ray up` does
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }.items():
        monkeypatch.setenv(name, value)
    keep_token_private(make=True)
    logs = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # short: Ray's sockets lie in it, and Linux allows 107 bytes
    port, *others = free_ports(6)
    names = ("ray-client-server-port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
    names = (*names, "runtime-env-agent-port")
    gcs = f"{ray.util.get_node_ip_address()}:{port}"
    file = launcher_file(tmp_path, gcs)
    command = [RAY, "start", "--head", "--block", "--num-cpus=0", "--num-gpus=0", f"--port={port}"]
    command += ["--include-dashboard=false", f"--temp-dir={logs}", f"--autoscaling-config={file}"]
    command += [f"--{name}={other}" for name, other in zip(names, others, strict=True)]
    with started(command, logs, os.environ) as running:
        while "block forever" not in (logs / "started").read_text():
            assert running.poll() is None, (logs / "started").read_text()
            time.sleep(0.2)
        yield gcs, file


def alive() -> int:
    import ray

    return sum(node["Alive"] for node in ray.nodes())  # type: ignore[no-untyped-call]


def drive(gcs: str, file: str, folder: Path) -> dict[str, Any]:
    """What a driver finds, in a process of its own, which knows no other token."""
    import ray

    class Editor:  # in here it travels by value: workers know nothing of this file
        def work(self) -> str:
            return str(ray.get_runtime_context().get_node_id())

    stages = {stage: {"labels": LABELS} for stage in STAGES}
    cluster = ClusterConfig.model_validate({"address": gcs, "autoscaling": file, **stages})
    found: dict[str, Any] = {}
    try:
        with connected(cluster.model_copy(update={"autoscaling": None})):
            pass
    except UserError as error:
        found["without"] = str(error)
    with connected(cluster, BaseConfig(representatives=1, workers=2)):
        found["before"] = alive(), slots(cluster.edit), slots(cluster.edit, file)
        remote = ray.remote(**worker_options(cluster.edit), max_restarts=-1)(Editor)
        editors = [remote.remote() for _ in range(slots(cluster.edit, file))]
        found["places"] = len({*ray.get([editor.work.remote() for editor in editors])} - {HEAD_ID})
        time.sleep(1)  # as long as `slots` remembers
        found["there"] = alive(), slots(cluster.edit)
        for editor in editors:
            ray.kill(editor)
        while alive() > 1:
            time.sleep(0.5)
        found["after"] = alive()

        store = LocalStore(folder)
        plan = plan_of(folder, cluster={"address": gcs, "autoscaling": file, **stages})
        ingest(store, plan, lambda done, total: None)
        select(store, plan)
        concepts = [concept.id for concept in plan.config.catalogue]
        found["failures"] = edit_concepts(store, plan, concepts, Bar(), Stop())
        found["edited"] = all(find(store, plan.quality(concept).path) for concept in concepts)
    return found


def test_nodes_come_for_the_work_and_go(head: tuple[str, Path], tmp_path: Path) -> None:
    gcs, file = head
    made = (tmp_path / ".ray" / "auth_token").read_text()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as processes:
        found = processes.submit(drive, gcs, str(file), tmp_path / "farm").result()
    assert found.pop("without").startswith(
        "cluster.edit.labels: a worker wants a node with farm=edit and there are no "
    )
    assert found == {
        "before": (1, 1, 2),
        "places": 2,
        "there": (3, 2),
        "after": 1,
        "failures": {},
        "edited": True,
    }
    assert (tmp_path / ".ray" / "auth_token").read_text() == made  # Ray took ours
