"""A run's trainings in MLflow, read again by its own client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from ports import free_port

from farm.artifacts import Spec, commit, find
from farm.config import TrackingConfig
from farm.errors import UserError
from farm.mlflow_runs import BATCH, Tracker
from farm.store import LocalStore


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a tracking store in a folder, which needs neither a server nor a database."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    yield (tmp_path / "mlruns").as_uri()


def trained(folder: Path, losses: list[dict[str, float]], metrics: dict[str, Any]) -> Any:
    store = LocalStore(folder / "store")
    config = {"train": {"epochs": 2, "betas": [0.5, 0.9]}, "score": "fd_untrained"}
    spec = Spec(stage="adapter", version=1, folder="adapters/night", config=config, inputs={})
    summary = {"losses": losses, "metrics": metrics}
    commit(store, spec, {"a": b"a"}, wall_seconds=9.0, device_seconds=7.5, summary=summary)
    return find(store, spec.path)


def test_a_training_is_told_whole(tmp_path: Path, uri: str) -> None:
    """Also one of more losses than MLflow takes at once; two runs of a farm are in one experiment."""
    losses = [{"step": step, "l1": 1 / step, "gradient": 2 / step} for step in range(1, BATCH + 2)]
    manifest = trained(tmp_path, losses, {"l1": 0.25, "fd_untrained": {"value": 3.5}, "score": "fd_untrained"})
    for run_id in ("r1", "r2"):
        Tracker(uri, "photos", run_id, pytest.fail).trained("night", manifest)

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("photos")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.data.tags["farm.run"] for run in runs} == {"r1", "r2"}
    run = runs[0]
    assert run.info.run_name == "night" and run.info.status == "FINISHED"
    assert run.data.tags["farm.path"] == manifest.path
    assert run.data.params == {
        "train.epochs": "2", "train.betas": "[0.5, 0.9]", "score": "fd_untrained", "digest": manifest.digest
    }  # fmt: skip
    curve = client.get_metric_history(run.info.run_id, "loss/gradient")
    assert [(point.step, point.value) for point in curve] == [(row["step"], row["gradient"]) for row in losses]
    judged = {name: value for name, value in run.data.metrics.items() if not name.startswith("loss/")}
    assert judged == {"test/l1": 0.25, "test/fd_untrained/value": 3.5, "device_seconds": 7.5}


def test_no_server_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"tracking\.mlflow: the server at http://127\.0\.0\.1:\d+ takes nothing"):
        Tracker(f"http://127.0.0.1:{free_port()}", "photos", "r1", pytest.fail)
    with pytest.raises(UserError, match=r"tracking\.mlflow: the server at nowhere:/x takes nothing"):
        Tracker("nowhere:/x", "photos", "r1", pytest.fail)


def test_a_server_that_goes_is_told_once(tmp_path: Path, uri: str) -> None:
    notes: list[str] = []
    tracker = Tracker(uri, "photos", "r1", notes.append)
    (tmp_path / "mlruns").rename(tmp_path / "away")
    manifest = trained(tmp_path, [], {"l1": 0.25})
    for _ in range(3):
        tracker.trained("night", manifest)
    [note] = notes
    assert "is gone" in note and "tells it no more" in note


def test_no_password_in_the_address() -> None:
    assert TrackingConfig(mlflow="https://tracking.example:5000").mlflow
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD"):
        TrackingConfig(mlflow="https://me:secret@tracking.example")
