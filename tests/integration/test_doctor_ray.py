"""`farm doctor` as it is typed, with the Ray that it starts."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from farm.cluster import trial

pytestmark = pytest.mark.ray


def doctor(home: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    return subprocess.run(
        [sys.executable, "-c", "from farm.cli import main; main()", "doctor", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**kept, "HOME": str(home), **environment},
    )


def test_a_machine_with_a_ray_that_starts(tmp_path: Path) -> None:
    done = doctor(tmp_path, "--working-dir", tmp_path, "--json")
    document = json.loads(done.stdout)
    found = {check["what"]: check for check in document["checks"]}
    assert done.returncode == 0 and document["ok"], document
    assert found["Ray"]["state"] == "ok" and "starts and runs a task" in found["Ray"]["found"]
    token = tmp_path / ".ray/auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and str(token) in found["token"]["found"]
    assert found["token"]["state"] == "ok" and found["GPU"]["state"] in ("ok", "warning")


def test_a_ray_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("very" * 30)))  # too long for a socket's name
    monkeypatch.setenv("HOME", str(tmp_path))
    check = trial.check_ray()
    assert check.state == "error" and check.found.startswith("does not start (") and "logs" in check.found


def test_a_ray_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "START_SECONDS", 0.01)
    monkeypatch.setenv("HOME", str(tmp_path))
    check = trial.check_ray()
    assert check.state == "error" and check.found.startswith("did not start in 0.01 s")
