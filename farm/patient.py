"""A store that is waited for: a network that is gone for a minute should not end a run of days."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from farm.errors import StoreError
from farm.objects import NotFoundError, Store, StoreUnreachableError

Answer = TypeVar("Answer")

FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 10.0
"""Waits are drawn at random below a bound that doubles from the first to the longest."""

_log = logging.getLogger(__name__)


class _Outage:
    """Tells of an outage once, however many threads meet it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.began: float | None = None  # on the monotonic clock; None while the store answers

    def begin(self, error: StoreUnreachableError, patience: float) -> None:
        with self.lock:
            if self.began is None:
                self.began = time.monotonic()
                _log.warning("%s (%s): waiting for it for up to %.0f s", error, error.__cause__, patience)

    def end(self, url: str) -> None:
        with self.lock:
            if self.began is not None:
                _log.warning("the store %s answers again after %.0f s", url, time.monotonic() - self.began)
                self.began = None


@dataclass(frozen=True)
class PatientStore:
    """A store whose calls are repeated while it is away, each for up to `seconds`; then StoreError.

    A write may have happened although it failed. So a conditional one that is refused on a repeat counts as won when
    the object now holds exactly the bytes it wrote: make them unlike any other writer's where that matters.
    """

    store: Store
    seconds: float
    _outage: _Outage = field(default_factory=_Outage, init=False, repr=False, compare=False)

    def __reduce__(self) -> tuple[type[PatientStore], tuple[Store, float]]:
        return PatientStore, (self.store, self.seconds)  # an outage is told of in every process

    @property
    def url(self) -> str:
        return self.store.url

    @property
    def at_once(self) -> int:
        return self.store.at_once

    def get(self, key: str, at_most: int | None = None) -> bytes:
        return self._patiently(lambda: self.store.get(key, at_most))

    def get_with_etag(self, key: str, at_most: int | None = None) -> tuple[bytes, str]:
        return self._patiently(lambda: self.store.get_with_etag(key, at_most))

    def exists(self, key: str) -> bool:
        return self._patiently(lambda: self.store.exists(key))

    def put(self, key: str, data: bytes) -> None:
        self._patiently(lambda: self.store.put(key, data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self._patiently(
            lambda: self.store.put_if_absent(key, data),
            lambda: self.store.put_if_absent(key, data) or self._holds(key, data),
        )

    def replace_if_match(self, key: str, data: bytes, etag: str) -> bool:
        return self._patiently(
            lambda: self.store.replace_if_match(key, data, etag),
            lambda: self.store.replace_if_match(key, data, etag) or self._holds(key, data),
        )

    def list(self, prefix: str = "") -> Iterator[str]:
        return iter(self._patiently(lambda: [*self.store.list(prefix)]))

    def marks(self, prefix: str = "") -> dict[str, str]:
        return self._patiently(lambda: self.store.marks(prefix))

    def delete(self, key: str) -> None:
        self._patiently(lambda: self.store.delete(key))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        return self._patiently(lambda: self.store.get_range(key, start, length))

    def download(self, key: str, path: Path) -> None:
        self._patiently(lambda: self.store.download(key, path))

    def upload(self, key: str, path: Path) -> None:
        self._patiently(lambda: self.store.upload(key, path))

    def presigned_url(self, key: str, seconds: int) -> str:
        return self._patiently(lambda: self.store.presigned_url(key, seconds))

    def _holds(self, key: str, data: bytes) -> bool:
        try:
            return self.store.get(key) == data
        except NotFoundError:
            return False

    def _patiently(self, call: Callable[[], Answer], repeat: Callable[[], Answer] | None = None) -> Answer:
        """The call's answer; `repeat` is called instead from the second attempt on."""
        try:
            answer = call()
        except StoreUnreachableError as error:
            self._outage.begin(error, self.seconds)
            answer = self._waited(repeat or call)
        if self._outage.began is not None:
            self._outage.end(self.url)
        return answer

    def _waited(self, call: Callable[[], Answer]) -> Answer:
        started = time.monotonic()
        attempts = Retrying(
            retry=retry_if_exception_type(StoreUnreachableError),
            stop=stop_after_delay(self.seconds),
            wait=wait_random_exponential(multiplier=FIRST_WAIT_SECONDS, max=LONGEST_WAIT_SECONDS),
            reraise=True,
        )
        try:
            return attempts(call)
        except StoreUnreachableError as error:
            raise StoreError(
                f"The store {self.url} does not answer since {time.monotonic() - started:.0f} s: the same command goes "
                "on when it is back."
            ) from error
