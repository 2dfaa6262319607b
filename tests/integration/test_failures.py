"""One concept that fails, or a cluster too small, seen through the command line on a real Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import yaml
from onnx import TensorProto, helper

pytestmark = pytest.mark.ray

QUICK = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-3, "adversarial_weight": 0, "l1_weight": 1}


def broken_teacher(path: Path) -> None:
    """An ONNX editor that answers with not-a-number."""
    value = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, "h", "w"])
    edited = helper.make_tensor_value_info("edited", TensorProto.FLOAT, ["n", 3, "h", "w"])
    nodes = [
        helper.make_node("Sub", ["image", "image"], ["zero"]),
        helper.make_node("Div", ["zero", "zero"], ["edited"]),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "broken", [value], [edited]), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 10
    onnx.save(model, path)


def write_config(folder: Path, **changes: object) -> Path:
    config = {
        "name": "failing",
        "store": str(folder / "store"),
        "sources": {"kind": "bundled", "size": 32, "crops_per_photo": 4},
        "catalogue": [
            {"id": "charcoal", "prompt": "a charcoal drawing", "editor": {"kind": "procedural"}},
            {"id": "sepia", "prompt": "sepia", "editor": {"kind": "procedural"}},
            {
                "id": "broken",
                "prompt": "nothing at all",
                "editor": {"kind": "onnx", "path": str(folder / "broken.onnx")},
            },
        ],
        "model": {"channels": 8},
        "base": {"concepts": ["charcoal"], "train": QUICK},
        "ranks": {"concepts": ["sepia"], "train": QUICK},
        "adapters": {"train": QUICK, "max_l1_ratio": 10, "gate": {"enabled": False}},
        "cluster": {"cpus": 2},
        **changes,
    }
    broken_teacher(folder / "broken.onnx")
    path = folder / "farm.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def farm(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from farm.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_failed_concept_does_not_stop_the_others(tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    ended = farm("run", "--config", config)
    assert ended.returncode == 1, ended.stderr
    title = ended.stderr.splitlines().index("failed: 1 of 3 concepts")
    assert ended.stderr.splitlines()[title + 1].startswith("  broken  edits: ") and "broken.onnx" in ended.stderr
    assert "Traceback" not in ended.stderr + ended.stdout
    status = json.loads(farm("status", "--config", config, "--json").stdout)
    published = {row["id"]: row["published"] for row in status["concepts"]}
    assert published == {"charcoal": 1, "sepia": 1, "broken": None}
    report = next((tmp_path / "store" / "runs").glob("*/report.html")).read_text()
    assert "broken.onnx" in report


def test_too_few_cpus_is_refused_at_once(tmp_path: Path) -> None:
    config = write_config(tmp_path, cluster={"cpus": 1, "base": {"cpus": 4}})
    ended = farm("run", "--config", str(config))
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == (
        f"error: {config}: cluster.base.cpus: a worker wants 4 CPUs and the largest node has 1; "
        "set cluster.base.cpus to at most 1 or add larger nodes."
    )
    assert not list((tmp_path / "store").glob("edits/*/*/manifest.json"))
