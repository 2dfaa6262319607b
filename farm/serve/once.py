"""Single flight: one call for many who ask."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Once:
    """One call for all who want the same thing at the same time: they get its result, or its exception."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[Any, Future[Any]] = {}

    def __call__(self, key: Any, call: Callable[[], Any]) -> Any:
        with self._lock:
            others = self._running.get(key)
            if others is None:
                mine = self._running[key] = Future()
        if others is not None:
            return others.result()
        try:
            result = call()
        except BaseException as error:
            mine.set_exception(error)
            raise
        else:
            mine.set_result(result)
            return result
        finally:
            with self._lock:
                del self._running[key]
