"""Many calls of a store at once: what takes long is the way there and back."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from threading import Condition
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

THREADS = 16
MEMORY_BYTES = 256 << 20
"""What whole objects may take that are read side by side, to be hashed or copied."""


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], threads: int = THREADS) -> Iterator[Result]:
    """The results in order. What has not begun is not done when one raises, or when nobody wants more of them."""
    if threads == 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)


def beside(function: Callable[[Item], Result], items: Sequence[Item], at_once: int) -> list[Result]:
    """The results in order, of a few short calls: in threads that are there already, and in the caller's own.

    What no thread has begun the caller does itself, so that calls within calls cannot wait for each other. When one
    raises, what has not begun is not done.
    """
    if at_once == 1 or len(items) < 2:
        return [function(item) for item in items]
    futures = [_helpers().submit(function, item) for item in items]
    try:
        pairs = zip(items, futures, strict=True)
        return [function(item) if future.cancel() else future.result() for item, future in pairs]
    finally:
        wait([future for future in futures if not future.cancel()])


@cache
def _helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix="beside")


os.register_at_fork(after_in_child=_helpers.cache_clear)


class Allowance:
    """Bytes that threads may have in memory together: who wants more than is left waits."""

    def __init__(self, limit: int) -> None:
        self._limit, self._taken, self._change = limit, 0, Condition()

    @contextmanager
    def take(self, size: int) -> Iterator[None]:
        with self._change:
            self._change.wait_for(lambda: not self._taken or self._taken + size <= self._limit)
            self._taken += size
        try:
            yield
        finally:
            with self._change:
                self._taken -= size
                self._change.notify_all()
