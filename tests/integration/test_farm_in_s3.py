"""A whole farm whose store is a bucket: Ray Train and Ray Tune keep their checkpoints there too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import rgw
from stage_farm import CONCEPTS, write_config
from stores import fresh

from farm.artifacts import MANIFEST
from farm.registry import Registry
from farm.store import LocalStore

pytestmark = [pytest.mark.ray, pytest.mark.server]


def farm(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from farm.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_farm_in_a_bucket(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    store = fresh(str(request.getfixturevalue("rgw_bucket" if not rgw.missing() else "moto_bucket")))
    config = write_config(tmp_path / "farm.yaml", tmp_path / "unused", store=store.url, cluster={"cpus": 2})
    ended = farm("run", "--config", config)
    assert ended.returncode == 0, ended.stderr
    assert {name: entry.version for name, entry in Registry(store).list().items()} == dict.fromkeys(CONCEPTS, 1)
    assert not [*store.list("scratch/"), *store.list("queue/adapters/")]
    again = farm("run", "--config", config)
    assert (again.returncode, "nothing to do" in again.stderr) == (0, True), again.stderr

    # What is in the bucket is whole, and the same as in a folder.
    checked = farm("verify", "--config", config)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    copied = farm("sync", store.url, tmp_path / "copy")
    assert copied.returncode == 0, copied.stdout + copied.stderr
    copy = LocalStore(tmp_path / "copy")
    manifests = [key for key in store.list() if key.endswith(f"/{MANIFEST}")]
    assert manifests and [key for key in copy.list() if key.endswith(f"/{MANIFEST}")] == manifests
    for key in manifests:
        assert copy.get(key) == store.get(key)
        for name in json.loads(store.get(key))["files"]:
            path = f"{key.removesuffix(MANIFEST)}{name}"
            assert copy.get(path) == store.get(path)
