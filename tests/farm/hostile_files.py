"""Files that nobody should send, more than two hundred of them, made anew from a seed."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import PIL.Image
import PIL.ImageCms

PHOTO = np.random.default_rng(3).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def saved(image: PIL.Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *, depth: int = 8, colour: int = 2, rows: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG of any header and any content."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def hostile_files() -> Iterator[tuple[str, bytes]]:
    """Names and contents."""
    photo = PIL.Image.fromarray(PHOTO)
    sound = {name: saved(photo, name) for name in ("JPEG", "PNG", "WEBP")}
    dice = random.Random(0)
    for name, data in sound.items():
        for part in range(1, 13):
            yield f"{name} cut at {part}/13", data[: len(data) * part // 13]
        for number in range(20):
            changed = bytearray(data)
            for _ in range(dice.randint(1, 12)):
                changed[dice.randrange(12 if number % 2 else 0, len(data))] = dice.randrange(256)
            yield f"{name} with changed bytes, {number}", bytes(changed)
        for number in range(8):
            place, length = dice.randrange(len(data)), dice.randrange(1, 64)
            yield f"{name} with bytes missing, {number}", data[:place] + data[place + length :]
            yield f"{name} with bytes inserted, {number}", data[:place] + dice.randbytes(length) + data[place:]
        yield f"{name} and a program", data + b"\n#!/bin/sh\nrm -rf /\n" * 50
        yield f"{name} behind a blank", b" " + data
        yield f"{name} twice", data * 2
        yield f"{name} of nothing but its magic", data[:12]
        for other, its in sound.items():
            if other != name:
                yield f"{name}'s magic on {other}", data[:8] + its[8:]
                yield f"{other} inside of {name}", data[: len(data) // 2] + its + data[len(data) // 2 :]
    yield from _bombs()
    yield from _odd_kinds(photo)
    yield from _no_images()
    yield from _odd_metadata(photo)


def _bombs() -> Iterator[tuple[str, bytes]]:
    yield "a PNG that claims 2^31 pixels a side", png(2**31 - 1, 2**31 - 1)
    yield "a PNG that claims 65535 pixels a side", png(65535, 65535)
    yield "a PNG of zero width", png(0, 10)
    yield "a PNG of zero height", png(10, 0)
    yield "a PNG of a long line", png(4_000_000, 1, colour=0, rows=bytes(4_000_001))
    yield "a PNG with far too many rows", png(8, 8, colour=0, rows=bytes(20_000_000))
    yield "a PNG with far too few rows", png(2000, 1500, colour=0, rows=b"\0")
    yield "a PNG just below the limit", saved(PIL.Image.new("L", (2000, 1990)), "PNG")
    yield "a PNG above the limit", saved(PIL.Image.new("L", (2000, 2010)), "PNG")
    yield "a palette above the limit", saved(PIL.Image.new("P", (9000, 9000)), "PNG")
    yield "a JPEG above the limit", saved(PIL.Image.new("L", (2100, 2100)), "JPEG", quality=1)
    yield "a WebP above the limit", saved(PIL.Image.new("RGB", (2100, 2100)), "WEBP", quality=1)
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(30_000_000), 9))
    yield "a PNG with a bomb of text", png(8, 8, rows=bytes(8 * 25), extra=text)
    profile = chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(30_000_000), 9))
    yield "a PNG with a bomb of a profile", png(8, 8, rows=bytes(8 * 25), extra=profile)
    yield "a PNG of ten thousand chunks", png(8, 8, rows=bytes(8 * 25), extra=chunk(b"tEXt", b"a\0b") * 10_000)


def _odd_kinds(photo: PIL.Image.Image) -> Iterator[tuple[str, bytes]]:
    frames = [PIL.Image.new("RGB", (16, 16), (n, n, n)) for n in range(40)]
    yield "an animated WebP", saved(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    yield "an animated PNG", saved(frames[0], "PNG", save_all=True, append_images=frames[1:])
    yield "an animated GIF", saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    for depth in (1, 2, 4, 8, 16):
        for colour in (0, 2, 3, 4, 6, 7):
            rows = b"".join(b"\0" + bytes(8 * 8) for _ in range(8))
            yield f"a PNG of depth {depth} and colours {colour}", png(8, 8, depth=depth, colour=colour, rows=rows)
    wide = PIL.Image.fromarray(PHOTO[..., 0].astype(np.uint16) * 257)
    yield "a PNG of 16-bit greys", saved(wide, "PNG")
    yield "a CMYK JPEG", saved(photo.convert("CMYK"), "JPEG")
    yield "a grey JPEG", saved(photo.convert("L"), "JPEG")
    yield "a progressive JPEG", saved(photo, "JPEG", progressive=True)
    yield "a JPEG of one pixel", saved(PIL.Image.new("RGB", (1, 1)), "JPEG")
    yield "a very long PNG", saved(PIL.Image.new("RGB", (30_000, 1)), "PNG")
    yield "a very high JPEG", saved(PIL.Image.new("RGB", (1, 30_000)), "JPEG")
    for format in ("BMP", "TIFF", "GIF", "ICO", "PPM", "TGA", "PDF", "EPS", "JPEG2000"):
        yield f"a file of format {format}", saved(photo, format)


def _no_images() -> Iterator[tuple[str, bytes]]:
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script><image href="file:///etc/passwd"/></svg>'
    yield "nothing", b""
    yield "a byte", b"\0"
    yield "text", b"hello"
    yield "an SVG", svg
    yield (
        "an SVG with a declaration",
        b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a SYSTEM "file:///etc/passwd">]>' + svg,
    )
    yield "a page", b"<!doctype html><script>alert(1)</script>"
    yield "a zip", b"PK\x03\x04" + bytes(100)
    yield "a program", b"\x7fELF" + bytes(100)
    yield "a pickle", b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94."
    yield "a RIFF that is a sound", b"RIFF" + struct.pack("<I", 100) + b"WAVEfmt " + bytes(90)
    yield "a PNG's magic in a JPEG's", b"\xff\xd8\xff\x89PNG\r\n\x1a\n"
    for number in range(8):
        yield f"noise {number}", random.Random(number).randbytes(1000)


def _odd_metadata(photo: PIL.Image.Image) -> Iterator[tuple[str, bytes]]:
    exif = PIL.Image.Exif()
    exif[0x9286] = b"x" * 60_000
    yield "a huge EXIF", saved(photo, "JPEG", exif=exif)
    for value in (0, 9, 255, 65535):
        turned = PIL.Image.Exif()
        turned[0x0112] = value
        yield f"EXIF orientation {value}", saved(photo, "JPEG", exif=turned)
    for number in range(6):
        yield f"a damaged EXIF, {number}", saved(photo, "PNG", exif=b"Exif\0\0" + random.Random(number).randbytes(200))
    segment = b"\xff\xe1" + struct.pack(">H", 65535) + bytes(65533)
    jpeg = saved(photo, "JPEG")
    yield "a JPEG of a hundred EXIF segments", jpeg[:2] + segment * 100 + jpeg[2:]
    yield "a JPEG of a thousand comments", jpeg[:2] + (b"\xff\xfe" + struct.pack(">H", 4) + b"ab") * 1000 + jpeg[2:]
    profile = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("LAB")).tobytes()
    yield "a profile of other colours", saved(photo, "PNG", icc_profile=profile)
    yield "a profile of noise", saved(photo, "PNG", icc_profile=random.Random(9).randbytes(3000))
    yield (
        "a grey photo with a profile of colours",
        saved(
            photo.convert("L"),
            "PNG",
            icc_profile=PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes(),
        ),
    )
