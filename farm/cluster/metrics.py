"""What a run tells, as Ray's metrics: they reach the nodes' Prometheus ports, and so Ray's dashboard and Grafana."""

from __future__ import annotations

from farm.events import Event
from farm.watching import Watched


class Metrics:
    """Hears a run's events (`farm.journal`) and counts them. Ray puts `ray_` in front of the names.

    Counters, by farm and stage: `farm_units_total` (units of edits, and adapters), `farm_failures_total`,
    `farm_retries_total`, `farm_device_seconds_total`, `farm_bytes_total`. Gauges: `farm_progress`, the share of a stage
    that is done, `farm_units_per_second`, `farm_adapters_per_hour`, `farm_published`.
    """

    def __init__(self, run_id: str, farm: str) -> None:
        from ray.util.metrics import Counter, Gauge

        by_stage = {"tag_keys": ("farm", "stage")}
        self._farm, self._watched = farm, Watched(run_id)
        self._units = Counter("farm_units", "Units of edits, and adapters, that are done.", **by_stage)
        self._failures = Counter("farm_failures", "Concepts that failed for good.", **by_stage)
        self._retries = Counter("farm_retries", "Attempts that failed and were followed by another.", **by_stage)
        self._device = Counter("farm_device_seconds", "Seconds that teachers or trainings held a device.", **by_stage)
        self._bytes = Counter("farm_bytes", "Bytes that workers put into the store.", **by_stage)
        self._progress = Gauge("farm_progress", "The share of a stage that is done.", **by_stage)
        of_farm = {name: f"{name.replace('_', ' ')}, lately" for name in ("units_per_second", "adapters_per_hour")}
        self._rates = {name: Gauge(f"farm_{name}", said, ("farm",)) for name, said in of_farm.items()}
        self._published = Gauge("farm_published", "Concepts whose adapter is published.", ("farm",))

    def __call__(self, event: Event) -> None:
        """Count an event."""
        tags = {"farm": self._farm, "stage": event.stage}
        self._watched.add([event])
        if event.state == "progress" and event.done is not None:
            self._progress.set(event.done / max(1, event.total or 0), tags)
            self._tell_rates(event)
        if event.concept and event.state == "failed":
            self._failures.inc(1, tags)
        if event.state == "retried":
            self._retries.inc(1, tags)
        if event.state == "done" and event.concept and event.seconds is not None:
            self._units.inc(1, tags)
            self._device.inc(event.device_seconds or 0, tags)
            self._bytes.inc(event.bytes or 0, tags)

    def _tell_rates(self, event: Event) -> None:
        facts = self._watched.facts(event.at)
        for name, gauge in self._rates.items():
            gauge.set(facts[name] or 0, {"farm": self._farm})
        if facts["concepts"]:
            self._published.set(facts["concepts"]["published"]["done"], {"farm": self._farm})
