"""What is published: one object a concept, `registry/<concept>.json`, changed only by compare-and-swap.

Versions only grow, and every release that was ever current stays in the entry's history, so that two
publishers at the same moment lose nothing and a rollback is the publication of an older adapter.
"""

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict

from farm.artifacts import dump, parse
from farm.store import NotFoundError, Store

_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


class Release(BaseModel):
    """One publication: the adapter's artifact path and digest, its base's digest, its metrics."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int
    adapter: str
    digest: str
    base: str
    metrics: dict[str, Any]
    published_at: str
    published_by: str


class Entry(Release):
    """The current release of a concept, and the earlier ones, oldest first."""

    concept: str
    history: list[Release]


@dataclass(frozen=True)
class Registry:
    """The published adapters of a store. ValueError for a concept whose id is no slug, such as `van-gogh`."""

    store: Store

    def get(self, concept: str) -> Entry | None:
        """What is published for the concept, None when nothing is."""
        found = self._read(concept)
        return found[0] if found else None

    def etag(self, concept: str) -> str | None:
        """Changes exactly when the concept's entry does; None when nothing is published."""
        found = self._read(concept)
        return found[1] if found else None

    def list(self) -> dict[str, Entry]:
        """Every published concept, sorted."""
        keys = self.store.list("registry/")
        concepts = [key.removeprefix("registry/").removesuffix(".json") for key in keys]
        return {concept: entry for concept in concepts if (entry := self.get(concept))}

    def publish(self, concept: str, *, adapter: str, digest: str, base: str, metrics: Mapping[str, Any]) -> Entry:
        """Make the adapter the concept's current one, with the next version; return the entry.

        Publishing the digest that is current already changes nothing. Losing a race means trying again on top
        of the winner's entry.
        """
        while True:
            found = self._read(concept)
            if found and found[0].digest == digest:
                return found[0]
            entry = Entry(
                concept=concept,
                version=found[0].version + 1 if found else 1,
                adapter=adapter,
                digest=digest,
                base=base,
                metrics=dict(metrics),
                published_at=datetime.now(UTC).isoformat(timespec="seconds"),
                published_by=socket.gethostname(),
                history=[*found[0].history, _release(found[0])] if found else [],
            )
            if found:
                won = self.store.replace_if_match(_path(concept), dump(entry), found[1])
            else:
                won = self.store.put_if_absent(_path(concept), dump(entry))
            if won:
                return entry

    def _read(self, concept: str) -> tuple[Entry, str] | None:
        key = _path(concept)
        try:
            data, etag = self.store.get_with_etag(key)
        except NotFoundError:
            return None
        return parse(Entry, data, store=self.store, key=key, fix="restore it, or delete it to publish anew,"), etag


def _path(concept: str) -> str:
    if not _SLUG.fullmatch(concept):
        raise ValueError(f"{concept!r} is not a concept's id: use lower-case words joined by single hyphens")
    return f"registry/{concept}.json"


def _release(entry: Entry) -> Release:
    return Release.model_validate(entry.model_dump(exclude={"concept", "history"}))
