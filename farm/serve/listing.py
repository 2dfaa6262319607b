"""What a store's registry publishes, for people and programs that choose a concept."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict

from farm.errors import UserError
from farm.glance import Documents
from farm.registry import Entry, read_record, recorded
from farm.store import Reader, Store

_log = logging.getLogger(__name__)


def published(store: Reader, concepts: Iterable[str]) -> dict[str, Entry]:
    """Those of the concepts that are published. One whose record is damaged is logged and left out."""
    found = {}
    for concept in concepts:
        try:
            entry = read_record(store, concept)
        except (UserError, ValueError) as error:
            _log.warning("%s is not listed: %s", concept, error)
        else:
            if entry is not None and entry.published:
                found[concept] = entry
    return found


class Described(BaseModel):
    """What a catalogue says of a concept."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str
    prompt: str | None = None
    domain: str | None = None


class Listing:
    """The rows of `GET /v1/concepts`: what is published, with prompt and domain where the catalogue has them.

    max_age: seconds after which the registry is listed again, and what has changed in it is read.

    A concept whose record is damaged is logged and left out.
    """

    def __init__(self, store: Store, catalogue: Iterable[Described], *, max_age: float = 5.0) -> None:
        self._documents = Documents(store)
        self._catalogue = {concept.id: concept for concept in catalogue}
        self._max_age = max_age
        self._lock = threading.Lock()
        self._listed: list[dict[str, Any]] = []
        self._list_at = 0.0

    def __call__(self) -> list[dict[str, Any]]:
        """Sorted by id: `id`, `prompt`, `domain` (None where unknown), `version`, `digest`, `metrics`."""
        with self._lock:
            if time.monotonic() >= self._list_at:
                registry = self._documents.look("registry/", wanted=lambda key: True)
                entries = published(registry, recorded(registry))
                self._listed = [self._row(concept, entry) for concept, entry in entries.items()]
                self._list_at = time.monotonic() + self._max_age
            return self._listed

    def _row(self, concept: str, entry: Entry) -> dict[str, Any]:
        described = self._catalogue.get(concept) or Described(id=concept)
        return described.model_dump() | entry.model_dump(include={"version", "digest", "metrics"})
