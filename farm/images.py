"""Image files from outside, made into plain RGB: used for photographs of a folder and for uploads alike."""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from typing import TYPE_CHECKING, Literal

import numpy as np
import PIL.Image
from PIL import ImageCms, ImageOps

from farm.errors import UserError

if TYPE_CHECKING:
    from e2gan.pairs import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 50_000_000
TOO_MANY = f"{MAX_PIXELS // 1_000_000} million pixels"

_WARNINGS = threading.Lock()  # warnings.catch_warnings changes the process, so one decode at a time may do it


class ImageError(UserError):
    """An image file that cannot be used, told in one sentence."""


def decode(data: bytes, *, what: str) -> PIL.Image.Image:
    """Decode a JPEG, PNG, WebP, BMP, TIFF or GIF file (its first frame) to upright 8-bit RGB in sRGB.

    EXIF orientation is applied, an embedded colour profile converted (a broken one ignored), transparency
    laid on white, and 16-bit greys scaled to 8. `what` names the file in errors.

    Raises:
        ImageError: the data are damaged, not such an image, or more than 50 million pixels.
    """
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
        except PIL.UnidentifiedImageError as error:
            raise ImageError(f"{what}: not a JPEG, PNG, WebP, BMP, TIFF or GIF image.") from error
        except PIL.Image.DecompressionBombError as error:
            raise ImageError(f"{what}: more than {TOO_MANY}; scale it down.") from error
        except Exception as error:  # decoders raise anything on hostile data
            raise ImageError(f"{what}: the image file is damaged ({_brief(error)}).") from error
        if image.width * image.height > MAX_PIXELS:
            raise ImageError(f"{what}: {image.width} x {image.height} is more than {TOO_MANY}; scale it down.")
        try:
            image.load()
            return _to_srgb(image)
        except Exception as error:  # as above
            raise ImageError(f"{what}: the image file is damaged ({_brief(error)}).") from error


def encode(image: Image | PIL.Image.Image, format: Literal["png", "jpeg", "webp"], *, quality: int = 90) -> bytes:
    """Encode an RGB image; `quality` 1 to 100 is for JPEG and WebP. The same image gives the same bytes."""
    picture = PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    if format == "png":
        picture.save(buffer, format="PNG")
    else:
        picture.save(buffer, format=format.upper(), quality=quality)
    return buffer.getvalue()


def _to_srgb(image: PIL.Image.Image) -> PIL.Image.Image:
    profile = image.info.get("icc_profile")
    with contextlib.suppress(Exception):  # damaged EXIF: the image stays as it lies
        image = ImageOps.exif_transpose(image)
    colours, alpha = _eight_bits(image)
    rgb = _through_profile(colours, profile) if profile else colours.convert("RGB")
    if alpha is not None:
        white = PIL.Image.new("RGB", rgb.size, "white")
        white.paste(rgb, mask=alpha)
        rgb = white
    rgb.info.clear()
    return rgb


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


def _brief(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:120]
