"""A farm of the real size on a simulated cluster: what Ray, the store and the driver add to the work, as JSON lines.

    python bench/cluster.py [--concepts 260] [--nodes 8] [--gpus-per-node 4] [--fail] [--grow] [--measure]

Everything is real but the work: the driver, Ray with a raylet a node (logical GPUs), the workers, the queue, and a
store on this disk, in which every artifact ends up. A unit of edits and an adapter sleep for as long as such work took
when it was measured (--measure writes bench/results/durations.json), stretched or shrunk to a mean of --unit-seconds
and --adapter-seconds; the base sleeps for 10 s and the rank search for 5 s. Then they put the files that a small farm,
run for real beforehand, had made. The clock stands still while workers start, which on real nodes takes each its own
cores.

Ideal: the sum of all sleeps over the slots, and the longest chain: the longest unit, the base, the ranks, the longest
adapter. --grow: instead 10, 100 and 1,000 concepts of one unit each, 1 to 32 slots, and ten times the images.
--fail: one teacher fails.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import psutil
from machine import machine

STAGES = ("concepts", "base", "ranks", "adapters")
UNIT_IMAGES = 50

QUIET = {
    "RAY_BACKEND_LOG_LEVEL": "error",
    "RAY_enable_metrics_collection": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_metrics_report_interval_ms": "3600000",
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_event_stats": "0",
    "RAY_core_worker_internal_heartbeat_ms": "10000",
    "RAY_raylet_start_wait_time_s": "300",
    "REPORTER_UPDATE_INTERVAL_MS": "3600000",
}
"""What nodes report of themselves all the time, and how long they may take to start: here nine share one's cores."""
DURATIONS = Path(__file__).parent / "results" / "durations.json"
QUICK = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "adversarial_weight": 0, "l1_weight": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concepts", type=int, default=260)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--gpus-per-node", type=int, default=4)
    parser.add_argument("--crops", type=int, default=18, help="crops of each of the seven photographs")
    parser.add_argument("--unit-seconds", type=float, default=10.0)
    parser.add_argument("--adapter-seconds", type=float, default=20.0)
    parser.add_argument("--measure", action="store_true", help="measure durations instead")
    parser.add_argument("--grow", action="store_true")
    parser.add_argument("--skip", type=int, default=0, help="of --grow: the rows that an earlier run has printed")
    parser.add_argument("--fail", action="store_true", help="one concept's teacher fails")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        work, *given = json.loads(options.one)
        row = {"template": build_template, "farm": simulate, "measure": measure}[work](*given)
        if row is not None:
            print(json.dumps(row), flush=True)
        return
    if options.measure:
        with tempfile.TemporaryDirectory() as folder:
            alone("measure", folder)
        return
    print(json.dumps(machine()), flush=True)
    means = {"unit": options.unit_seconds, "adapter": options.adapter_seconds}
    cluster = (options.nodes, options.gpus_per_node)
    settings = [(options.concepts, *cluster, options.crops)]
    if options.grow:
        unit = 7  # crops of each photograph: 49 images
        settings = [(n, *cluster, unit) for n in (10, 100, 1000)]
        settings += [(20, nodes, gpus, unit) for nodes, gpus in ((1, 1), (2, 4), (8, 4))]
        settings = [*settings, (20, *cluster, 10 * unit)][options.skip :]
    with tempfile.TemporaryDirectory() as folder:
        for crops in sorted({crops for *_, crops in settings}):
            alone("template", f"{folder}/template-{crops}", crops)
        for concepts, nodes, gpus, crops in settings:
            template, here = f"{folder}/template-{crops}", f"{folder}/farm"
            alone("farm", here, template, concepts, nodes, gpus, crops, means, options.fail)
            shutil.rmtree(here)


def alone(*call: object) -> None:
    """Do it in a process of its own, whose memory is measured from nothing."""
    subprocess.run([sys.executable, __file__, "--one", json.dumps(call)], check=True)


@dataclass(frozen=True)
class Script:
    """What the workers of a simulation do: sleep for `seconds[what]`, then copy what lies in `template`.

    gate: a folder in which each process that starts leaves a file; nobody begins before the file `open` is there.
    """

    template: str
    gate: str
    seconds: dict[str, list[float]]
    broken: str | None

    def sleep(self, what: str, key: str) -> None:
        """The same key sleeps as long in every run."""
        self.wait(what)
        seconds = random.Random(key).choice(self.seconds[what])
        began = time.time()
        time.sleep(seconds)
        with (Path(self.gate) / f"log-{os.getpid()}").open("a") as log:
            row = {"what": what, "worker": os.getpid(), "seconds": seconds, "began": began, "ended": time.time()}
            log.write(json.dumps(row) + "\n")

    def wait(self, what: str) -> None:
        (Path(self.gate) / f"{what}-{os.getpid()}").touch()
        while not (Path(self.gate) / f"open-{what}").exists():
            time.sleep(0.5)  # others still need the cores to start


class Editing:
    """Instead of `farm.stages.units.Worker`."""

    def __init__(self, script: Script, store: Any, plan: Any) -> None:
        from farm.store import LocalStore

        self.script, self.store, self.plan = script, store, plan
        self.made = LocalStore(Path(script.template))
        self.teaching = threading.Lock()

    def work(self, unit: Any) -> Any:
        from farm.artifacts import FileEntry
        from farm.errors import UserError
        from farm.events import Spent

        with self.teaching:
            self.script.sleep("unit", f"{unit.concept}/{unit.name}")
        if unit.concept == self.script.broken:
            raise UserError(f"{unit.concept}: its teacher is broken.")
        folder = self.plan.edits("c-0000").path
        entries = {}
        for name in unit.files:
            data = self.made.get(f"{folder}/{name}")
            self.store.put(f"{unit.folder}/{name}", data)
            entries[name] = FileEntry.of(data).model_dump()
        receipt = {"seconds": 1.0, "failed": 0, "files": entries}  # a `Receipt`, whose module imports torch
        self.store.put(unit.receipt_key, json.dumps(receipt).encode())
        return Spent(1.0, 1.0, sum(entry["size"] for entry in entries.values()), len(unit.ids))


def train_simulated(script: Script, store: Any, plan: Any, concept_id: str, line: Any) -> Any:
    """Instead of `farm.cluster.tasks.train_adapter`."""
    from farm.artifacts import commit, open_artifact
    from farm.events import Spent
    from farm.store import LocalStore

    script.sleep("adapter", concept_id)
    made = open_artifact(LocalStore(Path(script.template)), plan.adapter("c-0000").path)
    files = {name: made.read(name) for name in made.manifest.files}
    commit(store, plan.adapter(concept_id), files, wall_seconds=1.0, summary=made.manifest.summary)
    return Spent(1.0, 1.0, sum(map(len, files.values())))


class Gate:
    """While the block runs: opens `what` once `workers` processes wait before it. seconds: how long that took."""

    def __init__(self, folder: Path, what: str, workers: int) -> None:
        self.folder, self.what, self.workers, self.seconds = folder, what, workers, 0.0

    def __enter__(self) -> None:
        self.began = time.time()
        threading.Thread(target=self._watch, daemon=True).start()

    def __exit__(self, *error: object) -> None:
        pass

    def _watch(self) -> None:
        while len(list(self.folder.glob(f"{self.what}-*"))) < self.workers:
            time.sleep(0.2)
        self.seconds = time.time() - self.began
        (self.folder / f"open-{self.what}").touch()


@dataclass(frozen=True)
class Counting:
    """A store that counts what this process asks of it."""

    store: Any
    calls: Counter[str] = field(compare=False)

    def __getattr__(self, name: str) -> Any:
        member = getattr(self.store, name)
        if callable(member):
            self.calls[name] += 1
        return member

    def __reduce__(self) -> Any:
        return (_same, (self.store,))  # on a worker nobody counts


def _same(store: Any) -> Any:
    return store


def simulate(
    folder: str, template: str, concepts: int, nodes: int, gpus: int, crops: int, means: dict[str, float], fail: bool
) -> dict[str, Any]:
    """One farm on one cluster: its figures."""
    import ray
    from ray import cloudpickle
    from ray.cluster_utils import Cluster

    from e2gan import train as train_module
    from farm import cluster as on_ray
    from farm.progress import Screen
    from farm.run import Run
    from farm.stages import units as units_module
    from farm.status import farm_status
    from farm.store import LocalStore

    store = LocalStore(Path(folder) / "store")
    config = config_of(str(store.root), concepts, crops)
    for name in ("sources", "selections"):
        shutil.copytree(Path(template) / name, store.root / name)
    measured = json.loads(DURATIONS.read_text())
    seconds = {what: [s * to / mean(measured[what]) for s in measured[what]] for what, to in means.items()}
    seconds |= {"base": [10.0], "ranks": [5.0]}
    gates = Path(folder) / "gates"
    gates.mkdir()
    script = Script(template, str(gates), seconds, "c-0007" if fail else None)
    slots = nodes * gpus

    os.environ |= QUIET
    whole = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(nodes):
        whole.add_node(num_cpus=gpus, num_gpus=gpus, object_store_memory=100 * 2**20)
    units = concepts * math.ceil(7 * crops / 50)
    waiting = {
        "unit": Gate(gates, "unit", min(slots, units)),
        "adapter": Gate(gates, "adapter", min(slots, concepts - fail)),
    }
    original = {name: getattr(on_ray, name) for name in ("edit_concepts", "train_adapters")}

    def edit_concepts(*given: Any, **named: Any) -> Any:
        with waiting["unit"]:
            return original["edit_concepts"](*given, **named, make_worker=partial(Editing, script))

    def train_adapters(*given: Any, **named: Any) -> Any:
        with waiting["adapter"]:
            return original["train_adapters"](*given, **named, train=partial(train_simulated, script))

    def copied(what: str) -> Any:
        def work(_: Any, plan: Any, *rest: Any) -> None:
            (gates / f"open-{what}").touch()
            script.sleep(what, what)
            path = getattr(plan, what).path
            shutil.copytree(Path(template) / path, store.root / path)

        return work

    # So that none of many workers on few cores imports torch, of which these would be the only reason.
    for module in (on_ray.editing, on_ray.tasks, on_ray.watch, units_module, train_module):
        cloudpickle.register_pickle_by_value(module)
    on_ray.edit_concepts, on_ray.train_adapters = edit_concepts, train_adapters
    on_ray.pretrain_base, on_ray.search_ranks = copied("base"), copied("ranks")
    calls: Counter[str] = Counter()

    def execute(address: str | None) -> tuple[Any, float]:
        run = Run(
            config.model_copy(update={"cluster": config.cluster.model_copy(update={"address": address})}), Screen()
        )
        run.store = Counting(run.store, calls)
        began = time.time()
        return run.execute(STAGES, dry_run=False), time.time() - began

    cpu, before_mb = time.process_time(), memory_mb()
    outcome, wall = execute(whole.address)
    cpu = time.process_time() - cpu
    made = dict(calls)
    mine = psutil.Process().children(recursive=True)
    head = sum(process.memory_info().rss for process in mine if process.name() == "gcs_server") / 1e6
    ray.shutdown()
    whole.shutdown()

    logs = [json.loads(line) for path in gates.glob("log-*") for line in path.read_text().splitlines()]
    by = {what: [row for row in logs if row["what"] == what] for what in seconds}
    spread = sum(row["seconds"] for what in ("unit", "adapter") for row in by[what])
    chain = sum(max(row["seconds"] for row in rows) for rows in by.values())
    ideal = spread / slots + chain
    started = sum(gate.seconds for gate in waiting.values())
    makespan = wall - started
    calls.clear()
    rerun: dict[str, Any] = {}
    if not fail:  # what has failed is tried again, and the cluster is gone
        again, took = execute(None)
        rerun = {"rerun_s": round(took, 2), "rerun_built": again.built}
    looked = time.time()
    found = farm_status(store, Run(config, Screen()).plan)
    return {
        "concepts": concepts,
        "slots": slots,
        "images_per_concept": 7 * crops,
        "units": len(by["unit"]),
        "makespan_s": round(makespan, 1),
        "ideal_s": round(ideal, 1),
        "of_ideal": round(makespan / ideal, 3),
        "starting_workers_s": round(started, 1),
        "stages_s": outcome.seconds,
        "idle_ms_a_unit": idle_ms(by["unit"]),
        "idle_ms_an_adapter": idle_ms(by["adapter"]),
        "driver_cpu_ms_a_unit": round(1e3 * cpu / len(logs), 1),
        "driver_mb": [round(before_mb), round(memory_mb())],
        "gcs_mb": round(head),
        "driver_store_calls_a_concept": {name: round(n / concepts, 1) for name, n in sorted(made.items())},
        "published": sum(row["published"] is not None for row in found["concepts"]),
        "failures": len(outcome.failures),
        **rerun,
        "status_s": round(time.time() - looked, 2),
    }


def idle_ms(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds between the end of a worker's work and the beginning of its next: median and mean."""
    workers: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        workers.setdefault(row["worker"], []).append(row)
    gaps = [
        1e3 * (after["began"] - before["ended"])
        for mine in workers.values()
        for before, after in pairwise(sorted(mine, key=lambda row: row["began"]))
    ]
    return {"median": round(median(gaps), 1), "mean": round(mean(gaps), 1)} if gaps else {}


def memory_mb() -> float:
    """The most this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def config_of(store: str, concepts: int, crops: int) -> Any:
    from farm.config import FarmConfig

    return FarmConfig.model_validate(
        {
            "name": "simulated",
            "store": store,
            "sources": {
                "size": 32,
                "crops_per_photo": crops,
                "split": {"train": 0.6, "validation": 0.14, "test": 0.26},
            },
            "catalogue": [
                {"id": f"c-{n:04d}", "prompt": f"concept {n}", "editor": {"kind": "procedural", "style": "charcoal"}}
                for n in range(concepts)
            ],
            "model": {"channels": 8},
            "base": {"concepts": ["c-0000"], "train": QUICK},
            "ranks": {"concepts": ["c-0001"], "train": QUICK},
            "adapters": {"train": QUICK, "max_l1_ratio": 100, "gate": {"enabled": False}},
            "cluster": {name: {"cpus": 1, "gpus": 1} for name in ("edit", "adapters")},
        }
    )


def build_template(root: str, crops: int) -> None:
    """The base, the ranks, and the first concept's edits and adapter, made for real."""
    from farm.plan import make_plan
    from farm.stages.adapt import adapt
    from farm.stages.ingest import ingest
    from farm.stages.pretrain import pretrain
    from farm.stages.ranks import commit_ranks, search
    from farm.stages.select import select
    from farm.stages.teach import teach
    from farm.stages.units import Worker
    from farm.store import LocalStore

    store, plan = LocalStore(Path(root)), make_plan(config_of(root, 2, crops))
    ingest(store, plan, lambda done, total: None)
    select(store, plan)
    worker = Worker(store, plan)
    for concept in plan.config.catalogue:
        teach(store, plan, concept.id, worker)
    pretrain(store, plan)
    commit_ranks(store, plan, {c: search(store, plan, c) for c in plan.config.ranks.concepts}, wall_seconds=1.0)
    adapt(store, plan, "c-0000")


def measure(folder: str) -> None:
    """Write durations.json: seconds of four units of 50 images of eight image filters, and of four adapters."""
    from e2gan.config import GeneratorConfig
    from farm.config import FarmConfig
    from farm.editors.procedural.styles import STYLES
    from farm.plan import make_plan
    from farm.stages.adapt import adapt
    from farm.stages.ingest import ingest
    from farm.stages.pretrain import pretrain
    from farm.stages.ranks import commit_ranks, search
    from farm.stages.select import select
    from farm.stages.teach import advance
    from farm.stages.units import Worker
    from farm.store import LocalStore

    document = config_of(folder, 1, 29).model_dump(mode="json", exclude_unset=True)
    styles = sorted(STYLES)[:8]
    document["catalogue"] = [{"id": s, "prompt": s, "editor": {"kind": "procedural"}} for s in styles]
    document["sources"]["size"] = 64
    document["model"] = {"channels": GeneratorConfig().channels // 4}
    document["base"]["concepts"], document["ranks"]["concepts"] = styles[:1], styles[1:2]
    store = LocalStore(Path(folder))
    plan = make_plan(FarmConfig.model_validate(document))
    ingest(store, plan, lambda done, total: None)
    select(store, plan)
    worker, units, adapters = Worker(store, plan), [], []
    for style in styles:
        while step := advance(store, plan, style):
            for unit in step:
                worker.work(unit)
                if len(unit.ids) == UNIT_IMAGES:
                    units.append(unit.receipt(store).seconds)
    pretrain(store, plan)
    commit_ranks(store, plan, {c: search(store, plan, c) for c in plan.config.ranks.concepts}, wall_seconds=1.0)
    for style in styles[:4]:
        adapters.append(round(adapt(store, plan, style).wall_seconds, 3))
    DURATIONS.write_text(json.dumps({"machine": machine(), "unit": units, "adapter": adapters}, indent=1) + "\n")


if __name__ == "__main__":
    main()
