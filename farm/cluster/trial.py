"""A Ray started on this machine as a run would, one task on it, and the end: `python -m farm.cluster.trial`."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from farm.cluster.connect import connected
from farm.config import ClusterConfig
from farm.errors import UserError
from farm.preflight import Check

START_SECONDS = 180
"""How long that may take."""


def check_ray() -> Check:
    """Whether Ray starts here and runs a task, tried in a process of its own: one that hangs is ended."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    began = time.monotonic()
    try:
        tried = subprocess.run(
            [sys.executable, "-m", __name__],
            capture_output=True,
            text=True,
            env=environment,
            timeout=START_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Check("Ray", "error", f"did not start in {START_SECONDS} s: see /tmp/ray/session_latest/logs.")
    if tried.returncode:
        last = (tried.stderr.strip().splitlines() or ["no reason given"])[-1]
        return Check("Ray", "error", f"does not start ({last}): see /tmp/ray/session_latest/logs.")
    return Check("Ray", "ok", f"{tried.stdout.strip()} starts and runs a task, {time.monotonic() - began:.0f} s")


def main() -> None:
    import ray

    try:
        with connected(ClusterConfig(cpus=1)):
            task = ray.remote(_process)
            assert ray.get(task.remote()) != os.getpid()
            print(ray.__version__)
    except UserError as error:
        sys.exit(" ".join(str(error.__cause__ or error).split()))


def _process() -> int:
    return os.getpid()


if __name__ == "__main__":
    main()
