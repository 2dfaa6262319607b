"""Photos on their way to the network and back: decoded, brought to its size, and given theirs again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image

from e2gan.sides import working_size
from farm.images import ImageError, ImageFormatError, decode_layers, encode, on_white

if TYPE_CHECKING:  # what decodes is a process of its own, without PyTorch and FastAPI
    from e2gan.pairs import Image
    from farm.serve.uploads import Format

LONGEST_ANSWER = 4096
"""Longest side of an edited photo, in pixels."""

MAGIC = {"JPEG": b"\xff\xd8\xff", "PNG": b"\x89PNG\r\n\x1a\n", "WEBP": b"RIFF"}
"""How files of the formats begin that may be uploaded."""

_RESAMPLE = PIL.Image.Resampling.LANCZOS


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A photo to edit.

    photo: uint8 `[h, w, 3]`, sides as the network takes them. size: width and height of the answer.
    alpha: uint8 `[height, width]` of the answer, None where all of the photo is opaque.
    """

    photo: Image
    size: tuple[int, int]
    alpha: Image | None


def prepare(data: bytes, *, max_side: int, size: int | None, max_pixels: int) -> Prepared:
    """Decode an upload for the network.

    max_side: longest side that the network works at. size: longest side of the answer; the upload's own when None,
    but LONGEST_ANSWER at most. max_pixels: largest upload.

    Raises:
        ImageError: as `farm.images.decode_layers`; what kind of file it is, its first bytes say.
    """
    what = "the upload"
    kind = next((name for name, magic in MAGIC.items() if data.startswith(magic)), None)
    if kind is None or (kind == "WEBP" and data[8:12] != b"WEBP"):
        raise ImageFormatError(f"{what}: not a JPEG, PNG or WebP image.")
    try:
        layers = decode_layers(data, what=what, formats=(kind,), max_pixels=max_pixels, enough=2 * max_side)
    except ImageFormatError as error:
        raise ImageError(f"{what}: the image file is damaged (its header).") from error
    longest = size or min(max(layers.size), LONGEST_ANSWER)
    factor = longest / max(layers.size)
    width, height = (max(1, round(side * factor)) for side in layers.size)
    worked = layers.colours.resize(working_size(*layers.size, longest_side=max_side), _RESAMPLE)
    alpha = None if layers.alpha is None else np.asarray(layers.alpha.resize((width, height), _RESAMPLE))
    return Prepared(photo=np.asarray(worked), size=(width, height), alpha=alpha)


def finish(edited: Image, prepared: Prepared, format: Format, quality: int) -> bytes:
    """The edited photo, uint8 `[h, w, 3]`, as a file of the answer's size, with the alpha that the upload had.

    A JPEG has no alpha: what was transparent is white.
    """
    picture = PIL.Image.fromarray(edited)
    if picture.size != prepared.size:
        picture = picture.resize(prepared.size, _RESAMPLE)
    if prepared.alpha is not None:
        alpha = PIL.Image.fromarray(prepared.alpha)
        if format == "jpeg":
            picture = on_white(picture, alpha)
        else:
            picture.putalpha(alpha)
    return encode(picture, format, quality=quality, compress=1)
