"""The store that is a folder; `farm.objects` says what a store is."""

import errno
import fcntl
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from farm.errors import StoreError, UserError
from farm.objects import (
    NotFoundError,
    StoreUnreachableError,
    TooLargeError,
    check_key,
    check_range,
    check_seconds,
    is_key,
    whole_file,
)

_LEFTOVER_SECONDS = 24 * 3600.0  # no writer takes a day to prepare one object: what is older was left by a killed one
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_PIECE_BYTES = 1 << 20  # of a file that is copied
_TICK_SECONDS = 2.0  # within which a file system's clock may stand still, and another file get the same number and time
_LOOKS = 2  # for what is missing: the store may have come back between the first look and the proof that it is there
# ENOENT: a missing object is looked for above; anything else that is missing was the store's.
_AWAY = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.ENOENT}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


@dataclass(frozen=True)
class LocalStore:
    """A folder as a store, shared by any number of threads and processes of one machine.

    Writers prepare an object in `.store/tmp` and move it into place: `rename` for a put, and for a
    put-if-absent `link`, which refuses to overwrite. Whatever replaces or removes an object does so under one
    `flock`, which the kernel drops with its holder; hence nothing changes between a swap and the comparison
    before it. Data is written and synced outside the lock.

    Only opening makes the folder, and in it `.store/lock` with a name drawn at random. An open handle, and one
    unpickled elsewhere, takes a folder without that name for the bare mount point of a store that is away, also when
    another process has begun a new store there. Raises UserError when the folder cannot be used.
    """

    root: Path
    _name: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        with suppress(FileNotFoundError):  # another process may sweep the same leftovers
            for leftover in self._temporaries.glob("*"):
                if time.time() - leftover.stat().st_mtime > _LEFTOVER_SECONDS:
                    leftover.unlink()
        try:
            self._temporaries.mkdir(parents=True, exist_ok=True)
            if not self._lock.exists():
                new = self._temporaries / uuid.uuid4().hex
                new.write_bytes(new.name.encode())
                with suppress(FileExistsError):  # another process was faster
                    self._lock.hardlink_to(new)
                new.unlink()
            self._lock.touch()
            name = self._lock.read_bytes()
        except OSError as error:
            raise UserError(
                f"The store {self.root} cannot be used ({error.strerror}): name a folder that can be written."
            ) from error
        object.__setattr__(self, "_name", name)

    @property
    def url(self) -> str:
        return self.root.as_uri()

    @property
    def at_once(self) -> int:
        return 1

    def path(self, key: str) -> Path:
        """Where the object lies, for tools that need a file. Only to read: writes go through the store."""
        check_key(key)
        return self.root / key

    def get(self, key: str, at_most: int | None = None) -> bytes:
        with self._open(key) as file, self._answering():
            if at_most is not None and os.fstat(file.fileno()).st_size > at_most:
                raise TooLargeError.of(key, self.url, at_most)
            return file.read()

    def get_with_etag(self, key: str, at_most: int | None = None) -> tuple[bytes, str]:
        data = self.get(key, at_most)
        return data, hashlib.sha256(data).hexdigest()

    def exists(self, key: str) -> bool:
        path = self.path(key)
        with self._answering():
            for _ in range(_LOOKS):
                if path.is_file():
                    return True
                self._check()
        return False

    def put(self, key: str, data: bytes) -> None:
        self._put(key, BytesIO(data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        path = self.path(key)
        with self._answering():
            if path.is_file():
                return False
            with self._prepared(path, BytesIO(data)) as temporary:
                self._check()
                try:
                    path.hardlink_to(temporary)
                except FileExistsError:
                    if path.is_dir():
                        raise
                    return False
        return True

    def replace_if_match(self, key: str, data: bytes, etag: str) -> bool:
        path = self.path(key)
        if not self.exists(key):
            return False
        with self._answering(), self._prepared(path, BytesIO(data)) as temporary, self._locked():
            if not self.exists(key) or self.get_with_etag(key)[1] != etag:
                return False
            temporary.replace(path)
        return True

    def list(self, prefix: str = "") -> Iterator[str]:
        return iter(self._below(prefix))

    def marks(self, prefix: str = "") -> dict[str, str]:
        marks = {key: self._mark(key) for key in self._below(prefix)}
        return {key: mark for key, mark in marks.items() if mark}

    def _mark(self, key: str) -> str | None:
        with self._answering():
            for _ in range(_LOOKS):
                with suppress(*_MISSING):
                    found = (self.root / key).stat()
                    old = time.time() - found.st_mtime > _TICK_SECONDS
                    return f"{found.st_ino}-{found.st_mtime_ns}-{found.st_size}" if old else uuid.uuid4().hex
                self._check()
        return None  # deleted since it was listed

    def _below(self, prefix: str) -> tuple[str, ...]:
        if prefix:
            check_key(prefix.removesuffix("/"))
        with self._answering():
            for _ in range(_LOOKS):
                keys, gaps = _walk(self.root, prefix.rpartition("/")[0])
                if keys and not gaps:
                    break
                self._check()
        return tuple(sorted(key for key in keys if key.startswith(prefix) and is_key(key)))

    def delete(self, key: str) -> None:
        path = self.path(key)
        with self._answering(), self._locked():
            for _ in range(_LOOKS):
                with suppress(*_MISSING):
                    path.unlink()
                    break
                self._check()

    def get_range(self, key: str, start: int, length: int) -> bytes:
        check_range(start, length)
        with self._open(key) as file, self._answering():
            file.seek(start)
            return file.read(length)

    def download(self, key: str, path: Path) -> None:
        with self._open(key) as file, whole_file(path) as copy:
            while piece := self._piece(file):
                copy.write(piece)

    def upload(self, key: str, path: Path) -> None:
        with path.open("rb") as file:
            self._put(key, file)

    def presigned_url(self, key: str, seconds: int) -> str:
        check_seconds(seconds)
        if not self.exists(key):
            raise NotFoundError(key, self.url)
        return self.path(key).as_uri()

    @property
    def _temporaries(self) -> Path:
        return self.root / ".store" / "tmp"

    @property
    def _lock(self) -> Path:
        return self.root / ".store" / "lock"

    def _check(self) -> None:
        """StoreUnreachableError unless the store is there: what is missing may be missing because all of it is."""
        try:
            if self._lock.read_bytes() != self._name:
                raise StoreUnreachableError(self.url)
        except OSError as error:
            raise StoreUnreachableError(self.url) from error

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Say what an error means: that the store is away, full or not to be used."""
        try:
            yield
        except OSError as error:
            if error.errno in _AWAY:
                raise StoreUnreachableError(self.url) from error
            self._check()
            if error.errno in _FULL:
                raise StoreError(
                    f"The store {self.root} is full ({error.strerror}): free space on its disk or raise its limits."
                ) from error
            if error.errno in _FORBIDDEN:
                raise StoreError(
                    f"The store {self.root} cannot be used ({error.strerror}): check who owns it."
                ) from error
            raise

    def _open(self, key: str) -> BinaryIO:
        path = self.path(key)
        with self._answering():
            for _ in range(_LOOKS):
                with suppress(*_MISSING):
                    return path.open("rb")
                self._check()
        raise NotFoundError(key, self.url)

    def _piece(self, file: BinaryIO) -> bytes:
        with self._answering():
            return file.read(_PIECE_BYTES)

    def _put(self, key: str, data: BinaryIO) -> None:
        path = self.path(key)
        with self._answering(), self._prepared(path, data) as temporary, self._locked():
            temporary.replace(path)

    @contextmanager
    def _prepared(self, path: Path, data: BinaryIO) -> Iterator[Path]:
        """A synced file with the data, for the body to move to `path`; gone afterwards, whatever happens."""
        temporary = self._temporaries / f"{os.getpid()}-{uuid.uuid4().hex}"
        try:
            with temporary.open("xb") as file:
                shutil.copyfileobj(data, file, _PIECE_BYTES)
                file.flush()
                os.fsync(file.fileno())
            self._make_folder(path.parent)
            yield temporary
            _sync_folder(path.parent)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise ValueError(f"{path} would be both an object and a folder of objects") from error
        finally:
            temporary.unlink(missing_ok=True)

    def _make_folder(self, folder: Path) -> None:
        """Make a folder of the store, but never the store's own: that would be a new one where the old one was."""
        if folder != self.root and not folder.is_dir():
            self._make_folder(folder.parent)
            folder.mkdir(exist_ok=True)
            _sync_folder(folder.parent)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Exclude every other process and thread that would replace or remove an object."""
        with self._lock.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                if file.read() != self._name:
                    raise StoreUnreachableError(self.url)
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)  # closing alone would leave it to a child forked meanwhile


def _walk(root: Path, below: str) -> tuple[list[str], bool]:
    """All keys in a folder, and whether folders were missing when they were looked into."""
    keys: list[str] = []
    errors: list[OSError] = []
    for folder, folders, files in os.walk(root / below, onerror=errors.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = Path(folder).relative_to(root)
        keys += [(relative / name).as_posix() for name in files if not name.startswith(".")]
    for error in errors:
        if not isinstance(error, _MISSING):
            raise error
    return keys, bool(errors)


def _sync_folder(folder: Path) -> None:
    """Make a rename or a link in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
