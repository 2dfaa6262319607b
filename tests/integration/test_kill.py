"""A farm whose driver is killed in every stage ends with the artifacts of an undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from farm.artifacts import find
from farm.config_file import load_config
from farm.plan import make_plan
from farm.queue import Queue
from farm.registry import Registry
from farm.store import LocalStore

pytestmark = [pytest.mark.ray, pytest.mark.slow]

L1_ONLY = {"batch_size": 4, "learning_rate": 1e-3, "adversarial_weight": 0, "l1_weight": 1}
CONFIG = {
    "name": "killed",
    "sources": {
        "kind": "bundled",
        "size": 32,
        "crops_per_photo": 16,
        "split": {"train": 0.6, "validation": 0.14, "test": 0.26},
    },
    "selection": {"clusters": 40},
    "catalogue": [
        {"id": style, "prompt": f"in the style {style}", "editor": {"kind": "procedural"}}
        for style in ("charcoal", "cyanotype", "sepia", "night")
    ]
    + [{"id": "winter", "prompt": "in winter"}],
    "teachers": {
        "snow": {"kind": "procedural", "style": "winter"},
        "mist": {"kind": "procedural", "style": "fog"},
    },
    "model": {"channels": 16},
    "base": {
        "concepts": ["charcoal", "cyanotype"],
        "train": {
            "epochs": 10,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "adversarial_start": 0.5,
            "discriminator_channels": 8,
            "checkpoint_every": 20,
        },
    },
    "ranks": {"concepts": ["sepia", "night"], "train": {**L1_ONLY, "epochs": 2}, "tolerance": 0.0, "patience": 3},
    "adapters": {"train": {**L1_ONLY, "epochs": 4}, "max_l1_ratio": 10, "gate": {"enabled": False}},
    "cluster": {"cpus": 2, "base": {"cpus": 2}},
}


NOTED = "scratch/base-*/checkpoint_manager_snapshot.json"


@contextmanager
def run(config: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A driver, which is killed at the end of the block if it still runs."""
    command = [sys.executable, "-c", "from farm.cli import main; main()", "run", "--config", str(config)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen(command, env=environment, start_new_session=True) as driver:
        try:
            yield driver
        finally:
            driver.kill()


def finish(config: Path) -> None:
    with run(config) as driver:
        assert driver.wait() == 0


def kill_when(config: Path, reached: Callable[[], bool]) -> None:
    with run(config) as driver:
        while not reached():
            assert driver.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
    assert driver.returncode == -signal.SIGKILL


def committed(store: Path) -> dict[str, int]:
    """When each finished unit of work was written: units of edits, and manifests."""
    names = [*store.glob("*/*/*/receipts/*.json"), *store.glob("*/**/manifest.json")]
    return {str(path.relative_to(store)): path.stat().st_mtime_ns for path in names}


def noted(snapshot: Path) -> str:
    """What Ray Train would go on from: the part of its snapshot before what is still being written."""
    return snapshot.read_text().partition("pending_training_results")[0]


def artifact_files(store: Path) -> dict[str, dict[str, object]]:
    """Hashes of every artifact's files, by the artifact's address."""
    manifests = [json.loads(path.read_bytes()) for path in store.glob("*/**/manifest.json")]
    return {manifest["path"]: manifest["files"] for manifest in manifests}


def test_killed_in_every_stage(tmp_path: Path) -> None:
    configs, stores = [], []
    for name in ("undisturbed", "killed"):
        stores.append(tmp_path / name)
        configs.append(tmp_path / f"{name}.yaml")
        configs[-1].write_text(yaml.safe_dump({**CONFIG, "store": str(stores[-1])}))
    finish(configs[0])

    config, store = configs[1], stores[1]
    moments: dict[str, Callable[[], bool]] = {
        "comparison": lambda: any(store.glob("comparisons/*/*/receipts/*.json")),
        "edits": lambda: any(store.glob("edits/*/*/receipts/*.json")),
        # Ray Train goes on at a checkpoint only once it has noted it.
        "base": lambda: any("checkpoint_dir_name" in noted(path) for path in store.glob(NOTED)),
        "ranks": lambda: any(store.glob("scratch/ranks-*/**/rounds.json")),
        "adapters": lambda: any(store.glob("adapters/*/*/manifest.json")),
    }
    done: dict[str, int] = {}
    for reached in moments.values():
        kill_when(config, reached)
        now = committed(store)
        assert {name: at for name, at in now.items() if name in done} == done, "a finished unit was done again"
        done = now
    finish(config)
    now = committed(store)
    assert {name: now[name] for name in done} == done, "a finished unit was done again"

    assert artifact_files(store) == artifact_files(stores[0])
    plan = make_plan(load_config(config))
    base = find(LocalStore(store), plan.base.path)
    assert base is not None
    assert base.summary["resumed"], "the base began anew instead of at its checkpoint"
    whole = find(LocalStore(stores[0]), base.path)
    assert whole is not None and whole.summary["resumed"] == []
    assert [loss["step"] for loss in base.summary["losses"]] == [loss["step"] for loss in whole.summary["losses"]]
    published = Registry(LocalStore(store)).list()
    assert {name: entry.version for name, entry in published.items()} == dict.fromkeys(published, 1)
    assert len(published) == len(CONFIG["catalogue"])
    queue = Queue(LocalStore(store), "adapters")
    assert not queue.pending() and not queue.failed()
    assert not list(store.glob("scratch/*"))
