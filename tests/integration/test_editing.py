"""Diffusion teachers on a real Ray, whose workers die while they edit."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from stage_farm import one_thread, plan_of
from tiny_diffusers import stable_diffusion

from farm import cluster
from farm.artifacts import find
from farm.config import FarmConfig
from farm.errors import StoreError
from farm.events import Spent
from farm.plan import Plan, make_plan
from farm.stages import units
from farm.stages.ingest import ingest
from farm.stages.select import select
from farm.stages.teach import teach
from farm.stages.units import Unit, Worker
from farm.stop import Stop
from farm.store import LocalStore

pytestmark = pytest.mark.ray

CONCEPTS = ("ink", "snow", "rust")


class Counted:
    """A bar that remembers how far it got."""

    def __init__(self) -> None:
        self.done = self.total = 0

    def update(self, done: int, total: int, note: str = "") -> None:
        self.done, self.total = done, total


def farm_at(folder: Path, model: Path) -> tuple[LocalStore, Plan]:
    """A farm of three concepts with one diffusion teacher, whose photos are chosen."""
    teacher = {"kind": "stable-diffusion", "model": str(model), "dtype": "float32", "side": 64, "steps": 3}
    config = FarmConfig.model_validate(
        {
            "name": "editing",
            "store": str(folder),
            "sources": {"size": 64, "crops_per_photo": 12, "split": {"train": 0.6, "validation": 0.14, "test": 0.26}},
            "teachers": {"sd": {**teacher, "safety_checker": False}},
            "catalogue": [{"id": name, "prompt": f"a photo of {name}"} for name in CONCEPTS],
            "quality": {"enabled": False},  # of random weights nothing is good
            "base": {"concepts": ["ink"]},
            "ranks": {"concepts": ["snow"]},
            "cluster": {"cpus": 2},
        }
    )
    store, plan = LocalStore(folder), make_plan(config)
    ingest(store, plan, lambda done, total: None)
    select(store, plan)
    return store, plan


def files_of(store: LocalStore, plan: Plan) -> dict[str, Any]:
    found = {}
    for name in CONCEPTS:
        manifest = find(store, plan.edits(name).path)
        assert manifest is not None and find(store, plan.quality(name).path) is not None
        found[name] = manifest.files
    return found


def test_a_killed_worker_is_replaced_and_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(units, "UNIT_IMAGES", 20)
    model = stable_diffusion(tmp_path / "model")
    store, plan = farm_at(tmp_path / "ray", model)
    killed: list[int] = []

    def kill_one() -> None:
        """Kill a process that edits, once the first unit is done."""
        while not any(store.list("edits/")):
            time.sleep(0.05)
        editing = [p for p in psutil.Process().children(recursive=True) if "_Actor" in " ".join(p.cmdline())]
        os.kill(editing[0].pid, signal.SIGKILL)
        killed.append(editing[0].pid)

    bar, told = Counted(), list[dict[str, Any]]()
    with cluster.connected(plan.config.cluster):
        killer = threading.Thread(target=kill_one, daemon=True)
        killer.start()
        tell = lambda state, **facts: told.append({"state": state, **facts})  # noqa: E731
        assert cluster.edit_concepts(store, plan, CONCEPTS, bar, Stop(), tell=tell) == {}
        killer.join(timeout=10)
    assert killed and bar.done == bar.total == 3 * 5  # 84 images of each concept, 20 a unit
    done = [event for event in told if event["state"] == "done" and "unit" in event]
    assert len(done) == len({(event["concept"], event["unit"]) for event in done}) == 15
    assert sum(event["images"] for event in done) == 3 * 84
    assert all(event["seconds"] >= event["device_seconds"] > 0 for event in done)
    lost = [event for event in told if event["state"] == "retried"]
    assert len(lost) <= 2 and all(event["error"] and event["unit"] for event in lost)  # what the dead one held
    for state in ("started", "done"):
        assert sorted(e["concept"] for e in told if e["state"] == state and "unit" not in e) == sorted(CONCEPTS)

    alone, same = farm_at(tmp_path / "alone", model)
    worker = Worker(alone, same)
    with one_thread():  # as Ray gives a worker: more would add up in another order
        for name in CONCEPTS:
            teach(alone, same, name, worker)
    assert files_of(store, plan) == files_of(alone, same)


def test_a_unit_that_hangs_is_given_to_another_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_IMAGES", 2)
    store, plan = LocalStore(tmp_path / "farm"), plan_of(tmp_path / "farm", cluster={"cpus": 2})
    ingest(store, plan, lambda done, total: None)
    select(store, plan)
    hung = tmp_path / "hung"

    class Hanging(Worker):
        def work(self, unit: Unit) -> Spent:
            if unit.name == "part-00003" and not hung.exists():
                hung.touch()
                time.sleep(3600)
            return super().work(unit)

    bar = Counted()
    with cluster.connected(plan.config.cluster):
        assert cluster.edit_concepts(store, plan, ["charcoal"], bar, Stop(), make_worker=Hanging) == {}
    assert hung.exists() and bar.done == bar.total == 14  # 27 images, 2 a unit
    assert find(store, plan.quality("charcoal").path)


def test_a_full_store_ends_the_run_and_blames_no_concept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, plan = LocalStore(tmp_path / "farm"), plan_of(tmp_path / "farm", cluster={"cpus": 2})
    ingest(store, plan, lambda done, total: None)
    select(store, plan)

    class Full(Worker):
        def work(self, unit: Unit) -> Spent:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            return super().work(unit)

    with cluster.connected(plan.config.cluster), pytest.raises(StoreError, match="is full"):
        cluster.edit_concepts(store, plan, ["charcoal"], Counted(), Stop(), make_worker=Full)
