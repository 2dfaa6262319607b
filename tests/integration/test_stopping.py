"""A run that is asked to stop ends in time, leaves what it had begun as a checkpoint, and holds nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from stage_farm import write_config

from farm.artifacts import find
from farm.config_file import load_config
from farm.plan import make_plan
from farm.queue import Queue
from farm.registry import Registry
from farm.store import LocalStore

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@contextmanager
def run(config: Path) -> Iterator[subprocess.Popen[str]]:
    """A driver, which is killed at the end of the block if it still runs."""
    command = [sys.executable, "-c", "from farm.cli import main; main()", "run", "--config", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in the background
    ) as driver:
        try:
            yield driver
        finally:
            driver.kill()


def stop_when(config: Path, reached: Callable[[], bool], signal_number: int) -> tuple[int, str, float]:
    """Exit status, standard error, and the seconds from the signal to the end."""
    with run(config) as driver:
        while not reached():
            assert driver.poll() is None, "the run ended before it could be stopped"
            time.sleep(0.02)
        asked = time.monotonic()
        driver.send_signal(signal_number)
        error = driver.communicate()[1]
        return driver.returncode, error, time.monotonic() - asked


def test_stopped_by_sigterm_and_by_ctrl_c(tmp_path: Path) -> None:
    never = 10**6
    config = write_config(
        tmp_path / "farm.yaml",
        tmp_path / "farm",
        cluster={"cpus": 2, "grace_seconds": 60},
        base__train__epochs=60,
        base__train__checkpoint_every=never,
        adapters__train__epochs=60,
        adapters__train__checkpoint_every=never,
    )
    plan, store = make_plan(load_config(config)), LocalStore(tmp_path / "farm")
    queue = Queue(store, "adapters")

    # The base: no checkpoint but the one of the stop.
    training = store.root / "scratch" / f"base-{plan.base.digest}"
    status, error, seconds = stop_when(config, training.is_dir, signal.SIGTERM)
    assert (status, error.splitlines()[-1]) == (143, "stopped; the same command goes on from here"), error
    assert seconds < 60 and len([*training.rglob("checkpoint.safetensors")]) == 1
    assert not find(store, plan.base.path)

    # The adapters, stopped and interrupted.
    for signal_number, expected in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        status, error, seconds = stop_when(config, lambda: bool(queue.leased()), signal_number)
        assert status == expected and "Traceback" not in error, error
        assert not [*store.list("queue/adapters/leases/")], "its leases were given back"
        assert len(queue.pending()) == len(plan.config.catalogue) and {i.attempts for i in queue.pending()} == {0}
    assert list(store.list("scratch/adapter-")), "those under way left a checkpoint"

    with run(config) as driver:
        driver.communicate()
    assert driver.returncode == 0
    base = find(store, plan.base.path)
    assert base is not None and len(base.summary["resumed"]) == 1
    assert {name: entry.version for name, entry in Registry(store).list().items()} == dict.fromkeys(
        (concept.id for concept in plan.config.catalogue), 1
    )
    assert not queue.pending() and not [*store.list("scratch/")]
