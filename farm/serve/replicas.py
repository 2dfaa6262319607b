"""What the ingress knows of the editing replicas, and how many photos it lets wait for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from farm.serve.problems import BusyError

REMEMBERED_SECONDS = 30.0
"""For how long a replica counts that was not heard of."""


class Replicas:
    """The replicas, as they report of themselves, and the photos that are under way.

    fewest: replicas that there are at least. max_waiting: photos that may wait for each.
    """

    def __init__(self, *, fewest: int = 1, max_waiting: int) -> None:
        self._fewest = fewest
        self._places = 1 + max_waiting
        self._lock = threading.Lock()
        self._heard: dict[str, tuple[Mapping[str, Any], float]] = {}
        self.under_way = 0

    def hear(self, report: Mapping[str, Any]) -> None:
        """Take a replica's report, as `farm.serve.editor` makes it."""
        if report:
            with self._lock:
                self._heard[report["replica"]] = report, time.monotonic()

    @property
    def reports(self) -> dict[str, Mapping[str, Any]]:
        """The latest report of each that was heard of lately, by name."""
        oldest = time.monotonic() - REMEMBERED_SECONDS
        with self._lock:
            self._heard = {name: told for name, told in self._heard.items() if told[1] > oldest}
            return {name: report for name, (report, _) in self._heard.items()}

    @property
    def limit(self) -> int:
        """Photos that may be under way."""
        return self._places * max(self._fewest, len(self.reports))

    def admit(self, photos: int = 1) -> None:
        """BusyError when that many more would wait too long. More than the limit are taken when nothing else is."""
        if self.under_way and self.under_way + photos > self.limit:
            raise BusyError

    @contextmanager
    def editing(self, photos: int = 1) -> Iterator[None]:
        """Photos under way while the body runs; BusyError as in `admit`."""
        self.admit(photos)
        self.under_way += photos
        try:
            yield
        finally:
            self.under_way -= photos
