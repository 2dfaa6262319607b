from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageCms

from e2gan.pairs import Image
from farm.errors import UserError
from farm.images import ImageError, decode, encode


def save(image: PIL.Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> Image:
    image = decode(data, what="it")
    assert image.mode == "RGB"
    return np.asarray(image)


def noise(height: int = 6, width: int = 9, channels: int = 3) -> Image:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def raw_png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG written by hand, for what Pillow cannot write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_rgb_comes_through_unchanged(format: str) -> None:
    assert np.array_equal(pixels(save(PIL.Image.fromarray(noise()), format)), noise())


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "GIF"])
def test_lossy_formats_come_near(format: str) -> None:
    smooth = np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)
    assert np.abs(pixels(save(PIL.Image.fromarray(smooth), format)).astype(int) - smooth).mean() < 6


def test_greys_are_repeated() -> None:
    grey = noise()[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2)
    assert np.array_equal(pixels(save(PIL.Image.fromarray(grey), "PNG")), expected)


def test_one_bit_is_black_and_white() -> None:
    bits = noise()[..., 0] > 127
    expected = np.repeat(np.where(bits, 255, 0)[..., None], 3, axis=2)
    assert np.array_equal(pixels(save(PIL.Image.fromarray(bits), "PNG")), expected)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_greys_are_scaled(format: str) -> None:
    deep = np.array([[0, 128, 257, 32768, 65535]], np.uint16)
    expected = np.repeat(np.array([[0, 0, 1, 128, 255]])[..., None], 3, axis=2)
    assert np.array_equal(pixels(save(PIL.Image.fromarray(deep), format)), expected)


def test_sixteen_bit_colours_are_scaled() -> None:
    deep = (noise(1, 4).astype(np.uint16) * 257).astype(">u2")
    assert np.array_equal(pixels(raw_png(4, 1, 16, 2, b"\0" + deep.tobytes())), noise(1, 4))


def test_float_greys_are_scaled() -> None:
    floats = PIL.Image.fromarray(np.array([[0, 0.5, 1, np.nan]], np.float32))
    assert pixels(save(floats, "TIFF"))[0, :, 0].tolist() == [0, 128, 255, 0]


def test_palettes_are_looked_up() -> None:
    indices = PIL.Image.fromarray(noise()[..., 0] % 3, mode=None)
    image = PIL.Image.frombytes("P", indices.size, indices.tobytes())
    image.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    table = np.array([[255, 0, 0], [0, 255, 0], [10, 20, 30]])
    for format in ("PNG", "GIF", "BMP"):
        assert np.array_equal(pixels(save(image, format)), table[noise()[..., 0] % 3])


def test_cmyk_is_converted() -> None:
    ink = np.full((8, 8, 4), [0, 255, 255, 0], np.uint8)  # no cyan, all magenta and yellow: red
    red = pixels(save(PIL.Image.frombytes("CMYK", (8, 8), ink.tobytes()), "TIFF"))
    assert (red == [255, 0, 0]).all()


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_alpha_lies_on_white(format: str) -> None:
    rgba = noise(channels=4)
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(pixels(save(PIL.Image.fromarray(rgba), format)) - expected).max() <= 1


def test_grey_alpha_lies_on_white() -> None:
    both = noise(channels=2)
    alpha = both[..., 1] / 255
    expected = both[..., 0] * alpha + 255 * (1 - alpha)
    found = pixels(save(PIL.Image.frombytes("LA", (9, 6), both.tobytes()), "PNG"))
    assert np.abs(found - expected[..., None]).max() <= 1


def test_a_transparent_colour_is_white() -> None:
    image = PIL.Image.new("RGB", (2, 1), (9, 9, 9))
    image.putpixel((1, 0), (1, 2, 3))
    assert pixels(save(image, "PNG", transparency=(9, 9, 9))).tolist() == [[[255] * 3, [1, 2, 3]]]
    palette = PIL.Image.frombytes("P", (2, 1), bytes([0, 1]))
    palette.putpalette([9, 9, 9, 1, 2, 3])
    assert pixels(save(palette, "PNG", transparency=b"\0\xff")).tolist() == [[[255] * 3, [1, 2, 3]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation: int) -> None:
    """Each orientation against its definition: which stored corner is shown at the upper left."""
    upright: Callable[[Image], Image] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: a.transpose(1, 0, 2)[::-1],
    }[orientation]
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels(save(PIL.Image.fromarray(noise()), "PNG", exif=exif)), upright(noise()))


def test_damaged_exif_is_ignored() -> None:
    data = save(PIL.Image.fromarray(noise()), "PNG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff rubbish")
    assert np.array_equal(pixels(data), noise())


def profile_of(kind: str) -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(kind)).tobytes()  # type: ignore[arg-type]


def exchanged_profile() -> bytes:
    """An sRGB profile in which the red and blue primaries have changed places."""
    data = bytearray(profile_of("sRGB"))
    tags = {bytes(data[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(data[131])}
    red, blue = (slice(tags[name] + 4, tags[name] + 12) for name in (b"rXYZ", b"bXYZ"))
    data[red], data[blue] = data[blue], data[red]
    return bytes(data)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_a_profile_is_converted(format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    data = save(PIL.Image.fromarray(noise()), format, icc_profile=exchanged_profile(), **options)
    assert np.abs(pixels(data).astype(int) - noise()[..., ::-1]).max() <= 3
    assert "icc_profile" not in decode(data, what="it").info


def test_a_profile_is_converted_under_alpha_and_palette() -> None:
    rgba = noise(channels=4)
    rgba[..., 3] = 255
    data = save(PIL.Image.fromarray(rgba), "PNG", icc_profile=exchanged_profile())
    assert np.abs(pixels(data).astype(int) - rgba[..., 2::-1]).max() <= 3
    palette = PIL.Image.frombytes("P", (2, 1), bytes([0, 1]))
    palette.putpalette([200, 20, 30, 1, 2, 240])
    found = pixels(save(palette, "PNG", icc_profile=exchanged_profile()))
    assert np.abs(found.astype(int) - [[[30, 20, 200], [240, 2, 1]]]).max() <= 3


@pytest.mark.parametrize("profile", [b"rubbish", b"", profile_of("LAB"), profile_of("sRGB")[:200]])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_a_broken_or_unfitting_profile_is_ignored(profile: bytes, mode: str) -> None:
    image = PIL.Image.fromarray(noise()).convert(mode)
    found = pixels(save(image, "PNG", icc_profile=profile))
    assert np.array_equal(found, np.asarray(image.convert("RGB")))


def test_the_first_frame_is_taken() -> None:
    frames = [PIL.Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for format in ("GIF", "TIFF"):
        data = save(frames[0], format, save_all=True, append_images=frames[1:])
        assert (pixels(data) == [255, 0, 0]).all()


PHOTO = save(PIL.Image.fromarray(np.tile(noise(32, 32), (4, 4, 1))), "JPEG")
DRAWING = save(PIL.Image.fromarray(noise(64, 64)), "PNG")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a JPEG"),
        (b"hello, I am text", "not a JPEG"),
        (b"%PDF-1.7 something", "not a JPEG"),
        (save(PIL.Image.new("RGB", (4, 4)), "PPM"), "not a JPEG"),
        (save(PIL.Image.new("RGB", (4, 4)), "ICO"), "not a JPEG"),
        (PHOTO[: len(PHOTO) // 2], "damaged"),
        (DRAWING[: len(DRAWING) // 2], "damaged"),
        (DRAWING[:100] + b"\0" * 400 + DRAWING[500:], "damaged"),
        (raw_png(10_000, 5_001, 8, 2, b""), "10000 x 5001 is more than 50 million pixels"),
        (raw_png(60_000, 60_000, 8, 2, b""), "more than 50 million pixels"),
    ],
)
def test_bad_files_are_told_in_one_sentence(data: bytes, says: str) -> None:
    with pytest.raises(ImageError, match=says) as caught:
        decode(data, what="holiday/IMG 1.jpg")
    text = str(caught.value)
    assert isinstance(caught.value, UserError)
    assert text.startswith("holiday/IMG 1.jpg: ")
    assert text.endswith(".")
    assert "\n" not in text


@settings(max_examples=150, deadline=None)
@given(data=st.data(), start=st.sampled_from([PHOTO, DRAWING, save(PIL.Image.new("P", (9, 9)), "GIF")]))
def test_damage_gives_an_image_or_an_image_error(data: st.DataObject, start: bytes) -> None:
    damaged = bytearray(start)
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert decode(bytes(damaged), what="it").mode == "RGB"
    except ImageError as error:
        assert str(error).startswith("it: ")


def test_warning_filters_are_left_alone_by_threads() -> None:
    before = list(warnings.filters)
    threads = [threading.Thread(target=lambda: [pixels(DRAWING) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before


def test_encode_round_trip() -> None:
    assert np.array_equal(pixels(encode(noise(), "png")), noise())
    smooth = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    for format in ("jpeg", "webp"):
        low, high = (encode(PIL.Image.fromarray(smooth), format, quality=q) for q in (10, 95))
        assert PIL.Image.open(io.BytesIO(high)).format == format.upper()
        assert len(low) < len(high)
        assert np.abs(pixels(high).astype(int) - smooth).mean() < 3
        assert high == encode(smooth, format, quality=95)
