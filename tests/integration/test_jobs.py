"""Farms submitted as jobs to a real Ray head, by the commands of docs/cluster.md."""

from __future__ import annotations

import json
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray_head import Head, ray_head

from farm.config_file import load_config
from farm.events import events_of, runs_of
from farm.plan import make_plan
from farm.queue import Queue
from farm.registry import Registry
from farm.store import LocalStore

pytestmark = [pytest.mark.ray, pytest.mark.server]

TRAIN = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-3, "adversarial_weight": 0, "l1_weight": 1}
FARM: dict[str, Any] = {
    "name": "submitted",
    "sources": {"kind": "bundled", "size": 32, "crops_per_photo": 4},
    "selection": {"clusters": 8},
    "catalogue": [
        {"id": style, "prompt": f"in the style {style}", "editor": {"kind": "procedural"}}
        for style in ("charcoal", "sepia")
    ],
    "model": {"channels": 8},
    "base": {"concepts": ["charcoal"], "train": TRAIN},
    "ranks": {"concepts": ["sepia"], "train": TRAIN},
    "adapters": {"train": TRAIN, "max_l1_ratio": 100, "gate": {"enabled": False}},
}
NOT_A_NETWORK = b"not a network"


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with ray_head(tmp_path_factory.mktemp("home")) as running:
        yield running


def write(folder: Path, name: str, **changes: Any) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**FARM, "store": str(folder / "store"), **changes}))
    return path


def test_who_has_no_token_is_refused(head: Head) -> None:
    assert head.answer(None) in (401, 403)
    assert head.answer("0" * 64) in (401, 403)


def test_jobs(head: Head, tmp_path: Path) -> None:
    config = write(tmp_path, "farm")

    # Submitted twice at once: both end well, and what one makes the other does not make again.
    both = {name: head.submit(name, "run_farm", config) for name in ("first", "second")}
    for status, printed in [head.ended(name, submitted) for name, submitted in both.items()]:
        assert status == 0, printed
        assert "Traceback" not in printed
    store = LocalStore(tmp_path / "store")
    begun = Counter(
        event.stage
        for run_id in runs_of(store, "submitted")
        for event in events_of(store, run_id)
        if event.state == "started" and event.concept is None
    )
    assert {stage: begun[stage] for stage in ("sources", "selection", "edits", "base", "ranks")} == {
        "sources": 1, "selection": 1, "edits": 1, "base": 1, "ranks": 1
    }  # fmt: skip
    published = Registry(store).list()
    assert {name: entry.version for name, entry in published.items()} == {"charcoal": 1, "sepia": 1}
    plan = make_plan(load_config(config))
    assert {entry.digest for entry in published.values()} == {plan.adapter(name).digest for name in published}
    queue = Queue(store, "adapters")
    assert not queue.pending() and not queue.failed()
    assert stat.S_IMODE(head.token_file.stat().st_mode) == 0o600

    # Submitted again, there is nothing to do. A mistake in the configuration is exit status 2 and one sentence.
    made = {key: store.get(key) for key in store.list()}
    mistaken = write(tmp_path, "mistaken", stroe="/tmp")
    again, refused = head.submit("again", "run_farm", config), head.submit("mistaken", "run_farm", mistaken)
    status, printed = head.ended("again", again)
    assert (status, "nothing to do" in printed) == (0, True), printed
    assert {key: store.get(key) for key in store.list()} == made
    status, printed = head.ended("mistaken", refused)
    assert status == 2, printed
    assert f"error: {mistaken}: unknown key stroe; did you mean store?" in printed
    assert "Traceback" not in printed

    # A concept that fails: exit status 1 and one sentence.
    (tmp_path / "broken.onnx").write_bytes(NOT_A_NETWORK)
    broken = {"id": "broken", "prompt": "nothing", "editor": {"kind": "onnx", "path": str(tmp_path / "broken.onnx")}}
    config = write(tmp_path, "failing", catalogue=[*FARM["catalogue"], broken])
    status, printed = head.ended("failing", head.submit("failing", "build_concepts", config))
    assert status == 1, printed
    assert "failed: 1 of 3 concepts" in printed and "broken.onnx" in printed
    assert "Traceback" not in printed


def test_preflight(head: Head, tmp_path: Path) -> None:
    head.token_file.chmod(0o600)
    config = write(tmp_path, "farm", cluster={"address": head.gcs})
    looked = head.farm("preflight", "--config", config, "--json")
    assert looked.returncode == 0, looked.stdout + looked.stderr
    document = json.loads(looked.stdout)
    found = {check["what"].partition(" (")[0]: check["found"] for check in document["checks"]}
    assert found["cluster"].startswith("1 node: 2 CPUs")
    assert found["stage edit"] == "a worker takes 1 CPU; 2 fit now"
    [within] = [text for what, text in found.items() if what.startswith("node ")]
    assert within.endswith("code, packages, clock and what it reads as here")
    assert document["ok"] and all(check["state"] == "ok" for check in document["checks"]), document
    assert not any(LocalStore(tmp_path / "store").list())

    gpu = {"address": head.gcs, "edit": {"gpus": 1}, "adapters": {"cpus": 3}}
    missing = {"encoder": "clip", "path": str(tmp_path / "clip")}
    looked = head.farm("preflight", "--config", write(tmp_path, "large", cluster=gpu, text=missing), "--json")
    assert looked.returncode == 1, looked.stderr
    wrong = {
        c["what"].partition(" (")[0]: c["found"] for c in json.loads(looked.stdout)["checks"] if c["state"] != "ok"
    }
    [node] = [text for what, text in wrong.items() if what.startswith("node ")]
    assert "does not have" in node and "text.path" in node
    assert "cluster.edit" in wrong["stage edit"] and "cluster.adapters" in wrong["stage adapters"]
    assert len(wrong) == 3, wrong
