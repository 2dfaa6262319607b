"""A real Ray head with token authentication, as an operator starts one."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from ports import free_ports
from ray.job_submission import JobSubmissionClient

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")


@dataclass(frozen=True)
class Head:
    """A running head: its job server, the environment of its operator, and where it keeps its logs."""

    url: str
    gcs: str
    environment: dict[str, str]

    @property
    def token_file(self) -> Path:
        return Path(self.environment["HOME"]) / ".ray" / "auth_token"

    def answer(self, token: str | None) -> int:
        """The status with which the job server answers a bearer of this token."""
        headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        return httpx.get(f"{self.url}/api/jobs/", headers=headers, timeout=30).status_code

    def has_node(self) -> bool:
        """Whether the head's own node is up, to which jobs are handed."""
        headers = {"Authorization": f"Bearer {self.token_file.read_text()}"}
        answer = httpx.get(f"{self.url}/nodes?view=summary", headers=headers, timeout=30)
        return answer.status_code == 200 and any(
            node["raylet"].get("state") == "ALIVE" for node in answer.json()["data"]["summary"]
        )

    def submit(self, name: str, job: str, config: Path) -> subprocess.Popen[str]:
        command = [RAY, "job", "submit", f"--address={self.url}", f"--submission-id={name}", f"--working-dir={ROOT}"]
        command += ["--", sys.executable, f"jobs/{job}.py", "--config", config]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def ended(self, name: str, submitted: subprocess.Popen[str]) -> tuple[int | None, str]:
        """The exit status of the job's driver, and what it printed; the command fails if and only if the driver did."""
        printed, _ = submitted.communicate()
        assert f"Job '{name}'" in printed, printed  # not even submitted
        client = JobSubmissionClient(self.url, headers={"Authorization": f"Bearer {self.token_file.read_text()}"})
        status = client.get_job_info(name).driver_exit_code
        assert submitted.returncode == min(status or 0, 1), printed
        return status, client.get_job_logs(name)

    def farm(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from farm.cli import main; main()", *map(str, arguments)]
        return subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True)


@contextmanager
def ray_head(home: Path) -> Iterator[Head]:
    """`ray start --head` with a token of its own in an operator's home, ended with all that it started."""
    logs = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # short: Ray's sockets lie in it, and Linux allows 107 bytes
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    environment["COLUMNS"] = "200"
    subprocess.run([RAY, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    gcs, dashboard, client, *agents = free_ports(7)
    names = (
        "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port",
        "runtime-env-agent-port",
        "metrics-export-port",
    )
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1", f"--port={gcs}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    command += [f"--temp-dir={logs}", *(f"--{name}={port}" for name, port in zip(names, agents, strict=True))]
    running = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", environment)
    with started(command, logs, environment) as head:
        deadline = time.monotonic() + 300
        while not _listens(dashboard) or not running.has_node():
            assert head.poll() is None and time.monotonic() < deadline, (logs / "started").read_text()
            time.sleep(0.2)
        yield running


@contextmanager
def started(command: Sequence[object], logs: Path, environment: Mapping[str, str]) -> Iterator[psutil.Popen]:
    """A `ray start`, which writes to `started` in its folder of logs; afterwards neither it nor the folder is there."""
    with (logs / "started").open("w") as output:
        head = psutil.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        yield head
    finally:
        family = [*head.children(recursive=True), head]
        for process in family:
            process.kill()
        psutil.wait_procs(family, timeout=30)
        shutil.rmtree(logs, ignore_errors=True)


def _listens(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0
