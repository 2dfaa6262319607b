"""Files of the user's, outside the store."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from farm.errors import UserError


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place.") from error


def make_folder(path: Path) -> None:
    """A folder and those above it, if they are not there.

    Raises:
        UserError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made a folder ({error.strerror}); choose another place.") from error
