"""What a store's registry publishes, followed in memory: one listing every few seconds, however many concepts."""

from __future__ import annotations

import difflib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType

from farm.errors import UserError
from farm.registry import Entry, Registry, Release
from farm.signing import NOBODY, Keys
from farm.store import Store
from farm.threads import in_threads

_log = logging.getLogger(__name__)

NEAR = 3
"""Names told of an unknown concept."""


class UnknownConceptError(UserError, KeyError):
    """Nothing is published under this name, or not in this version; `near` holds published names that resemble it."""

    def __init__(self, concept: str, near: tuple[str, ...] = (), version: int | None = None) -> None:
        super().__init__(concept, near, version)
        self.concept = concept
        self.near = near
        self.version = version

    def __str__(self) -> str:
        if self.version is not None:
            return f"{self.concept} was never published as version {self.version}."
        hint = f"; did you mean {' or '.join(self.near)}?" if self.near else "."
        return f"no concept {self.concept!r} is published{hint}"


class Published:
    """The published concepts of a store.

    keys: whose signatures count. seconds: how old what is known may be, once `follow` is called.

    A concept whose record is damaged, or that none of the keys signed, is logged, and stays as it was before.
    """

    def __init__(self, store: Store, keys: Keys = NOBODY, *, seconds: float = 2.0) -> None:
        self.store = store
        self.keys = keys
        self._seconds = seconds
        self._refreshing = threading.Lock()
        self._marks: dict[str, str] = {}
        self._entries: Mapping[str, Entry] = MappingProxyType({})
        self._listeners: list[Callable[[], None]] = []
        self._seen_at = time.monotonic()
        self._ended = threading.Event()
        self.refresh()

    @property
    def entries(self) -> Mapping[str, Entry]:
        """By id, sorted; another mapping after a change."""
        return self._entries

    @property
    def age(self) -> float:
        """Seconds since the registry was last seen: large when the store does not answer."""
        return time.monotonic() - self._seen_at

    def release(self, concept: str, version: int | None = None) -> Release:
        """What is published for the concept, or an earlier release of it.

        Raises:
            UnknownConceptError: there is none, or the concept is out of service.
        """
        entry = self._entries.get(concept)
        if entry is None:
            raise UnknownConceptError(concept, self.near(concept))
        if version is None or version == entry.version:
            return entry
        for release in entry.history:
            if release.version == version and release.action != "unpublished":
                return release
        raise UnknownConceptError(concept, version=version)

    def near(self, concept: str) -> tuple[str, ...]:
        """Published names that resemble this one."""
        return tuple(difflib.get_close_matches(concept, self._entries, n=NEAR))

    def refresh(self) -> None:
        """Look at the registry now. Raises what the store raises."""
        with self._refreshing:
            marks = Registry(self.store).marks()
            self._seen_at = time.monotonic()
            entries = {concept: entry for concept, entry in self._entries.items() if concept in marks}
            changed = [concept for concept, mark in marks.items() if self._marks.get(concept) != mark]
            for concept, entry in zip(changed, in_threads(self._read, changed), strict=True):
                if isinstance(entry, Exception):
                    _log.warning("%s is not read anew: %s", concept, entry)
                    del marks[concept]  # so that it is tried again
                elif entry is None:
                    entries.pop(concept, None)
                else:
                    entries[concept] = entry
            self._marks = marks
            if entries != self._entries:
                self._entries = MappingProxyType(dict(sorted(entries.items())))
        for told in self._listeners:
            told()

    def listen(self, told: Callable[[], None]) -> None:
        """Have a function called after every look."""
        self._listeners.append(told)

    def follow(self) -> None:
        """Keep looking, in a thread that ends with the process or at `close`."""
        threading.Thread(target=self._follow, name="published", daemon=True).start()

    def close(self) -> None:
        self._ended.set()

    def _follow(self) -> None:
        while not self._ended.wait(self._seconds):
            try:
                self.refresh()
            except Exception as error:  # a store that is away comes back
                _log.warning("the registry is as it was %.0f s ago: %s", self.age, error)

    def _read(self, concept: str) -> Entry | Exception | None:
        try:
            return Registry(self.store, self.keys).get(concept)
        except (UserError, OSError) as error:
            return error
