"""Opening a store by its address."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from farm.errors import UserError
from farm.layout import check_layout
from farm.local import LocalStore
from farm.objects import NotFoundError, Reader, Store, StoreUnreachableError, check_key, where

__all__ = [
    "LocalStore",
    "NotFoundError",
    "Reader",
    "Store",
    "StoreUnreachableError",
    "check_key",
    "open_store",
    "where",
]


def open_store(url: str, patience_seconds: float = 0, *, any_layout: bool = False) -> Store:
    """Open `file:///absolute/path`, a folder's path (relative to the working directory, `~` expanded) or `s3://`.

    `s3://bucket/prefix?endpoint_url=http://host:port&region=name`: all but the bucket can be left out, and
    `farm.s3` says more. A folder is made when it is missing, a bucket is not. patience_seconds: how long to wait for
    a store that goes away once it is open. Raises UserError for any other scheme, for a folder that cannot be
    written, for a bucket that cannot be listed, and for a store of another version's layout, unless any_layout.
    """
    store = _opened(url)
    if patience_seconds:
        from farm.patient import PatientStore

        store = PatientStore(store, patience_seconds)
    if not any_layout:
        check_layout(store)
    return store


def _opened(url: str) -> Store:
    scheme, separator, _ = url.partition("://")
    if not separator:
        return LocalStore(_start() / Path(url).expanduser())
    if scheme == "s3":
        from farm.s3 import open_s3

        return open_s3(url)
    address = urlsplit(url)
    if "@" in url and (scheme != "file" or address.netloc):  # what is before it may be secret, and is not repeated
        raise UserError(
            "The address of a store holds no user and no password: write file:///absolute/path, a folder's path or "
            "s3://bucket/prefix."
        )
    if scheme != "file" or address.netloc or address.path in ("", "/"):
        raise UserError(
            f"The store {url} cannot be opened: write file:///absolute/path, a folder's path or s3://bucket/prefix."
        )
    return LocalStore(Path(unquote(address.path)))


def _start() -> Path:
    """Where a relative path starts: here, but at ~/e2gan-farm in a Ray job, whose own folder Ray deletes."""
    here = Path.cwd()
    return Path.home() / "e2gan-farm" if "working_dir_files" in here.parts else here
