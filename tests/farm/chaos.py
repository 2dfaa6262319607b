"""Chaos: a small real farm on a small real cluster, of which something is killed at a drawn moment."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from ray_nodes import ADDRESSES, Cluster, in_background, kill_tree, status, title_of, wait_for, workers_of

from e2gan.weights import load_weights
from farm.artifacts import find
from farm.config_file import load_config
from farm.events import Event, events_of, runs_of
from farm.plan import make_plan
from farm.queue import Queue
from farm.registry import Registry
from farm.store import LocalStore

VICTIMS = ("worker", "node", "driver", "head")  # and "store", which goes away for a while
STAGES = ("edits", "base", "ranks", "adapter")
"""As a run's events name them; the comparison of teachers is the beginning of the edits."""
REPLACED_SECONDS = 3.0
"""From the death of a node to the start of another in its place."""
LIMIT_SECONDS = 300.0
"""What a command may take."""
HEADLESS_SECONDS = 120.0
"""How long a driver may outlive the head."""

L1_ONLY = {"batch_size": 4, "learning_rate": 1e-3, "adversarial_weight": 0, "l1_weight": 1}
FARM: dict[str, Any] = {
    "name": "chaos",
    "sources": {"size": 32, "crops_per_photo": 8, "split": {"train": 0.6, "validation": 0.14, "test": 0.26}},
    "selection": {"clusters": 20},
    "catalogue": [
        *[{"id": c, "prompt": f"in the style {c}", "editor": {"kind": "procedural"}} for c in ("charcoal", "sepia")],
        {"id": "winter", "prompt": "in winter"},
    ],
    "teachers": {
        "snow": {"kind": "procedural", "style": "winter"},
        "mist": {"kind": "procedural", "style": "fog"},
    },
    "model": {"channels": 8},
    "base": {
        "concepts": ["charcoal"],
        "train": {
            **{"batch_size": 4, "learning_rate": 1e-3, "checkpoint_every": 20},
            **{"adversarial_start": 0.5, "discriminator_channels": 4},
        },
    },
    "ranks": {"concepts": ["sepia", "winter"], "train": {**L1_ONLY, "epochs": 4}, "tolerance": 0.0, "patience": 3},
    "adapters": {"train": {**L1_ONLY, "epochs": 8}, "max_l1_ratio": 10, "gate": {"enabled": False}},
}


@dataclass(frozen=True)
class Draw:
    """What is killed when: `share` of a stage's usual seconds after its start. seed: draws which worker or node.

    away_seconds: for how long the store is away, where that is what happens.
    """

    seed: int
    victim: str
    stage: str
    share: float
    away_seconds: float = 0.0


def draw(seed: int) -> Draw:
    """Sixteen seeds in a row are every victim in every stage, each at a random moment of it."""
    share = random.Random(seed).uniform(0, 0.9)
    return Draw(seed, VICTIMS[seed % len(VICTIMS)], STAGES[seed // len(VICTIMS) % len(STAGES)], share)


def last_line(log: Path) -> str:
    return log.read_text().rstrip().rpartition("\n")[2]


@dataclass
class Farm:
    """A farm in a folder of its own."""

    folder: Path
    cluster: Cluster
    base_epochs: int

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.path, self.config = self.folder / "store", self.folder / "farm.yaml"
        train = {**FARM["base"]["train"], "epochs": self.base_epochs}
        document = {**FARM, "store": str(self.path), "cluster": {"address": self.cluster.address}}
        document["base"] = {**FARM["base"], "train": train}
        self.config.write_text(yaml.safe_dump(document))

    @contextmanager
    def run(self) -> Iterator[subprocess.Popen[bytes]]:
        """The driver, which does not outlive the block."""
        program = [sys.executable, "-c", "from farm.cli import main; main()", "run", "--config", str(self.config)]
        driver = in_background(program, self.folder / "driver.log", self.cluster.environment)
        try:
            yield driver
        finally:
            kill_tree(driver)

    def finish(self) -> int | None:
        """The exit status of the whole run; None when it had to be killed."""
        with self.run() as driver:
            return status(driver, LIMIT_SECONDS)

    def take_away(self, seconds: float) -> None:
        """The store is gone for a while, as a file system that is unmounted."""
        elsewhere = self.path.rename(self.folder / "elsewhere")
        time.sleep(seconds)
        elsewhere.rename(self.path)

    def events(self) -> list[Event]:
        """What all runs so far have noted, oldest first."""
        store = LocalStore(self.path)
        return [event for run_id in runs_of(store, FARM["name"]) for event in events_of(store, run_id)]

    def begun(self, stage: str) -> bool:
        return any(event.stage == stage for event in self.events())

    def finished(self) -> Iterator[Path]:
        """The finished units of work: receipts of edits, and manifests."""
        folders = [folder for folder in self.path.glob("[a-z]*") if folder.name not in ("queue", "runs", "scratch")]
        for folder in folders:
            yield from folder.glob("*/*/receipts/*.json")
            yield from folder.glob("**/manifest.json")

    def checkpoints(self) -> list[int]:
        """The steps of the base's checkpoints that are whole."""
        steps = []
        for path in self.path.glob("scratch/base-*/**/checkpoint.safetensors"):
            with suppress(OSError, ValueError):  # being written, or removed since it was listed
                _, metadata = load_weights(path.read_bytes())
                steps.append(json.loads(metadata["history"])["losses"][-1]["step"])
        return sorted(steps)

    def artifacts(self) -> dict[str, Any]:
        """Hashes of every artifact's files, by the artifact's address."""
        manifests = [json.loads(path.read_bytes()) for path in self.finished() if path.name == "manifest.json"]
        return {manifest["path"]: manifest["files"] for manifest in manifests}

    def objects(self) -> set[str]:
        """Everything in the store but the runs' notes, with what is under way and what is left of a write."""
        names = {str(path.relative_to(self.path)) for path in self.path.rglob("*") if path.is_file()}
        return {name for name in names if not name.startswith("runs/")}


@dataclass
class Watch:
    """When each finished unit of a farm was written, looked at all the time. again: those that changed, how often."""

    farm: Farm
    at: dict[str, int] = field(default_factory=dict)
    again: Counter[str] = field(default_factory=Counter)

    def look(self) -> dict[str, int]:
        for path in self.farm.finished():
            name, now = str(path.relative_to(self.farm.path)), path.stat().st_mtime_ns
            if self.at.setdefault(name, now) != now:
                self.again[name] += 1
            self.at[name] = now
        return dict(self.at)

    @contextmanager
    def all_the_time(self) -> Iterator[None]:
        over = threading.Event()

        def look() -> None:
            while not over.wait(0.2):
                self.look()

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.look()


def calm_run(cluster: Cluster, folder: Path, base_epochs: int = 40) -> tuple[Farm, dict[str, float]]:
    """An undisturbed farm, and the seconds of its stages."""
    farm = Farm(folder, cluster, base_epochs)
    assert farm.finish() == 0, (folder / "driver.log").read_text()
    return farm, {event.stage: event.seconds for event in farm.events() if event.of_run and event.seconds is not None}


def chaos_run(cluster: Cluster, folder: Path, drawn: Draw, calm: Farm, seconds: dict[str, float]) -> dict[str, Any]:
    """Kill what was drawn, run the same command again where that is needed, and compare with the undisturbed farm.

    A run that lost a worker or a node must end by itself. Returns what happened, ready for JSON; `problems`, sentences,
    is empty when all is well. seconds: of the undisturbed run's stages.
    """
    farm = Farm(folder, cluster, calm.base_epochs)
    watch, began, problems = Watch(farm), time.monotonic(), []
    moment = drawn.share * seconds[drawn.stage]
    note: dict[str, Any] = {"seed": drawn.seed, "victim": drawn.victim, "stage": drawn.stage}
    note |= {"after_start_s": round(moment, 2), "killed": [], "status": None, "again": None}
    with watch.all_the_time():
        with farm.run() as driver:
            wait_for(lambda: farm.begun(drawn.stage), LIMIT_SECONDS, drawn.stage)
            time.sleep(moment)
            wait_for(lambda: drawn.victim != "worker" or cluster.workers(), LIMIT_SECONDS, "a worker")
            assert driver.poll() is None, "the run was over before anything was killed"
            steps, before, killed_at = farm.checkpoints(), watch.look(), time.monotonic()
            if drawn.victim == "store":
                farm.take_away(drawn.away_seconds)
            else:
                note["killed"] = kill(drawn, cluster, driver)
            if drawn.victim == "node":
                time.sleep(REPLACED_SECONDS)
                cluster.start_node(next(address for address in ADDRESSES if address not in cluster.nodes))
            note["status"] = status(driver, HEADLESS_SECONDS if drawn.victim == "head" else LIMIT_SECONDS)
            note["driver_ended_after_s"] = round(time.monotonic() - killed_at, 1)
        if drawn.victim == "head":
            if note["status"] is None:
                problems.append(f"the driver went on for {HEADLESS_SECONDS:g} s without the head")
            cluster.stop()
            cluster.start()
        if drawn.victim in ("worker", "node", "store") and note["status"] != 0:
            problems.append(f"the run did not survive: {last_line(folder / 'driver.log')}")
        if note["status"] != 0:
            note["again"] = farm.finish()
            if note["again"] != 0:
                problems.append(f"the same command again did not end well: {last_line(folder / 'driver.log')}")
    rewritten = sorted(name for name, at in before.items() if watch.at[name] != at)
    note |= {"seconds": round(time.monotonic() - began, 1), "after_kill_s": round(time.monotonic() - killed_at, 1)}
    note |= {"finished_before": len(before), "finished_units_redone": rewritten, "written_twice": dict(watch.again)}
    problems += [f"{name} was finished and was written again" for name in rewritten]
    base = find(LocalStore(farm.path), make_plan(load_config(farm.config)).base.path)
    note |= {"checkpoints": steps, "resumed": base and base.summary["resumed"]}
    # Ray Train knows of a checkpoint when it has noted it: at the second one it has noted the first.
    under_way = base and f"{base.path}/manifest.json" not in before and len(steps) > 1
    hit = drawn.victim in ("driver", "head") or any("Train" in title for title in note["killed"])
    if under_way and hit and max([0, *base.summary["resumed"]]) < steps[-2]:
        problems.append("the base did not go on at its checkpoint")
    problems += differences(farm, calm)
    return {**note, "problems": problems}


def kill(drawn: Draw, cluster: Cluster, driver: subprocess.Popen[bytes]) -> list[str]:
    """SIGKILL to what was drawn; returns the titles of the processes there that did something for the driver."""
    chance = random.Random(drawn.seed)
    if drawn.victim == "driver":
        kill_tree(driver)
        return []
    if drawn.victim == "worker":
        workers = cluster.workers()
        titles = [title_of(worker) for worker in workers]
        number = chance.randrange(len(workers))
        workers[number].kill()
        return [titles[number]]
    node = cluster.nodes.pop(ADDRESSES[0] if drawn.victim == "head" else chance.choice(ADDRESSES[1:]))
    titles = [title_of(worker) for worker in workers_of(node)]
    kill_tree(node)
    return titles


def differences(farm: Farm, calm: Farm) -> list[str]:
    """How what a farm left differs from what an undisturbed one left."""
    ours, theirs = farm.artifacts(), calm.artifacts()
    found = [f"{path} differs" for path in sorted(ours.keys() | theirs.keys()) if ours.get(path) != theirs.get(path)]
    found += [f"{name} is too much" for name in sorted(farm.objects() - calm.objects())]
    found += [f"{name} is missing" for name in sorted(calm.objects() - farm.objects())]
    found += [f"scratch/{path.name} was left" for path in farm.path.glob("scratch/*")]
    store = LocalStore(farm.path)
    versions = {name: entry.version for name, entry in Registry(store).list().items()}
    found += [f"{name} was published {version} times" for name, version in versions.items() if version != 1]
    queue = Queue(store, "adapters")
    return found + [f"{item.key} is in the queue" for item in [*queue.pending(), *queue.failed()]]
