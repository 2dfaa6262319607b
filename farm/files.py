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
