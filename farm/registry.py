"""What is published: one object a concept, `registry/<concept>.json`, changed only by compare-and-swap.

Every change, be it a publication, a rollback or a withdrawal, is a release with the next version, and all earlier ones
stay in the concept's record. So versions only grow, two publishers at the same moment lose nothing, a rollback is the
publication of an older adapter, and what is unpublished keeps its history and its count.
"""

import getpass
import os
import socket
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from farm.artifacts import DOCUMENT_BYTES, MANIFEST, Manifest, dump, find, parse, verify
from farm.errors import IntegrityError, UserError
from farm.releases import SLUG, Entry, Release
from farm.signing import NOBODY, Keys
from farm.store import NotFoundError, Reader, Store, where
from farm.threads import in_threads

__all__ = ["Entry", "Registry", "Release"]


@dataclass(frozen=True)
class Registry:
    """The published adapters of a store. ValueError for a concept whose id is no slug, such as `van-gogh`.

    What changes a record takes an `id`: whoever repeats a call whose answer was lost gives the same one again, and
    gets the release that the first call made, if it made one.

    keys: with public ones, a record that none of them signed is an IntegrityError wherever it is read, and what is
    published is signed, or else a UserError (see `farm.signing`).
    """

    store: Store
    keys: Keys = NOBODY

    def get(self, concept: str) -> Entry | None:
        """What is published for the concept, None when nothing is."""
        record = self.record(concept)
        return record if record and record.published else None

    def record(self, concept: str) -> Entry | None:
        """All that ever happened to the concept, also when it is not published now; None when nothing ever did."""
        return read_record(self.store, concept, self.keys)

    def etag(self, concept: str) -> str | None:
        """Changes exactly when the concept's record does; None when there is none."""
        found = self._read(concept)
        return found[1] if found else None

    def list(self) -> dict[str, Entry]:
        """Every published concept, sorted."""
        return {concept: record for concept, record in self.records().items() if record.published}

    def records(self) -> dict[str, Entry]:
        """Every concept that ever was published, sorted."""
        return read_records(self.store, self.keys, self.store.at_once)

    def concepts(self) -> tuple[str, ...]:
        """The ids of all records, sorted, without reading any. What else lies in the folder is none."""
        return recorded(self.store)

    def marks(self) -> dict[str, str]:
        """What `concepts` lists, each with a mark that changes when its record does."""
        found = self.store.marks("registry/")
        named = ((key.removeprefix("registry/").removesuffix(".json"), mark) for key, mark in found.items())
        return {name: mark for name, mark in named if SLUG.fullmatch(name)}

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
        manifest: Manifest | None = None,
    ) -> Entry:
        """Make the adapter the concept's current one, with the next version; return the record.

        manifest: the adapter's, where the caller has just read or written it.

        Publishing the digest that is current already changes nothing. Losing a race means trying again on top
        of the winner's record.

        Raises:
            UserError: the adapter or its base is not in the store, or lacks files.
        """

        def decide(record: Entry | None) -> dict[str, Any] | None:
            if record and record.published and record.digest == digest:
                return None
            for path, known in ((adapter, manifest), (f"bases/{base}", None)):
                if problem := _incomplete(self.store, path, known):
                    raise UserError(f"{concept} is not published: {problem}")
                self._sign(path)
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
                for problem in verify(self.store, path, self.keys):
                    raise UserError(f"{concept} is not rolled back to version {target.version}: {problem}")
                self._sign(path)
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
        self.keys.need_private()
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
            entry = self._sealed(entry)
            if found:
                won = self.store.replace_if_match(_path(concept), dump(entry), found[1])
            else:
                won = self.store.put_if_absent(_path(concept), dump(entry))
            if won:
                return entry

    def sign(self, concept: str) -> bool:
        """Sign the concept's record and every adapter and base that it names and that is there; whether the record was
        not signed with this key before.

        For what was published before signatures were in use, or with another key. It counts as signed from now on as it
        is: verify the store first.

        Raises:
            IntegrityError: something was changed after it was signed.
            UserError: there is no private key.
        """
        self.keys.need_private()
        trusting = Registry(self.store)
        while found := trusting._read(concept):
            record, etag = found
            if record.signature:
                self.keys.check_record(self.store, _path(concept), record.signed, record.signature, record.version)
            for path in sorted({p for r in record.releases for p in (r.adapter, f"bases/{r.base}")}):
                if find(self.store, path):
                    self._sign(path)
            sealed = self._sealed(record)
            if sealed == record:
                return False
            if self.store.replace_if_match(_path(concept), dump(sealed), etag):
                return True
        return False

    def parse(self, concept: str, data: bytes) -> Entry:
        """The concept's record as the store holds it. IntegrityError when it is damaged, another's, or not signed."""
        return _parsed(self.store, concept, data, self.keys)

    def _sealed(self, record: Entry) -> Entry:
        return record.model_copy(update={"signature": self.keys.signature(_path(record.concept), record.signed)})

    def _sign(self, path: str) -> None:
        if self.keys.private:
            key = f"{path}/{MANIFEST}"
            self.keys.sign(self.store, key, self.store.get(key, DOCUMENT_BYTES))

    def _read(self, concept: str) -> tuple[Entry, str] | None:
        try:
            data, etag = self.store.get_with_etag(_path(concept), DOCUMENT_BYTES)
        except NotFoundError:
            return None
        return self.parse(concept, data), etag


def read_record(store: Reader, concept: str, keys: Keys = NOBODY) -> Entry | None:
    """A concept's record; None when there is none. IntegrityError when it is damaged, another's, or not signed."""
    try:
        data = store.get(_path(concept), DOCUMENT_BYTES)
    except NotFoundError:
        return None
    return _parsed(store, concept, data, keys)


def recorded(store: Reader) -> tuple[str, ...]:
    """The ids of all records, sorted, without reading any. What else lies in the folder is none."""
    names = (key.removeprefix("registry/").removesuffix(".json") for key in store.list("registry/"))
    return tuple(name for name in names if SLUG.fullmatch(name))


def read_records(store: Reader, keys: Keys = NOBODY, at_once: int = 1) -> dict[str, Entry]:
    """All records, sorted by concept; so many are read side by side."""
    concepts = recorded(store)
    found = zip(concepts, in_threads(lambda concept: read_record(store, concept, keys), concepts, at_once), strict=True)
    return {concept: record for concept, record in found if record}


def _parsed(store: Reader, concept: str, data: bytes, keys: Keys) -> Entry:
    key = _path(concept)
    record = parse(Entry, data, store=store, key=key, fix="restore it, or delete it to publish anew,")
    if record.concept != concept:
        raise IntegrityError(f"{where(store, key)} is the record of {record.concept}: restore its own.")
    keys.check_record(store, key, record.signed, record.signature, record.version)
    return record


def _incomplete(store: Store, path: str, manifest: Manifest | None) -> str | None:
    """Why the artifact cannot be used, as far as its manifest, unless it is given, and a listing tell."""
    there = set(store.list(f"{path}/"))
    try:
        manifest = manifest or find(store, path)
    except IntegrityError as error:
        return str(error)
    if manifest is None or f"{path}/{MANIFEST}" not in there:
        return f"{store.url} holds no artifact {path}; run `farm run` to make it."
    missing = {f"{path}/{name}" for name in manifest.files} - there
    if missing:
        return f"{where(store, min(missing))} is missing: delete the folder {path} and run again."
    return None


def _path(concept: str) -> str:
    if not SLUG.fullmatch(concept):
        raise ValueError(f"{concept!r} is not a concept's id: use lower-case words joined by single hyphens")
    return f"registry/{concept}.json"


def _who() -> str:
    """This user on this host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number that no user has
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
