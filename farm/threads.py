"""Many calls of a store at once: what takes long is the way there and back."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
