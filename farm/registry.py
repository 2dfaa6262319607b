"""What is published: one object a concept, `registry/<concept>.json`, changed only by compare-and-swap.

Every change, be it a publication, a rollback or a withdrawal, is a release with the next version, and all earlier ones
stay in the concept's record. So versions only grow, two publishers at the same moment lose nothing, a rollback is the
publication of an older adapter, and what is unpublished keeps its history and its count.
"""

import getpass
import os
import re
import socket
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from farm.artifacts import MANIFEST, dump, find, parse, verify
from farm.errors import IntegrityError, UserError
from farm.store import NotFoundError, Store, where
from farm.threads import in_threads

_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


class Release(BaseModel):
    """One change: the adapter's artifact path and digest, its base's digest, its metrics.

    An `unpublished` release names the adapter that was taken out of service. restores: the version whose adapter a
    rollback published again. forced: the judgement that a publication passed over, None where there was none. id: of
    the publication, drawn at random, so that a publisher whose answer was lost finds its own release; empty in
    releases of old.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int
    action: Literal["published", "rolled-back", "unpublished"] = "published"
    adapter: str
    digest: str
    base: str
    metrics: dict[str, Any]
    restores: int | None = None
    forced: str | None = None
    published_at: str
    published_by: str
    id: str = ""


class Entry(Release):
    """A concept's record: its latest release, and the earlier ones, oldest first."""

    concept: str
    history: list[Release]

    @property
    def published(self) -> bool:
        """Whether the concept is published, and this its current release."""
        return self.action != "unpublished"

    @property
    def releases(self) -> list[Release]:
        """All of them, oldest first."""
        return [*self.history, Release.model_validate(self.model_dump(exclude={"concept", "history"}))]

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

    def as_of(self, release_id: str) -> "Entry | None":
        """The record when this release was made; None when it has none of that id."""
        releases = self.releases
        for place, release in enumerate(releases):
            if release.id == release_id:
                return Entry(**release.model_dump(), concept=self.concept, history=releases[:place])
        return None


@dataclass(frozen=True)
class Registry:
    """The published adapters of a store. ValueError for a concept whose id is no slug, such as `van-gogh`.

    What changes a record takes an `id`: whoever repeats a call whose answer was lost gives the same one again, and
    gets the release that the first call made, if it made one.
    """

    store: Store

    def get(self, concept: str) -> Entry | None:
        """What is published for the concept, None when nothing is."""
        record = self.record(concept)
        return record if record and record.published else None

    def record(self, concept: str) -> Entry | None:
        """All that ever happened to the concept, also when it is not published now; None when nothing ever did."""
        found = self._read(concept)
        return found[0] if found else None

    def etag(self, concept: str) -> str | None:
        """Changes exactly when the concept's record does; None when there is none."""
        found = self._read(concept)
        return found[1] if found else None

    def list(self) -> dict[str, Entry]:
        """Every published concept, sorted."""
        return {concept: record for concept, record in self.records().items() if record.published}

    def records(self) -> dict[str, Entry]:
        """Every concept that ever was published, sorted."""
        concepts = self.concepts()
        found = zip(concepts, in_threads(self.record, concepts), strict=True)
        return {concept: record for concept, record in found if record}

    def concepts(self) -> tuple[str, ...]:
        """The ids of all records, sorted, without reading any. What else lies in the folder is none."""
        return tuple(sorted(self.stamps()))

    def stamps(self) -> dict[str, str]:
        """What `concepts` lists, each with a word that is another one after every change of its record."""
        found = self.store.stamps("registry/")
        named = ((key.removeprefix("registry/").removesuffix(".json"), stamp) for key, stamp in found.items())
        return {name: stamp for name, stamp in named if _SLUG.fullmatch(name)}

    def publish(
        self,
        concept: str,
        *,
        adapter: str,
        digest: str,
        base: str,
        metrics: Mapping[str, Any],
        forced: str | None = None,
        id: str | None = None,
    ) -> Entry:
        """Make the adapter the concept's current one, with the next version; return the record.

        Publishing the digest that is current already changes nothing. Losing a race means trying again on top
        of the winner's record.

        Raises:
            UserError: the adapter or its base is not in the store, or lacks files.
        """

        def decide(record: Entry | None) -> dict[str, Any] | None:
            if record and record.published and record.digest == digest:
                return None
            for path in (adapter, f"bases/{base}"):
                if problem := _incomplete(self.store, path):
                    raise UserError(f"{concept} is not published: {problem}")
            chosen = {"adapter": adapter, "digest": digest, "base": base, "metrics": dict(metrics)}
            return {**chosen, "action": "published", "forced": forced}

        entry = self._change(concept, id, decide)
        if not self.store.exists(f"{adapter}/{MANIFEST}"):
            raise UserError(
                f"{concept}: `farm gc` deleted {adapter} while it was published: run `farm run` to mend it."
            )
        return entry

    def rollback(self, concept: str, to: int | None = None, id: str | None = None) -> Entry:
        """Publish the adapter of version `to` again, with the next version; return the record.

        Without `to` it is the latest release of another adapter than the current one; of a concept that is
        unpublished, the latest release. An adapter that is current already changes nothing.

        Raises:
            UserError: there is no such version, or its adapter or base is damaged: every file is read.
        """
        target = self.target(concept, to)

        def decide(record: Entry | None) -> dict[str, Any] | None:
            assert record is not None
            if record.published and record.digest == target.digest:
                return None
            for path in (target.adapter, f"bases/{target.base}"):
                for problem in verify(self.store, path):
                    raise UserError(f"{concept} is not rolled back to version {target.version}: {problem}")
            chosen = target.model_dump(include={"adapter", "digest", "base", "metrics", "forced"})
            return {**chosen, "action": "rolled-back", "restores": target.version}

        return self._change(concept, id, decide)

    def target(self, concept: str, to: int | None = None) -> Release:
        """The release that `rollback` would publish the adapter of. UserError when there is none."""
        record = self.record(concept)
        if record is None:
            raise UserError(f"{concept} was never published: there is nothing to roll back to.")
        releases = [release for release in record.releases if release.action != "unpublished"]
        if to is None:
            others = [release for release in releases if not record.published or release.digest != record.digest]
            if not others:
                raise UserError(
                    f"{concept} never had another adapter than its current one: there is nothing before it."
                )
            return others[-1]
        for release in releases:
            if release.version == to:
                return release
        versions = ", ".join(str(release.version) for release in releases)
        raise UserError(f"{concept} was never published as version {to}: choose one of {versions}.")

    def unpublish(self, concept: str, id: str | None = None) -> Entry:
        """Take the concept out of service; return the record. One that is out of service already stays as it is.

        Raises:
            UserError: it was never published.
        """

        def decide(record: Entry | None) -> dict[str, Any] | None:
            if record is None:
                raise UserError(f"{concept} was never published: there is nothing to unpublish.")
            if not record.published:
                return None
            chosen = record.model_dump(include={"adapter", "digest", "base", "metrics", "forced"})
            return {**chosen, "action": "unpublished"}

        return self._change(concept, id, decide)

    def _change(self, concept: str, id: str | None, decide: Callable[[Entry | None], dict[str, Any] | None]) -> Entry:
        """Append the release that `decide` makes of the record, until nobody is faster; None means: leave it."""
        id = id or uuid.uuid4().hex
        while True:
            found = self._read(concept)
            record = found[0] if found else None
            if record and (mine := record.as_of(id)):  # written by a call whose answer was lost
                return mine
            release = decide(record)
            if release is None:
                assert record is not None
                return record
            entry = Entry(
                concept=concept,
                version=record.version + 1 if record else 1,
                published_at=datetime.now(UTC).isoformat(timespec="seconds"),
                published_by=_who(),
                id=id,
                history=record.releases if record else [],
                **release,
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


def _incomplete(store: Store, path: str) -> str | None:
    """Why the artifact cannot be used, as far as its manifest and a listing tell."""
    try:
        manifest = find(store, path)
    except IntegrityError as error:
        return str(error)
    if manifest is None:
        return f"{store.url} holds no artifact {path}; run `farm run` to make it."
    missing = {f"{path}/{name}" for name in manifest.files}.difference(store.list(f"{path}/"))
    if missing:
        return f"{where(store, min(missing))} is missing: delete the folder {path} and run again."
    return None


def _path(concept: str) -> str:
    if not _SLUG.fullmatch(concept):
        raise ValueError(f"{concept!r} is not a concept's id: use lower-case words joined by single hyphens")
    return f"registry/{concept}.json"


def _who() -> str:
    """This user on this host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number that no user has
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
