"""Many small documents of a store, looked at together: found by a few listings, read side by side.

Asked for one after another, the manifests and records of 280 concepts are a thousand trips to the store and back. Here
they are as many calls, but hardly more trips than there are pages in the listings, and the next look reads only what
has changed since: also the first look of another process, where one before it has kept what it read.
"""

from __future__ import annotations

import json
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile

from farm.artifacts import DOCUMENT_BYTES
from farm.objects import DamagedError, NotFoundError, Reader, Store, TooLargeError
from farm.threads import in_threads

KEPT_BYTES = 1 << 28  # unpacked
_ANY = "surrogateescape"  # bytes that are no UTF-8 come back as they were


@dataclass(frozen=True)
class Glance:
    """A store as one look found it, to read only.

    It knows all keys below its prefixes, and the bytes of some. Whatever else it is asked for, it asks the store for.
    """

    store: Reader
    prefixes: tuple[str, ...]
    keys: tuple[str, ...]
    documents: dict[str, bytes]

    @property
    def url(self) -> str:
        return self.store.url

    def get(self, key: str, at_most: int | None = None) -> bytes:
        if key in self.documents:
            return self.documents[key]
        if self._known(key) and not self._listed(key):
            raise NotFoundError(key, self.url)
        return self.store.get(key, at_most)

    def list(self, prefix: str = "") -> Iterator[str]:
        if not self._known(prefix):
            return self.store.list(prefix)
        below = self.keys[bisect_left(self.keys, prefix) :]
        return takewhile(lambda key: key.startswith(prefix), below)

    def _known(self, key: str) -> bool:
        return key.startswith(self.prefixes)

    def _listed(self, key: str) -> bool:
        place = bisect_left(self.keys, key)
        return place < len(self.keys) and self.keys[place] == key


class Documents:
    """Looks at a store again and again, and reads what it has not read already; for one thread at a time.

    Only for documents that never get back bytes they had before, as manifests and the registry's records.

    kept: the key of the object in which `keep` leaves what was read for other processes. It is believed where the marks
    are those of the listing, and as much as the documents themselves: whoever may write it may write them. news: how
    many documents were read from the store, not from there.
    """

    def __init__(self, store: Store, kept: str | None = None) -> None:
        self._store = store
        self._kept = kept
        self._read = _load(store, kept) if kept else {}  # marks and bytes by key
        self.news = 0

    def keep(self) -> None:
        """Leave what was read for others."""
        assert self._kept is not None
        plain = {key: [mark, data.decode(errors=_ANY)] for key, (mark, data) in sorted(self._read.items())}
        self._store.put(self._kept, zlib.compress(json.dumps(plain).encode()))

    def look(self, *prefixes: str, wanted: Callable[[str], bool]) -> Glance:
        """What lies below the prefixes, and the bytes of those keys that are `wanted`.

        The prefixes are listed one after another. Whoever names what is made last first never sees a thing without
        what it was made from.
        """
        marks: dict[str, str] = {}
        for prefix in prefixes:
            marks |= self._store.marks(prefix)
        keys = sorted(marks)
        chosen = [key for key in keys if wanted(key)]
        stale = [key for key in chosen if self._read.get(key, ("",))[0] != marks[key]]
        known = {key: self._read[key] for key in set(chosen).difference(stale)}
        self.news += len(stale)
        gone = set()  # deleted since they were listed

        def read(key: str) -> None:
            try:
                known[key] = marks[key], self._store.get(key, DOCUMENT_BYTES)
            except NotFoundError:
                gone.add(key)
            except TooLargeError:  # who asks for it is told
                pass

        for _ in in_threads(read, stale, self._store.at_once):
            pass
        elsewhere = {key: read for key, read in self._read.items() if not key.startswith(prefixes)}
        self._read = elsewhere | known
        documents = {key: data for key, (_, data) in known.items()}
        return Glance(self._store, prefixes, tuple(key for key in keys if key not in gone), documents)


def kept_at(farm: str) -> str:
    """The key under which a farm's runs keep what they have read."""
    return f"glance/{farm}.json.zlib"


def _load(store: Store, kept: str) -> dict[str, tuple[str, bytes]]:
    """What was kept; nothing where there is none, or it is damaged."""
    unpack = zlib.decompressobj()
    try:
        plain = json.loads(unpack.decompress(store.get(kept, DOCUMENT_BYTES), KEPT_BYTES))
        return {key: (mark, data.encode(errors=_ANY)) for key, (mark, data) in plain.items()}
    except (NotFoundError, TooLargeError, DamagedError, zlib.error, ValueError, AttributeError, TypeError):
        return {}
