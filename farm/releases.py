"""What a concept's record in the registry says: every change of what is served, and which is the latest."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from farm.artifacts import Digest, canonical_json

SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
"""A concept's id."""


class Release(BaseModel):
    """One change: the adapter's artifact path and digest, its base's digest, its metrics.

    An `unpublished` release names the adapter that was taken out of service. restores: the version whose adapter a
    rollback published again. forced: the judgement that a publication passed over, None where there was none. id: of
    the publication, drawn at random, so that a publisher whose answer was lost finds its own release; empty in
    releases of old.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = Field(ge=1)
    action: Literal["published", "rolled-back", "unpublished"] = "published"
    adapter: str
    digest: Digest
    base: Digest
    metrics: dict[str, Any]
    restores: int | None = None
    forced: str | None = None
    published_at: str
    published_by: str
    id: str = ""


class Entry(Release):
    """A concept's record: its latest release, and the earlier ones, oldest first.

    All of them name adapters of the concept. signature: of all that is not a field's default, empty when nobody signed.
    """

    concept: str = Field(pattern=f"^{SLUG.pattern}$")
    history: list[Release]
    signature: str = ""

    @model_validator(mode="after")
    def _own_adapters(self) -> Self:
        releases: list[Release] = [*self.history, self]
        for release in releases:
            own = f"adapters/{self.concept}/{release.digest}"
            if release.adapter != own:
                raise ValueError(f"version {release.version} names {release.adapter[:80]!a}, not {own}")
        return self

    @property
    def signed(self) -> bytes:
        """What the signature is over."""
        return canonical_json(self.model_dump(exclude={"signature"}, exclude_defaults=True)).encode()

    @property
    def published(self) -> bool:
        """Whether the concept is published, and this its current release."""
        return self.action != "unpublished"

    @property
    def releases(self) -> list[Release]:
        """All of them, oldest first."""
        latest = self.model_dump(exclude={"concept", "history", "signature"})
        return [*self.history, Release.model_validate(latest)]

    @property
    def withdrawn(self) -> set[str]:
        """Digests of the adapters that people took out of service, by rollback or not, since one was last published.

        A run does not publish these by itself: `farm publish` does.
        """
        taken = set()
        releases = self.releases
        for before, release in zip(releases[-2::-1], releases[:0:-1], strict=True):
            if release.action == "published":
                break
            taken.add(before.digest)
        return taken - ({self.digest} if self.published else set())

    def as_of(self, release_id: str) -> Entry | None:
        """The record when this release was made; None when it has none of that id."""
        releases = self.releases
        for place, release in enumerate(releases):
            if release.id == release_id:
                return Entry(**release.model_dump(), concept=self.concept, history=releases[:place])
        return None
