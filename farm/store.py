"""Object storage, reduced to what a farm needs: whole objects, conditional writes, listings by prefix.

Everything the farm keeps (sources, edits, adapters, the queue, the registry) is an object under a key such as
`edits/charcoal/0f3a/manifest.json`. The contract is one that an S3 bucket can honour, so that a folder on a
laptop and a bucket under a cluster behave alike:

- an object is replaced whole: a reader sees the old bytes or the new ones, never a mixture, even when the
  writer is killed;
- `put_if_absent` and `replace_if_match` are the only means of agreement between processes;
- what was put survives the death of the process and of the machine.

Keys are segments joined by `/`. A segment is neither empty nor hidden (a leading dot), at most 255 bytes of
UTF-8, and free of backslashes and control characters; anything else is a ValueError. A key is never a folder
of another key.
"""

import errno
import fcntl
import hashlib
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from farm.errors import UserError

_SEGMENT = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*")
_LEFTOVER_SECONDS = 24 * 3600.0  # no writer takes a day to prepare one object: what is older was left by a killed one


class NotFoundError(KeyError):
    """No object has this key in this store."""

    def __init__(self, key: str, url: str) -> None:
        super().__init__(key, url)
        self.key = key
        self.url = url

    def __str__(self) -> str:
        return f"the store {self.url} holds no {self.key}"


class Store(Protocol):
    """What every store does; the module's docstring says what it promises."""

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


def open_store(url: str) -> Store:
    """Open `file:///absolute/path`, or a folder's path (relative to the working directory, `~` expanded).

    The folder is made when it is missing. Raises UserError for any other scheme and for a folder that cannot
    be written.
    """
    scheme, separator, _ = url.partition("://")
    if not separator:
        return LocalStore(_start() / Path(url).expanduser())
    if scheme == "s3":
        raise UserError(f"The store {url} is in S3, which is not built yet: name a local folder instead.")
    address = urlsplit(url)
    if scheme != "file" or address.netloc or address.path in ("", "/"):
        raise UserError(f"The store {url} cannot be opened: write file:///absolute/path or a folder's path.")
    return LocalStore(Path(unquote(address.path)))


def _start() -> Path:
    """Where a relative path starts: here, but at ~/e2gan-farm in a Ray job, whose own folder Ray deletes."""
    here = Path.cwd()
    return Path.home() / "e2gan-farm" if "working_dir_files" in here.parts else here


def check_key(key: str) -> None:
    """ValueError unless the key follows the rules in the module's docstring."""
    for segment in key.split("/"):
        if not _SEGMENT.fullmatch(segment) or len(segment.encode()) > 255:
            raise ValueError(f"{key!r} is not a key: {segment!r} is empty, hidden, too long or not plain")


@dataclass(frozen=True)
class LocalStore:
    """A folder as a store, shared by any number of threads and processes of one machine.

    Writers prepare an object in `.store/tmp` and move it into place: `rename` for a put, and for a
    put-if-absent `link`, which refuses to overwrite. Whatever replaces or removes an object does so under one
    `flock`, which the kernel drops with its holder; hence nothing changes between a swap and the comparison
    before it. Data is written and synced outside the lock. Instances pickle. Raises UserError when the folder
    cannot be used.
    """

    root: Path

    def __post_init__(self) -> None:
        with suppress(FileNotFoundError):  # another process may sweep the same leftovers
            for leftover in self._temporaries.glob("*"):
                if time.time() - leftover.stat().st_mtime > _LEFTOVER_SECONDS:
                    leftover.unlink()
        try:
            self._temporaries.mkdir(parents=True, exist_ok=True)
            self._lock.touch()
        except OSError as error:
            raise UserError(
                f"The store {self.root} cannot be used ({error.strerror}): name a folder that can be written."
            ) from error

    @property
    def url(self) -> str:
        return self.root.as_uri()

    def path(self, key: str) -> Path:
        """Where the object lies, for tools that need a file. Only to read: writes go through the store."""
        check_key(key)
        return self.root / key

    def get(self, key: str) -> bytes:
        try:
            return self.path(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise NotFoundError(key, self.url) from None

    def get_with_etag(self, key: str) -> tuple[bytes, str]:
        data = self.get(key)
        return data, hashlib.sha256(data).hexdigest()

    def exists(self, key: str) -> bool:
        return self.path(key).is_file()

    def put(self, key: str, data: bytes) -> None:
        path = self.path(key)
        with self._prepared(path, data) as temporary, self._locked():
            temporary.replace(path)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        path = self.path(key)
        if path.is_file():
            return False
        with self._prepared(path, data) as temporary:
            try:
                path.hardlink_to(temporary)
            except FileExistsError:
                if path.is_dir():
                    raise
                return False
        return True

    def replace_if_match(self, key: str, data: bytes, etag: str) -> bool:
        path = self.path(key)
        if not path.is_file():
            return False
        with self._prepared(path, data) as temporary, self._locked():
            if not path.is_file() or self.get_with_etag(key)[1] != etag:
                return False
            temporary.replace(path)
        return True

    def list(self, prefix: str = "") -> Iterator[str]:
        if prefix:
            check_key(prefix.removesuffix("/"))
        keys = []
        for folder, folders, files in os.walk(self.root / prefix.rpartition("/")[0]):
            folders[:] = [name for name in folders if not name.startswith(".")]
            relative = Path(folder).relative_to(self.root)
            keys += [(relative / name).as_posix() for name in files if not name.startswith(".")]
        return iter(sorted(key for key in keys if key.startswith(prefix)))

    def delete(self, key: str) -> None:
        path = self.path(key)
        with self._locked(), suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            path.unlink()

    @property
    def _temporaries(self) -> Path:
        return self.root / ".store" / "tmp"

    @property
    def _lock(self) -> Path:
        return self.root / ".store" / "lock"

    @contextmanager
    def _prepared(self, path: Path, data: bytes) -> Iterator[Path]:
        """A synced file with the data, for the body to move to `path`; gone afterwards, whatever happens."""
        temporary = self._temporaries / f"{os.getpid()}-{uuid.uuid4().hex}"
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _sync_folder(path.parent)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise ValueError(f"{path} would be both an object and a folder of objects") from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"The store {self.root} is full: free space on its disk.") from error
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise UserError(
                    f"The store {self.root} cannot be written ({error.strerror}): check who owns it."
                ) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Exclude every other process and thread that would replace or remove an object."""
        with self._lock.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)  # closing alone would leave it to a child forked meanwhile


def _sync_folder(folder: Path) -> None:
    """Make a rename or a link in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
