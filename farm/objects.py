"""Object storage, reduced to what a farm needs: whole objects, conditional writes, listings by prefix.

Everything the farm keeps (sources, edits, adapters, the queue, the registry) is an object under a key such as
`edits/charcoal/0f3a/manifest.json`. The contract is one that an S3 bucket can honour, so that a folder on a
laptop and a bucket under a cluster behave alike:

- an object is replaced whole: a reader sees the old bytes or the new ones, never a mixture, even when the
  writer is killed;
- `put_if_absent` and `replace_if_match` are the only means of agreement between processes;
- what was put survives the death of the process and of the machine;
- a store that is out of reach says so, and never looks like an empty one.

Keys are segments joined by `/`, at most 1024 characters in all. A segment has 1 to 255 letters, digits and `-_.=+,@`
of ASCII and does not begin with a dot; anything else is a ValueError. Everything a farm names is such: ids, digests and
fixed names, and what Ray calls its checkpoints. So no key means something else to a shell, an address or a file system,
and no two look alike. A key is never a folder of another key. What a listing finds under other names is not listed.
"""

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from farm.errors import IntegrityError

LONGEST_SECONDS = 7 * 24 * 3600
"""How long a presigned address can be good for: a week."""

LONGEST_KEY = 1024
_SEGMENT = re.compile(r"[A-Za-z0-9_=+,@-][A-Za-z0-9_.=+,@-]{0,254}")


class NotFoundError(KeyError):
    """No object has this key in this store."""

    def __init__(self, key: str, url: str) -> None:
        super().__init__(key, url)
        self.key = key
        self.url = url

    def __str__(self) -> str:
        return f"the store {self.url} holds no {self.key}"


class StoreUnreachableError(OSError):
    """The store is not there now: its file system is unmounted, its disk or the network is gone.

    A write that raises it may have happened all the same.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.url = url

    def __str__(self) -> str:
        return f"the store {self.url} does not answer"


class DamagedError(IntegrityError):
    """The store gives back other bytes than were put, however often it is asked; the sentence names the object."""

    @classmethod
    def of(cls, key: str, url: str) -> "DamagedError":
        return cls(f"The object {key} of the store {url} is damaged, its sha256 is another: delete it and run again.")


class TooLargeError(IntegrityError):
    """An object is larger than what is kept under such a key can be, and was not read."""

    @classmethod
    def of(cls, key: str, url: str, at_most: int) -> "TooLargeError":
        return cls(
            f"The object {key} of the store {url} has more than the {at_most:,} bytes that it can have: delete it and "
            "run again."
        )


class Reader(Protocol):
    """What is enough to look at a store: a store itself, or what one look at it found (`farm.glance`)."""

    @property
    def url(self) -> str:
        """The address that `open_store` opens again, here or on a worker."""

    def get(self, key: str, at_most: int | None = None) -> bytes:
        """The object's bytes; NotFoundError when there is none.

        at_most: TooLargeError when it has more bytes, which are then not read.
        """

    def list(self, prefix: str = "") -> Iterator[str]:
        """The keys that begin with the prefix, sorted. As in S3, `a/b` matches `a/bc` and `a/b/` does not."""


class Store(Reader, Protocol):
    """What every store does; the module's docstring says what it promises.

    Every method may raise StoreUnreachableError, and StoreError when the store is full or may not be used.
    """

    def __hash__(self) -> int:
        """Two handles of one place are equal and hash alike: a store can be the key of a cache."""

    @property
    def at_once(self) -> int:
        """How many calls are worth making side by side: one where a call is no trip over a network."""

    def get_with_etag(self, key: str, at_most: int | None = None) -> tuple[bytes, str]:
        """The bytes, as `get`, and the etag that `replace_if_match` wants."""

    def exists(self, key: str) -> bool:
        """Whether there is an object under the key."""

    def put(self, key: str, data: bytes) -> None:
        """Write the object, replacing any other under the key."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write the object unless there is one; of several racing writers exactly one gets True."""

    def replace_if_match(self, key: str, data: bytes, etag: str) -> bool:
        """Compare and swap: write only over the object with this etag; False when it changed or is gone."""

    def marks(self, prefix: str = "") -> dict[str, str]:
        """What `list` lists, in the same calls, and a mark of each object: another one once it holds other bytes.

        It is no etag for `replace_if_match`; and an object that gets back the bytes it had may get back its mark.
        """

    def delete(self, key: str) -> None:
        """Remove the object; removing what is not there is no error."""

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """`get(key)[start : start + length]`, without reading the rest; ValueError when either is negative."""

    def download(self, key: str, path: Path) -> None:
        """Write the object to a file, whole or not at all; NotFoundError when there is none.

        For objects that memory should not hold. Raises OSError, as the file system says it, when the file cannot be
        written.
        """

    def upload(self, key: str, path: Path) -> None:
        """Put what a file holds, as `put` does; OSError when the file cannot be read. It must not change meanwhile."""

    def presigned_url(self, key: str, seconds: int) -> str:
        """An address that anyone can read the object from, without credentials; NotFoundError when there is none.

        seconds: how long it is good for, at most LONGEST_SECONDS and at most as long as the credentials it was made
        with; ValueError otherwise. A folder's addresses are good for ever, on its machine.
        """


def where(store: Reader, key: str) -> str:
    """An object's or a folder's address, for people."""
    address, mark, options = store.url.partition("?")
    return f"{address}/{key}{mark}{options}"


def check_key(key: str) -> None:
    """ValueError unless the key follows the rules in the module's docstring."""
    if len(key) > LONGEST_KEY:
        raise ValueError(f"{key[:40]!a}… is not a key: it has more than {LONGEST_KEY} characters")
    for segment in key.split("/"):
        if not _SEGMENT.fullmatch(segment):
            raise ValueError(f"{key!a} is not a key: {segment!a} is empty, hidden, too long or not plain")


def is_key(key: str) -> bool:
    """Whether the key follows the rules in the module's docstring."""
    try:
        check_key(key)
    except ValueError:
        return False
    return True


def check_range(start: int, length: int) -> None:
    """ValueError unless both can be counted in bytes."""
    if start < 0 or length < 0:
        raise ValueError(f"no object has {length} bytes from byte {start} on")


def check_seconds(seconds: int) -> None:
    """ValueError unless a presigned address can be good for so long."""
    if not 1 <= seconds <= LONGEST_SECONDS:
        raise ValueError(f"an address is good for 1 to {LONGEST_SECONDS} seconds, not {seconds}")


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, moved to `path` when the body is done; gone, and `path` as it was, when the body raises."""
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
