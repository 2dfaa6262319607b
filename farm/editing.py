"""Editing photos with a farm's published adapters in this process, without a server."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
from PIL import ImageOps

from e2gan.sides import working_size
from farm.config import FarmConfig
from farm.errors import UserError
from farm.images import decode, on_white
from farm.registry import Registry
from farm.signing import open_keys
from farm.store import Store, open_store

if TYPE_CHECKING:
    from e2gan.pairs import Image
    from farm.serve.bank import Bank
    from farm.serve.published import Published

Photo = PIL.Image.Image | bytes | str | os.PathLike[str] | np.ndarray[Any, Any]
"""A Pillow image, a file's bytes or its path, or uint8 `[h, w, 3]`."""


@dataclass(frozen=True, kw_only=True)
class Edited:
    """An edited photo, and the adapter that edited it: its concept, published version and digest."""

    image: PIL.Image.Image
    concept: str
    version: int
    digest: str


class PhotoEditor:
    """Edits with what a farm has published; adapters stay in memory, and what is published meanwhile is seen.

    Raises:
        UserError: the store or the keys cannot be used.
    """

    def __init__(self, config: FarmConfig, store: Store | None = None) -> None:
        self.config = config
        self.store = store or open_store(config.store)
        self.keys = open_keys(None, config.signing.public_keys)

    def edit(
        self,
        photo: Photo,
        concept: str,
        *,
        version: int | None = None,
        strength: float = 1.0,
        side: int | None = None,
        size: int | None = None,
    ) -> Edited:
        """The photo edited with a published concept.

        version: a published one, the current one when None. strength: 0 to 1, a factor on the adapter. side: longest
        side that the network works at, `serve.max_side` when None. size: longest side of the answer, what the network
        worked at when None.

        Raises:
            UserError: the photo cannot be read, or the concept or version is not published or is damaged.
        """
        opened = open_photo(photo)
        self.config.concept(concept)
        Registry(self.store, self.keys).record(concept)  # what is wrong with it is told here; a server passes it over
        published, bank = self._bank
        published.refresh()
        bank.renew()
        adapter = bank.get(concept, version, strength)
        worked = working_size(*opened.size, longest_side=side or self.config.serve.max_side)
        edited: Image = adapter.edit(np.asarray(opened.resize(worked, PIL.Image.Resampling.LANCZOS)))
        image = PIL.Image.fromarray(edited)
        if size is not None:
            factor = size / max(opened.size)
            width, height = (max(1, round(length * factor)) for length in opened.size)
            image = image.resize((width, height), PIL.Image.Resampling.LANCZOS)
        return Edited(image=image, concept=concept, version=adapter.version, digest=adapter.digest)

    @cached_property
    def _bank(self) -> tuple[Published, Bank]:
        from farm.serve.bank import Bank
        from farm.serve.engines import Merging
        from farm.serve.published import Published

        published = Published(self.store, self.keys)
        return published, Bank(published, Merging, byte_budget=self.config.serve.cache_mb * 1_000_000)


def open_photo(photo: Photo) -> PIL.Image.Image:
    """An upright RGB image.

    Raises:
        UserError: the file cannot be read or is no image.
    """
    if isinstance(photo, str | os.PathLike):
        path = Path(photo).expanduser()
        try:
            return decode(path.read_bytes(), what=str(path))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a photo.") from error
    if isinstance(photo, bytes):
        return decode(photo, what="the photo")
    image = PIL.Image.fromarray(photo) if isinstance(photo, np.ndarray) else ImageOps.exif_transpose(photo)
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        return on_white(layered.convert("RGB"), layered.getchannel("A"))
    return image.convert("RGB")


def as_bytes(image: PIL.Image.Image) -> bytes:
    """A PNG of it, quickly made."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
