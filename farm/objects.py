"""Object storage, reduced to what a farm needs: whole objects, conditional writes, listings by prefix.

Everything the farm keeps (sources, edits, adapters, the queue, the registry) is an object under a key such as
`edits/charcoal/0f3a/manifest.json`. The contract is one that an S3 bucket can honour, so that a folder on a
laptop and a bucket under a cluster behave alike:

- an object is replaced whole: a reader sees the old bytes or the new ones, never a mixture, even when the
  writer is killed;
- `put_if_absent` and `replace_if_match` are the only means of agreement between processes;
- what was put survives the death of the process and of the machine;
- a store that is out of reach says so, and never looks like an empty one.

Keys are segments joined by `/`. A segment is neither empty nor hidden (a leading dot), at most 255 bytes of
UTF-8, and free of backslashes and control characters; anything else is a ValueError. A key is never a folder
of another key.
"""

import re
from collections.abc import Iterator
from typing import Protocol

_SEGMENT = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*")


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


class Store(Protocol):
    """What every store does; the module's docstring says what it promises.

    Every method may raise StoreUnreachableError, and StoreError when the store is full or may not be used.
    """

    def __hash__(self) -> int:
        """Two handles of one place are equal and hash alike: a store can be the key of a cache."""

    @property
    def url(self) -> str:
        """The address that `open_store` opens again, here or on a worker."""

    def get(self, key: str) -> bytes:
        """The object's bytes; NotFoundError when there is none."""

    def get_with_etag(self, key: str) -> tuple[bytes, str]:
        """The bytes and the etag that `replace_if_match` wants; NotFoundError when there is none."""

    def exists(self, key: str) -> bool:
        """Whether there is an object under the key."""

    def put(self, key: str, data: bytes) -> None:
        """Write the object, replacing any other under the key."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write the object unless there is one; of several racing writers exactly one gets True."""

    def replace_if_match(self, key: str, data: bytes, etag: str) -> bool:
        """Compare and swap: write only over the object with this etag; False when it changed or is gone."""

    def list(self, prefix: str = "") -> Iterator[str]:
        """The keys that begin with the prefix, sorted. As in S3, `a/b` matches `a/bc` and `a/b/` does not."""

    def delete(self, key: str) -> None:
        """Remove the object; removing what is not there is no error."""


def check_key(key: str) -> None:
    """ValueError unless the key follows the rules in the module's docstring."""
    for segment in key.split("/"):
        if not _SEGMENT.fullmatch(segment) or len(segment.encode()) > 255:
            raise ValueError(f"{key!r} is not a key: {segment!r} is empty, hidden, too long or not plain")
