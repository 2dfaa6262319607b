"""What is published, for people and programs that choose a concept."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from farm.artifacts import need_artifact
from farm.lineage import trace
from farm.registry import Release
from farm.serve.published import Published
from farm.stages.pictures import middle_column
from farm.wording import plain

PREVIEWS = 300
"""Small previews that are kept in memory; one has some ten kB, and a whole one three hundred."""


class Described(BaseModel):
    """What a catalogue says of a concept."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str
    prompt: str | None = None
    domain: str | None = None
    category: str | None = None


class Row(BaseModel):
    """A published concept. metrics: what its adapter was judged by. preview: path of a picture of its edits."""

    id: str = Field(examples=["charcoal"])
    prompt: str | None = Field(examples=["a charcoal drawing"])
    domain: str | None = Field(examples=["scenery"])
    category: str | None = Field(examples=["drawing"])
    version: int = Field(examples=[3])
    digest: str = Field(examples=["0e1f9f2bd1b94d7aa6b1f1b7d0c2a3e4"])
    metrics: dict[str, Any] = Field(examples=[{"l1": 0.061, "l1_untouched": 0.47}])
    preview: str = Field(examples=["/v1/concepts/charcoal/preview.webp"])


class Category(BaseModel):
    """A kind of concept, and how many of those that were searched for are of it."""

    id: str = Field(examples=["drawing"])
    count: int = Field(examples=[4])


class Rows(BaseModel):
    """A page of what was searched for. total: on all pages. categories: of all that `q` finds, whatever `category`."""

    concepts: list[Row]
    total: int = Field(examples=[1])
    page: int = Field(examples=[1])
    pages: int = Field(examples=[1])
    categories: list[Category]


class Version(BaseModel):
    """A release of a concept. restores: the version whose adapter a rollback published again."""

    version: int = Field(examples=[3])
    action: str = Field(examples=["published"])
    digest: str = Field(examples=["0e1f9f2bd1b94d7aa6b1f1b7d0c2a3e4"])
    base: str = Field(examples=["8a5c0e2f6f0c4c7f9d0c1e2b3a495867"])
    published_at: str = Field(examples=["2026-11-28T22:00:00+00:00"])
    restores: int | None = None


class Detail(Row):
    """A published concept with its history, oldest release first. lineage: path of what it was made from."""

    base: str = Field(examples=["8a5c0e2f6f0c4c7f9d0c1e2b3a495867"])
    history: list[Version]
    lineage: str = Field(examples=["/v1/concepts/charcoal/lineage"])


class Listing:
    """Answers about what is published, with prompt, domain and category where the catalogue has them."""

    def __init__(self, published: Published, catalogue: Iterable[Described]) -> None:
        self.published = published
        self._catalogue = {concept.id: concept for concept in catalogue}
        self._small = lru_cache(PREVIEWS)(self._read_small)

    def search(self, q: str = "", category: str | None = None, *, page: int = 1, per_page: int = 60) -> Rows:
        """The concepts, sorted by id, in whose id, prompt or category all words of `q` occur."""
        words = plain(q).split()
        rows = [self._row(concept) for concept in self.published.entries]
        found = [row for row in rows if all(word in _words(row) for word in words)]
        kinds = Counter(row["category"] for row in found if row["category"])
        if category is not None:
            found = [row for row in found if row["category"] == category]
        first = (page - 1) * per_page
        return Rows(
            concepts=[Row(**row) for row in found[first : first + per_page]],
            total=len(found),
            page=page,
            pages=max(1, -(-len(found) // per_page)),
            categories=[Category(id=name, count=count) for name, count in sorted(kinds.items())],
        )

    def detail(self, concept: str) -> Detail:
        """Raises UnknownConceptError."""
        self.published.release(concept)
        entry = self.published.entries[concept]
        history = [Version.model_validate(release.model_dump()) for release in entry.releases]
        return Detail(**self._row(concept), base=entry.base, history=history, lineage=f"/v1/concepts/{concept}/lineage")

    def lineage(self, concept: str) -> dict[str, Any]:
        """What `farm lineage --json` prints. Reads the store's manifests. Raises UnknownConceptError."""
        self.published.release(concept)
        return trace(self.published.store, concept).document()

    def preview(self, concept: str, *, small: bool = False) -> tuple[bytes | None, str]:
        """A WebP picture of the adapter's edits, None when it has none, and its etag. Raises UnknownConceptError.

        small: one column of it only, some ten kB, as a gallery of hundreds wants it.
        """
        release = self.published.release(concept)
        tag = f'"{release.digest}-small"' if small else f'"{release.digest}"'
        return (self._small if small else self._read_preview)(release.adapter), tag

    def _read_preview(self, adapter: str) -> bytes | None:
        artifact = need_artifact(self.published.store, adapter, self.published.keys)
        return artifact.read("preview.webp") if "preview.webp" in artifact.manifest.files else None

    def _read_small(self, adapter: str) -> bytes | None:
        sheet = self._read_preview(adapter)
        return sheet and middle_column(sheet)

    def _row(self, concept: str) -> dict[str, Any]:
        release: Release = self.published.entries[concept]
        described = self._catalogue.get(concept) or Described(id=concept)
        row = described.model_dump() | release.model_dump(include={"version", "digest", "metrics"})
        return {**row, "preview": f"/v1/concepts/{concept}/preview.webp"}


def etag(document: BaseModel) -> str:
    """Another one for every other content."""
    text = json.dumps(document.model_dump(), sort_keys=True)
    return f'"{hashlib.sha256(text.encode()).hexdigest()[:32]}"'


def _words(row: dict[str, Any]) -> str:
    return plain(" ".join(filter(None, (row["id"].replace("-", " "), row["id"], row["prompt"], row["category"]))))
