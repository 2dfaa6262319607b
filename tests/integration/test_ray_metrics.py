"""A run's figures among a node's metrics, as Prometheus and Ray's dashboard read them."""

from __future__ import annotations

import re

import httpx
import pytest
from ray_nodes import wait_for
from told import event, started

from farm import cluster
from farm.config import ClusterConfig

pytestmark = pytest.mark.ray


def test_what_a_run_tells_is_on_the_nodes_metrics_port(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setenv("RAY_metrics_report_interval_ms", "500")
    with cluster.connected(ClusterConfig(cpus=1)):
        metrics = cluster.Metrics("r1", "stages")
        spent = {"seconds": 3.0, "device_seconds": 2.5, "bytes": 1000}
        metrics(started(concepts=4, edits=("fog", "night"), adapters=("fog", "night"), publish=("fog", "night")))
        metrics(event(0, "edits", "started"))
        metrics(event(5, "edits", "done", "fog", unit="part-00000", **spent))
        metrics(event(10, "edits", "done", "fog", unit="part-00001", **spent))
        metrics(event(10, "edits", "done", "fog"))
        metrics(event(10, "edits", "retried", "night", unit="part-00000"))
        metrics(event(10, "edits", "failed", "night", unit="part-00000"))
        metrics(event(10, "edits", "progress", done=3, total=4))
        [node] = ray.nodes()
        address = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
        seen: dict[str, float] = {}

        def there() -> bool:
            try:
                text = httpx.get(address).text
            except httpx.TransportError:  # its agent is still being started
                return False
            lines = [line for line in text.splitlines() if line.startswith("ray_farm_") and 'farm="stages"' in line]
            seen.update((re.split(r"[{ ]", line)[0], float(line.rpartition(" ")[2])) for line in lines)
            return "ray_farm_published" in seen

        wait_for(there, 120, "the metrics")
    assert seen == {
        "ray_farm_units_total": 2,
        "ray_farm_failures_total": 1,
        "ray_farm_retries_total": 1,
        "ray_farm_device_seconds_total": 5,
        "ray_farm_bytes_total": 2000,
        "ray_farm_progress": 0.75,
        "ray_farm_units_per_second": 0.2,
        "ray_farm_adapters_per_hour": 0,
        "ray_farm_published": 2,
    }
