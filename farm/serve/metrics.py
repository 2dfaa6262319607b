"""What the service counts, in Prometheus' text format. No label is anything that a client made up."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from farm.serve.replicas import Replicas

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30)

_COUNTERS = {
    "hits": "Edits whose adapter was ready in memory",
    "misses": "Edits whose adapter was not ready in memory",
    "loads": "Adapters read from the store",
    "evictions": "Adapters, as trained or ready, that were put out of memory",
    "failures": "Adapters that could not be loaded; more of them want attention",
    "batches": "Batches that were edited",
    "photos": "Photos that were edited",
}
_GAUGES = {
    "bytes": "Memory of adapters",
    "adapters": "Adapters in memory",
    "ready": "Adapters in memory that are ready at some strength",
    "pinned": "Concepts that stay in memory",
    "stale": "Concepts whose published version cannot be loaded: an alert",
    "age": "Seconds since the registry was last seen: an alert above 10",
}


class Metrics:
    """The counters of one ingress, and the reports of the replicas."""

    def __init__(self, replicas: Replicas) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter("farm_requests", "Requests", ["route", "method", "status"], registry=self._registry)
        self.seconds = Histogram(
            "farm_request_seconds", "Duration of requests", ["route"], buckets=_BUCKETS, registry=self._registry
        )
        self.stages = Histogram(
            "farm_stage_seconds", "Duration of an edit's stages", ["stage"], buckets=_BUCKETS, registry=self._registry
        )
        self.edits = Counter("farm_edits", "Edits", ["concept"], registry=self._registry)
        self._registry.register(_Reports(replicas))

    def staged(self, milliseconds: Mapping[str, float]) -> None:
        """Take the duration of each of an edit's stages."""
        for stage, took in milliseconds.items():
            self.stages.labels(stage).observe(took / 1e3)

    def text(self) -> tuple[bytes, str]:
        """All of them, and the content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class _Reports(Collector):
    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas

    def collect(self) -> Iterable[Metric]:
        reports = self._replicas.reports
        for kind, names in ((CounterMetricFamily, _COUNTERS), (GaugeMetricFamily, _GAUGES)):
            for name, text in names.items():
                metric: Any = kind(f"farm_replica_{name}", text, labels=["replica"])
                for replica, report in reports.items():
                    metric.add_metric([replica], report.get(name, 0))
                yield metric
        yield GaugeMetricFamily("farm_replicas", "Editing replicas heard of lately", value=len(reports))
        yield GaugeMetricFamily("farm_under_way", "Photos waiting or edited now", value=self._replicas.under_way)
        yield GaugeMetricFamily("farm_under_way_limit", "Photos that may be", value=self._replicas.limit)


class Counting:
    """Counts the requests of an application, and tells browsers not to guess what its answers are."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500
        began = time.perf_counter()

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.requests.labels(route, method, status).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - began)


_METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"}
