"""A small real Ray cluster on loopback: a head without CPUs and two nodes of one CPU each.

Every node is a tree of processes of its own, so that a worker, a node, the driver or the head can be killed alone.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from ports import free_port

ADDRESSES = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
"""Of the head and the nodes: all on this machine, but Ray tells nodes apart by address."""
WORKING = ("ray::_Actor", "ray::TrainController", "ray::RayTrainWorker", "ray::ImplicitFunc", "ray::_train")
"""Titles of the processes that edit and train, or oversee those that do."""


def in_background(command: list[str], output: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with output.open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def status(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit status; None when it goes on for longer."""
    with suppress(subprocess.TimeoutExpired):
        return process.wait(seconds)
    return None


def tree(pid: int) -> list[psutil.Process]:
    """A process and all below it; empty when it is gone."""
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a whole tree at once: frozen first, so that nobody in it sees another die or starts a new one."""
    frozen: set[psutil.Process] = set()
    while new := set(tree(process.pid)) - frozen:
        for member in new:
            with suppress(psutil.NoSuchProcess):
                member.suspend()
        frozen |= new
    for member in frozen:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def workers_of(node: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes of a node that do something for a driver, by process id."""
    return [process for process in sorted(tree(node.pid), key=lambda p: p.pid) if at_work(title_of(process))]


def at_work(title: str) -> bool:
    return title.startswith(WORKING)


def title_of(process: psutil.Process) -> str:
    """What a process calls itself; empty when it is gone."""
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline()).strip()
    return ""


def wait_for(reached: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.05)


class Cluster:
    """A head and two nodes on loopback, in a folder of their own (a short path) with a token of their own."""

    def __init__(self, root: Path) -> None:
        self.root, self.port, self._started = root, free_port(), 0
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        token = root / ".ray" / "auth_token"
        token.parent.mkdir(mode=0o700, parents=True)
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "HOME": str(root),
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "20",  # how long all wait for a head that is gone; Ray's is 60
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }

    @property
    def address(self) -> str:
        return f"{ADDRESSES[0]}:{self.port}"

    def start(self) -> None:
        for address in ADDRESSES:
            self.start_node(address)

    def start_node(self, address: str) -> None:
        """The head or a node, and what it starts; returns when it has joined."""
        self._started += 1
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={address}"]
        if address == ADDRESSES[0]:
            command += ["--head", f"--port={self.port}", "--num-cpus=0", "--include-dashboard=false"]
            command += [f"--ray-client-server-port={free_port()}"]
        else:
            command += [f"--address={self.address}", "--num-cpus=1"]
        command += ["--num-gpus=0", "--object-store-memory=100000000", f"--temp-dir={self.root}/{self._started}"]
        output = self.root / f"node-{self._started}.log"
        self.nodes[address] = in_background(command, output, self.environment)
        wait_for(lambda: b"Ray runtime started" in output.read_bytes(), 60, f"the node {address}")

    def stop(self) -> None:
        for node in self.nodes.values():
            kill_tree(node)
        self.nodes.clear()

    def workers(self) -> list[psutil.Process]:
        """The processes that do something for a driver now."""
        return [worker for node in self.nodes.values() for worker in workers_of(node)]


@contextmanager
def cluster_in(folder: Path) -> Iterator[Cluster]:
    """A cluster for as long as the block lasts; its logs stay in the folder."""
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
