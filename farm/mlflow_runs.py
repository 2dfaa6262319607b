"""A run's trainings as runs of an MLflow tracking server: settings, curve and figures, once each is done."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from farm.errors import UserError, brief

if TYPE_CHECKING:
    from farm.artifacts import Manifest

BATCH = 1000
"""Metrics that MLflow takes in one call."""
_DEFAULTS = {
    # Its own patience is many minutes, in which nothing would be published.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # standard output is the result's alone
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class Tracker:
    """The experiment that has the farm's name, to which one run of the farm adds.

    A server that is gone in the middle of a farm's run stops nothing: `note` is told once, and what is trained from
    then on is left out.
    """

    def __init__(self, uri: str, farm: str, run_id: str, note: Callable[[str], None]) -> None:
        """
        uri: of the tracking server; its user and password come from MLFLOW_TRACKING_USERNAME and _PASSWORD.

        Raises:
            UserError: MLflow is not installed, or its server does not answer or does not let us in.
        """
        self._uri, self._run_id, self._note, self._gone = uri, run_id, note, False
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            raise UserError("tracking.mlflow: MLflow is missing; pip install 'e2gan-farm[mlflow]'.") from error
        try:
            self._client = MlflowClient(tracking_uri=uri)
            found = self._client.get_experiment_by_name(farm)
            self._experiment: str = found.experiment_id if found else self._client.create_experiment(farm)
        except Exception as error:  # of MLflow, requests, urllib3 or a database, as the address may be
            raise UserError(
                f"tracking.mlflow: the server at {uri} takes nothing ({brief(error)}); start it, mend the "
                "address, or take the key out."
            ) from error

    def trained(self, name: str, manifest: Manifest) -> None:
        """Tell of a training that is done. name: "base" or a concept's id."""
        if self._gone:
            return
        try:
            self._log(name, manifest)
        except Exception as error:
            self._gone = True
            self._note(
                f"tracking.mlflow: the server at {self._uri} is gone ({brief(error)}): this run tells it no more"
            )

    def _log(self, name: str, manifest: Manifest) -> None:
        from mlflow.entities import Metric, Param

        tags = {"farm.run": self._run_id, "farm.path": manifest.path, "farm.stage": manifest.stage}
        run = self._client.create_run(self._experiment, run_name=name, tags=tags).info.run_id
        now = int(1000 * time.time())
        losses = manifest.summary["losses"]
        last = int(losses[-1]["step"]) if losses else 0
        metrics = [
            Metric(f"loss/{loss}", value, now, int(row["step"]))
            for row in losses
            for loss, value in row.items()
            if loss != "step"
        ]
        judged = {f"test/{key}": value for key, value in _leaves(manifest.summary["metrics"], "/")}
        judged["device_seconds"] = manifest.device_seconds
        numbers = {key: value for key, value in judged.items() if isinstance(value, int | float)}
        metrics += [Metric(key, float(value), now, last) for key, value in numbers.items()]
        settings = {**manifest.config, "digest": manifest.digest}
        params = [Param(key, str(value)) for key, value in _leaves(settings, ".")]
        self._client.log_batch(run, params=params)
        for start in range(0, len(metrics), BATCH):
            self._client.log_batch(run, metrics=metrics[start : start + BATCH])
        self._client.set_terminated(run)


def _leaves(tree: Mapping[str, Any], between: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            for inner, leaf in _leaves(value, between):
                yield f"{name}{between}{inner}", leaf
        else:
            yield name, value
