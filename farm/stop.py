"""Being asked to stop: SIGTERM, as a cluster manager or a spot notice sends it some seconds before the end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StoppedError(Exception):
    """The run was asked to stop and did; the same command goes on."""


class Stop:
    """A request to stop: nothing new is begun, and what is under way has `grace_seconds` to end or to checkpoint."""

    def __init__(self, grace_seconds: float = 0) -> None:
        self.grace_seconds = grace_seconds
        self._asked_at: float | None = None

    def ask(self) -> None:
        """Begin the grace period, unless it has begun."""
        if self._asked_at is None:
            self._asked_at = time.monotonic()

    @property
    def asked(self) -> bool:
        return self._asked_at is not None

    @property
    def over(self) -> bool:
        """Whether the grace period has passed."""
        return self._asked_at is not None and time.monotonic() - self._asked_at >= self.grace_seconds

    def check(self) -> None:
        """StoppedError when asked to stop."""
        if self.asked:
            raise StoppedError

    @contextmanager
    def on_sigterm(self) -> Iterator[None]:
        """While the block runs, SIGTERM asks; off the main thread, where Python has no signals, nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(signal_number: int, frame: FrameType | None) -> None:
            self.ask()

        before = signal.signal(signal.SIGTERM, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
