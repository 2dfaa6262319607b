"""What clients send: a photo's bytes, and which format they take the answer in."""

from __future__ import annotations

import asyncio
import re
from typing import Literal, get_args

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import File, FormParser, parse_options_header
from starlette.requests import ClientDisconnect

from farm.serve.problems import ProblemError

Format = Literal["png", "jpeg", "webp"]

UPLOAD_SECONDS = 60.0

PART = "image"
"""The part of a form that holds the photo."""


async def read_photo(request: Request, *, limit: int) -> bytes:
    """The bytes of the photo: the body itself, or the part `image` of a multipart/form-data.

    limit: bytes of the whole body.

    Raises:
        ProblemError: 408, 413 or 400, it is late, too large or cut off; 422, the form has no such part.
    """
    body = await read_body(request, limit=limit)
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind.lower() != b"multipart/form-data":
        return body
    parts: dict[bytes | None, bytes] = {}

    def take(file: File) -> None:
        with file.file_object as data:
            data.seek(0)
            parts[file.field_name] = data.read()

    try:
        parser = FormParser(
            kind.decode("latin-1"),
            on_field=None,
            on_file=take,
            boundary=options.get(b"boundary"),
            config={"MAX_MEMORY_FILE_SIZE": limit + 1},  # a photo is never written to a disk
        )
        parser.write(body)
        parser.finalize()
    except (FormParserError, ValueError) as error:
        raise ProblemError(400, f"the form cannot be read: {error}") from None
    if PART.encode() not in parts:
        raise ProblemError(422, f"{PART}: the form has no such file; `curl -F {PART}=@photo.jpg` sends one")
    return parts[PART.encode()]


async def read_body(request: Request, *, limit: int) -> bytes:
    """The body, whatever its Content-Length says; ProblemError when it is too large, late or cut off."""
    too_large = ProblemError(413, f"the upload is larger than {limit / 1e6:g} MB; send a smaller photo")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:18]) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise ProblemError(408, f"the upload took longer than {UPLOAD_SECONDS:g} seconds") from None
    except ClientDisconnect:
        raise ProblemError(400, "the upload was cut off") from None
    return bytes(body)


def choose_format(accept: str) -> Format:
    """The image format an Accept header asks for (RFC 9110, section 12.5.1), PNG among equals.

    Raises:
        ProblemError: 406, it takes none of PNG, JPEG and WebP.
    """
    weights = {}
    for item in accept.lower().split(","):
        media, *parameters = (part.strip() for part in item.split(";"))
        quality = next((q for p in parameters if (q := re.fullmatch(r"q=([01](?:\.\d*)?)", p))), None)
        weights[media] = float(quality[1]) if quality else 1.0

    def weight(format: Format) -> float:
        ranges = (f"image/{format}", "image/*", "*/*")
        return next((weights[media] for media in ranges if media in weights), 0.0)

    best: Format = max(get_args(Format), key=weight)
    if not weight(best):
        raise ProblemError(406, "edited photos come as image/png, image/jpeg or image/webp")
    return best
