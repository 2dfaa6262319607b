"""The HTTP interface: uploads checked and decoded, edits encoded, every error a problem document (RFC 9457).

Nothing here knows about Ray or models: `create_app` is given a function that edits and one that lists.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from importlib import resources
from typing import Annotated, Any, Literal, get_args

import numpy as np
import PIL.Image
from fastapi import FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from e2gan.pairs import Image
from farm.images import ImageError, decode, encode
from farm.serve.bank import UnknownConceptError

Format = Literal["png", "jpeg", "webp"]

UPLOAD_SECONDS = 60.0


class BusyError(Exception):
    """More edits are waiting than the service takes on."""


@dataclass(frozen=True, kw_only=True)
class Edited:
    """An edited photo, uint8 `[h, w, 3]`, and what edited it. milliseconds: duration of each step."""

    image: Image
    version: int
    digest: str
    base: str
    milliseconds: Mapping[str, float]


class ProblemError(Exception):
    """An error to be told to the client."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(status, detail)
        self.status = status
        self.detail = detail


def create_app(
    edit: Callable[[str, Image], Awaitable[Edited]],
    concepts: Callable[[], list[dict[str, Any]]],
    *,
    max_side: int,
    max_body_mb: float,
) -> FastAPI:
    """The web application.

    edit: takes a concept's id and a photo, uint8 `[h, w, 3]`; raises UnknownConceptError or BusyError.
    concepts: the rows of `GET /v1/concepts`; called in a thread.
    max_side: the longer side, in pixels, that `edit` works at; far larger photos are reduced beforehand.
    max_body_mb: largest upload, in millions of bytes.
    """
    app = FastAPI(title="E2GAN concept farm", docs_url=None, redoc_url=None)
    page = resources.files("farm.serve").joinpath("page", "index.html").read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse)
    async def index() -> str:
        return page

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/concepts")
    def list_concepts() -> dict[str, list[dict[str, Any]]]:
        return {"concepts": concepts()}

    # The length matters: names near an unknown one are searched for in quadratic time.
    @app.post("/v1/edit/{concept}", response_class=Response)
    async def edit_upload(concept: Annotated[str, Path(max_length=100)], request: Request) -> Response:
        format = choose_format(",".join(request.headers.getlist("accept")) or "*/*")
        steps = _Steps()
        body = await read_body(request, limit=int(max_body_mb * 1e6))
        steps.end("receive")
        photo = await asyncio.to_thread(_photo, body, 3 * max_side)
        steps.end("decode")
        edited = await edit(concept, photo)
        steps.end("call")
        data = await asyncio.to_thread(encode, edited.image, format)
        steps.end("encode")
        timing = {**steps.milliseconds, **edited.milliseconds}
        return Response(
            data,
            media_type=f"image/{format}",
            headers={
                "X-Adapter-Version": str(edited.version),
                "X-Adapter-Digest": edited.digest,
                "X-Base-Digest": edited.base,
                "Server-Timing": ", ".join(f"{name};dur={took:.1f}" for name, took in timing.items()),
            },
        )

    _tell_problems(app)
    return app


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


class _Steps:
    """How long each step of a request took."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = {}
        self._began = time.perf_counter()

    def end(self, step: str) -> None:
        now = time.perf_counter()
        self.milliseconds[step] = (now - self._began) * 1e3
        self._began = now


def _photo(data: bytes, longest: int) -> Image:
    """The decoded upload, at most `longest` pixels a side: what waits for an edit must not fill memory."""
    photo = decode(data, what="the upload")
    photo.thumbnail((longest, longest), PIL.Image.Resampling.LANCZOS)
    return np.asarray(photo)


def _tell_problems(app: FastAPI) -> None:
    """Answer every error with a problem document."""

    @app.exception_handler(ProblemError)
    async def told(_: Request, error: ProblemError) -> Response:
        return _problem(error.status, error.detail)

    @app.exception_handler(UnknownConceptError)
    async def unknown_concept(_: Request, error: UnknownConceptError) -> Response:
        return _problem(404, str(error), near=list(error.near))

    @app.exception_handler(ImageError)
    async def no_image(_: Request, error: ImageError) -> Response:
        return _problem(400, str(error))

    @app.exception_handler(BusyError)
    async def busy(_: Request, error: BusyError) -> Response:
        return _problem(503, "too many edits are waiting; try again shortly", headers={"Retry-After": "1"})

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        details = {404: f"nothing is at {request.url.path}", 405: f"{request.method} is not possible here"}
        detail = details.get(error.status_code, str(error.detail))
        return _problem(error.status_code, detail, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return _problem(422, f"{first['loc'][-1]}: {first['msg']}")

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:  # the server logs it
        return _problem(500, "something went wrong here; the service's log says what")


def _problem(status: int, detail: str, *, headers: Mapping[str, str] | None = None, **members: Any) -> Response:
    return JSONResponse(
        {
            "type": "about:blank",
            "title": HTTPStatus(status).phrase,
            "status": status,
            "detail": detail,
            **members,
        },
        status,
        headers,
        media_type="application/problem+json",
    )
