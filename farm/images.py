"""Image files from outside, made into plain RGB: used for photographs of a folder and for uploads alike."""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import PIL.Image
from PIL import ImageCms

from farm.errors import UserError, brief

if TYPE_CHECKING:
    from e2gan.pairs import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 50_000_000

_WARNINGS = threading.Lock()  # warnings.catch_warnings changes the process, so one decode at a time may do it


class ImageError(UserError):
    """An image file that cannot be used, told in one sentence."""


class ImageFormatError(ImageError):
    """A file of no format that is read here."""


class ImageSizeError(ImageError):
    """An image of too many pixels."""


@dataclass(frozen=True, kw_only=True)
class Layers:
    """A decoded image, upright.

    colours: 8-bit RGB in sRGB, white where nothing of it is seen. alpha: L of the same size, None where all is opaque.
    size: width and height in the file, upright; the layers may be smaller.
    """

    colours: PIL.Image.Image
    alpha: PIL.Image.Image | None
    size: tuple[int, int]


def decode(data: bytes, *, what: str) -> PIL.Image.Image:
    """Decode a JPEG, PNG, WebP, BMP, TIFF or GIF file (its first frame) to upright 8-bit RGB in sRGB.

    EXIF orientation is applied, an embedded colour profile converted (a broken one ignored), transparency
    laid on white, and 16-bit greys scaled to 8. `what` names the file in errors.

    Raises:
        ImageError: the data are damaged, not such an image, or more than 50 million pixels.
    """
    layers = decode_layers(data, what=what)
    return layers.colours if layers.alpha is None else on_white(layers.colours, layers.alpha)


def decode_layers(
    data: bytes,
    *,
    what: str,
    formats: tuple[str, ...] = FORMATS,
    max_pixels: int = MAX_PIXELS,
    enough: int | None = None,
) -> Layers:
    """The same as `decode`, its transparency apart.

    formats: those of FORMATS that may be. enough: a longest side that will do; a JPEG far larger is decoded at a half,
    a quarter or an eighth of its size, which takes less time and memory.

    Raises:
        ImageFormatError: the data are of none of the formats.
        ImageSizeError: more than `max_pixels`, told before any is decoded.
        ImageError: the data are damaged.
    """
    too_many = f"{max_pixels / 1e6:g} million pixels"
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = PIL.Image.open(io.BytesIO(data), formats=formats)
        except PIL.UnidentifiedImageError as error:
            *names, last = (_NAMES.get(format, format) for format in formats)
            raise ImageFormatError(f"{what}: not a {', '.join(names)} or {last} image.") from error
        except PIL.Image.DecompressionBombError as error:
            raise ImageSizeError(f"{what}: more than {too_many}; scale it down.") from error
        except Exception as error:  # decoders raise anything on hostile data
            raise ImageError(f"{what}: the image file is damaged ({brief(error, 120)}).") from error
        width, height = image.size
        if width * height > max_pixels:
            raise ImageSizeError(f"{what}: {width} x {height} is more than {too_many}; scale it down.")
        try:
            if enough:
                image.draft(None, (enough, enough))  # None keeps the mode
            image.load()
            turn = _orientation(image)
            if turn in _SIDEWAYS:
                width, height = height, width
            colours, alpha = _to_srgb(image if turn is None else image.transpose(turn))
        except Exception as error:  # as above
            raise ImageError(f"{what}: the image file is damaged ({brief(error, 120)}).") from error
        return Layers(colours=colours, alpha=alpha, size=(width, height))


_NAMES = {"WEBP": "WebP"}


def on_white(colours: PIL.Image.Image, alpha: PIL.Image.Image) -> PIL.Image.Image:
    """What is seen of RGB with this alpha (L, of the same size) on white."""
    white = PIL.Image.new("RGB", colours.size, "white")
    white.paste(colours, mask=alpha)
    return white


def encode(
    image: Image | PIL.Image.Image, format: Literal["png", "jpeg", "webp"], *, quality: int = 90, compress: int = 6
) -> bytes:
    """Encode an RGB or RGBA image (no JPEG of the latter). The same image gives the same bytes.

    quality: 1 to 100, for JPEG and WebP. compress: 0 to 9, how hard to try for a small PNG.
    """
    picture = PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    if format == "png":
        picture.save(buffer, format="PNG", compress_level=compress)
    else:
        picture.save(buffer, format=format.upper(), quality=quality)
    return buffer.getvalue()


def _to_srgb(image: PIL.Image.Image) -> tuple[PIL.Image.Image, PIL.Image.Image | None]:
    """RGB in sRGB, and alpha where not all is opaque."""
    profile = image.info.get("icc_profile")
    colours, alpha = _eight_bits(image)
    rgb = _through_profile(colours, profile) if profile else colours.convert("RGB")
    if alpha is not None:
        if alpha.getextrema()[0] == 255:
            alpha = None
        else:  # what is not seen at all may hold anything
            rgb = on_white(rgb, alpha.point(lambda a: 255 if a else 0))
    rgb.info.clear()
    return rgb, alpha


def _orientation(image: PIL.Image.Image) -> PIL.Image.Transpose | None:
    """What sets the image upright, by its EXIF."""
    with contextlib.suppress(Exception):  # no EXIF or a damaged one: the image stays as it lies
        return _TURNS.get(image.getexif()[_ORIENTATION])
    return None


_ORIENTATION = 0x0112
_TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
_SIDEWAYS = {_TURNS[number] for number in (5, 6, 7, 8)}


def _eight_bits(image: PIL.Image.Image) -> tuple[PIL.Image.Image, PIL.Image.Image | None]:
    """Colours as L, RGB, CMYK or another 8-bit mode Pillow converts, and alpha as L where there is one."""
    if image.mode.startswith("I"):  # 16-bit greys, in 16 or 32 bits
        greys = np.asarray(image).astype(np.float64) / 257
        return PIL.Image.fromarray(np.rint(greys.clip(0, 255)).astype(np.uint8)), None
    if image.mode == "F":
        floats = np.nan_to_num(np.asarray(image), posinf=1, neginf=0)
        scale = 255 if floats.max() <= 1 else 1
        return PIL.Image.fromarray(np.rint((floats * scale).clip(0, 255)).astype(np.uint8)), None
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        grey = image.mode in ("LA", "La", "L", "1")  # a grey image's profile is one for greys
        return rgba.convert("RGB").convert("L" if grey else "RGB"), rgba.getchannel("A")
    if image.mode in ("1", "P"):
        return image.convert("L" if image.mode == "1" else "RGB"), None
    return image, None


def _through_profile(colours: PIL.Image.Image, profile: bytes) -> PIL.Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(colours, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return colours.convert("RGB")
    assert converted is not None
    return converted
