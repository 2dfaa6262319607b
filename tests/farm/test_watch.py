"""Waiting for what runs in a thread of its own."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from farm.cluster import watch
from farm.cluster.watch import in_thread
from farm.stop import Stop


class Late(Future[Any]):
    """Is done just after the wait for it is given up."""

    def result(self, timeout: float | None = None) -> Any:
        done = super().result()
        if timeout is not None:
            raise TimeoutError
        return done


def test_a_call_that_ends_as_the_wait_does_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "Future", Late)
    assert in_thread(lambda: 3, Stop()) == 3


def test_a_call_may_time_out_itself() -> None:
    def call() -> None:
        raise TimeoutError("of its own")

    with pytest.raises(TimeoutError, match="of its own"):
        in_thread(call, Stop())
