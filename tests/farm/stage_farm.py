"""A farm of real artifacts that takes seconds: its stages called one by one in this process, without Ray."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from farm.artifacts import Manifest, find
from farm.cluster import Failure
from farm.config import FarmConfig
from farm.events import Spent, Tell
from farm.plan import Plan, make_plan
from farm.stages.adapt import adapt, publish
from farm.stages.ingest import ingest
from farm.stages.pretrain import pretrain
from farm.stages.ranks import commit_ranks, search
from farm.stages.select import select
from farm.stages.teach import Goal, teach
from farm.stages.units import Worker
from farm.stop import Stop
from farm.store import LocalStore, Store

L1_ONLY = {"batch_size": 4, "learning_rate": 5e-3, "adversarial_weight": 0, "l1_weight": 1}
CONCEPTS = ("charcoal", "cyanotype", "night", "sepia")
DOCUMENT: dict[str, Any] = {
    "name": "stages",
    "sources": {
        "size": 32,
        "crops_per_photo": 6,
        "crop_scale": [0.5, 1.0],
        "split": {"train": 0.6, "validation": 0.14, "test": 0.26},
    },
    "selection": {"clusters": 9},
    "catalogue": [{"id": c, "prompt": f"in the style {c}", "editor": {"kind": "procedural"}} for c in CONCEPTS],
    "model": {"channels": 8},
    "base": {
        "concepts": ["charcoal", "cyanotype"],
        "train": {
            **{"epochs": 1, "batch_size": 4, "learning_rate": 1e-3, "l1_weight": 1, "checkpoint_every": 1},
            **{"adversarial_start": 0.5, "discriminator_channels": 4},
        },
    },
    "ranks": {"concepts": ["night"], "train": {**L1_ONLY, "epochs": 1}, "tolerance": 0, "patience": 3},
    "adapters": {"train": {**L1_ONLY, "epochs": 3}, "max_l1_ratio": 100, "gate": {"enabled": False}},
}
"""Seven photographs: four to train on (24 images, of which 9 are chosen), one to validate, two to test (12 images)."""


def document_of(root: Path, **changes: Any) -> dict[str, Any]:
    """The farm at `root`; changes by key with `__` for the dot, such as `selection__clusters=3`."""
    document = copy.deepcopy({**DOCUMENT, "store": str(root)})
    for key, value in changes.items():
        *parents, last = key.split("__")
        here: Any = document
        for name in parents:
            here = here[int(name)] if isinstance(here, list) else here.setdefault(name, {})
        here[int(last) if isinstance(here, list) else last] = value
    return document


def plan_of(root: Path, **changes: Any) -> Plan:
    return make_plan(FarmConfig.model_validate(document_of(root, **changes)))


def write_config(path: Path, root: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(document_of(root, **changes)))
    return path


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def edit_concept(store: Store, plan: Plan, concept_id: str) -> Manifest:
    """All that its teachers do for a concept; the manifest of its edits."""
    teach(store, plan, concept_id, Worker(store, plan))
    manifest = find(store, plan.edits(concept_id).path)
    assert manifest is not None
    return manifest


def prepare(store: Store, plan: Plan) -> None:
    """Everything up to the base, which is not made."""
    ingest(store, plan, lambda done, total: None)
    select(store, plan)
    for concept in plan.config.catalogue:
        edit_concept(store, plan, concept.id)


def finish(store: Store, plan: Plan) -> None:
    """The base and everything after it."""
    pretrain(store, plan)
    commit_ranks(store, plan, {c: search(store, plan, c) for c in plan.config.ranks.concepts}, wall_seconds=1.0)
    for concept in plan.config.catalogue:
        adapt(store, plan, concept.id)
        publish(store, plan, concept.id)


def built(base: Path) -> Path:
    """The folder of a finished farm below `base`, made by the first caller; copy it to change it."""
    root = base / "stage-farm"
    if not root.exists():
        with one_thread():
            store, plan = LocalStore(root), plan_of(root)
            prepare(store, plan)
            finish(store, plan)
    return root


def copied(root: Path, target: Path, *folders: str) -> LocalStore:
    """A store with some of the farm's folders, all of them when none is named."""
    if not folders:
        shutil.copytree(root, target)
    for folder in folders:
        shutil.copytree(root / folder, target / folder)
    return LocalStore(target)


def contents(root: Path) -> dict[str, bytes]:
    """Every object of the store at `root`."""
    store = LocalStore(root)
    return {key: store.get(key) for key in store.list()}


class Cluster:
    """Does in this process what `farm.cluster` has Ray do. broken: concepts whose teacher or training fails."""

    def __init__(self, *broken: str) -> None:
        self.broken = broken
        self.connections = 0
        self.done: list[str] = []

    @contextmanager
    def connected(self, config: Any, base: Any) -> Iterator[None]:
        self.connections += 1
        yield

    def edit_concepts(
        self, store: Store, plan: Plan, ids: Sequence[str], bar: Any, stop: Stop, goal: Goal = "quality", *, tell: Tell
    ) -> dict[str, Failure]:
        for concept_id in ids:
            if concept_id not in self.broken:
                self.done.append(f"{'edits' if goal == 'quality' else goal} {concept_id}")
                teach(store, plan, concept_id, Worker(store, plan), goal)
                tell("done", concept=concept_id)
        return self._failed(ids, Failure("the teacher gave up", "Traceback"), tell)

    def pretrain_base(self, store: Store, plan: Plan, bar: Any, stop: Stop, board: str | None = None) -> None:
        self.done.append("base")
        pretrain(store, plan, board=board)
        bar.update(1, 1)

    def search_ranks(self, store: Store, plan: Plan, bar: Any, stop: Stop) -> None:
        self.done.append("ranks")
        commit_ranks(store, plan, {c: search(store, plan, c) for c in plan.config.ranks.concepts}, wall_seconds=1.0)

    def train_adapters(
        self,
        store: Store,
        plan: Plan,
        ids: Sequence[str],
        bar: Any,
        stop: Stop,
        on_done: Callable[[str], None],
        *,
        tell: Tell,
    ) -> dict[str, Failure]:
        for concept_id in ids:
            if concept_id not in self.broken:
                assert find(store, plan.adapter(concept_id).path) is None
                self.done.append(f"adapter {concept_id}")
                tell("started", concept=concept_id, attempt=1)
                made = adapt(store, plan, concept_id)
                tell("done", concept=concept_id, attempt=1, **Spent(made.wall_seconds).facts)
                on_done(concept_id)
        return self._failed(ids, Failure("training diverged"), tell)

    def _failed(self, ids: Sequence[str], failure: Failure, tell: Tell) -> dict[str, Failure]:
        found = {concept_id: failure for concept_id in ids if concept_id in self.broken}
        for concept_id in found:
            tell("failed", concept=concept_id, error=failure.message, traceback=failure.traceback)
        return found

    def stand_in(self, monkeypatch: Any) -> None:
        monkeypatch.setattr("farm.cluster.Metrics", lambda run_id, farm: lambda event: None)
        for name in ("connected", "edit_concepts", "pretrain_base", "search_ranks", "train_adapters"):
            monkeypatch.setattr(f"farm.cluster.{name}", getattr(self, name))
