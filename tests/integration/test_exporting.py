"""Packs as Ray tasks, one of whose workers is killed; the same command then finds them without a Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from stage_farm import CONCEPTS, built, copied, write_config

from farm.artifacts import verify

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]


def test_the_job_makes_every_pack(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    store = copied(built(tmp_path_factory.getbasetemp()), tmp_path / "store")
    config = write_config(tmp_path / "farm.yaml", store.root, cluster={"cpus": 2})
    command = [sys.executable, str(ROOT / "jobs" / "export_mobile.py"), "--config", str(config), "--all", "--json"]
    command += ["--format", "onnx", "--max-mb", "0.36", "--precision", "fp16"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        driver = psutil.Process(job.pid)
        while not (working := [p for p in driver.children(recursive=True) if p.name().startswith("ray::_export")]):
            assert job.poll() is None, job.communicate()[1]
            time.sleep(0.05)
        working[0].kill()
        out, error = job.communicate()
    assert job.returncode == 0, error
    packs = json.loads(out[out.index("{\n") :])["packs"]  # Ray tells of the worker's death before it
    assert len(packs) > 1 and [c["concept"] for pack in packs for c in pack["concepts"]] == list(CONCEPTS)
    assert not [problem for pack in packs for problem in verify(store, pack["path"])]
    nowhere = [*command, "--set", "cluster.address=127.0.0.1:9"]
    again = subprocess.run(nowhere, env=environment, capture_output=True, text=True, check=False)
    assert (again.returncode, json.loads(again.stdout)["packs"]) == (0, packs), again.stderr
