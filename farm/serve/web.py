"""The HTTP interface.

Nothing here knows about Ray or models: `create_app` is given a function that edits.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

from fastapi import FastAPI, Path, Query, Request, Response
from fastapi.responses import JSONResponse

from e2gan.pairs import Image
from farm.config import ServiceConfig
from farm.serve import openapi
from farm.serve.browsing import add_browsing
from farm.serve.decoder import Decoders
from farm.serve.editing import Edited, Wanted
from farm.serve.listing import Listing
from farm.serve.page_files import add_page
from farm.serve.photos import LONGEST_ANSWER, Prepared, finish
from farm.serve.problems import problem_of, tell_problems
from farm.serve.published import Published
from farm.serve.uploads import Format, choose_format, read_photo

MOST_CONCEPTS = 16
"""Of one request."""

Concept = Annotated[
    str,
    # The length matters: names near an unknown one are searched for in quadratic time.
    Path(max_length=100, description="A concept's id, as `GET /v1/concepts` lists it.", examples=["charcoal"]),
]
Size = Annotated[
    int | None,
    Query(ge=1, le=LONGEST_ANSWER, description="Longest side of the answer in pixels; the upload's own without it."),
]
Quality = Annotated[int, Query(ge=1, le=100, description="Of a JPEG or WebP.")]
Strength = Annotated[float, Query(ge=0, le=1, description="Of the edit: a factor on the adapter.", examples=[0.7])]


def create_app(
    edit: Callable[[Wanted, Image], Awaitable[Edited]],
    published: Published,
    listing: Listing,
    settings: ServiceConfig,
) -> FastAPI:
    """The web application.

    edit: takes what is wanted and a photo, uint8 `[h, w, 3]` with sides as the network takes them; raises
        UnknownConceptError or BusyError.
    """
    app = FastAPI(**openapi.ABOUT, docs_url=None, redoc_url=None)
    decode = Decoders(seconds=settings.decode_seconds, max_pixels=int(settings.max_megapixels * 1e6))
    encoders = ThreadPoolExecutor(2, "encode")

    async def prepared(request: Request, steps: Steps, size: int | None) -> Prepared:
        data = await read_photo(request, limit=int(settings.max_body_mb * 1e6))
        steps.end("receive")
        photo = await decode(data, max_side=settings.max_side, size=size)
        steps.end("decode")
        return photo

    async def encoded(edited: Edited, photo: Prepared, format: Format, quality: int) -> bytes:
        return await asyncio.get_running_loop().run_in_executor(encoders, finish, edited.image, photo, format, quality)

    @app.post("/v1/edit/{concept}", **openapi.EDIT)
    async def edit_photo(
        concept: Concept,
        request: Request,
        size: Size = None,
        quality: Quality = 90,
        version: Annotated[int | None, Query(ge=1, description="A published version; the current one without.")] = None,
        strength: Strength = 1.0,
    ) -> Response:
        """Edit a photo with a concept."""
        format = choose_format(",".join(request.headers.getlist("accept")) or "*/*")
        published.release(concept, version)  # before the upload is read
        steps = Steps()
        photo = await prepared(request, steps, size)
        edited = await edit(Wanted(concept=concept, version=version, strength=round(strength, 2)), photo.photo)
        steps.end("call")
        data = await encoded(edited, photo, format, quality)
        steps.end("encode")
        return Response(data, media_type=f"image/{format}", headers=_headers(edited) | steps.header(edited))

    @app.post("/v1/edit", **openapi.EDITS)
    async def edit_photo_several(
        request: Request,
        concept: Annotated[list[str], Query(min_length=1, max_length=MOST_CONCEPTS, examples=[["charcoal", "night"]])],
        format: Annotated[Format, Query(description="Of the edited photos.")] = "png",
        size: Size = None,
        quality: Quality = 90,
        strength: Strength = 1.0,
    ) -> JSONResponse:
        """Edit a photo with several concepts; what is wrong with one of them is told in its place."""
        steps = Steps()
        photo = await prepared(request, steps, size)
        edits = []
        for name in concept:
            try:
                edited = await edit(Wanted(concept=name, strength=round(strength, 2)), photo.photo)
            except Exception as error:
                problem, _ = problem_of(error)
                if problem.status == 500:
                    raise
                edits.append({"concept": name, "status": problem.status, "problem": problem.model_dump()})
            else:
                data = await encoded(edited, photo, format, quality)
                told = {"version": edited.version, "digest": edited.digest, "base": edited.base}
                image = {"type": f"image/{format}", "image": base64.b64encode(data).decode()}
                edits.append({"concept": name, "status": 200, **image, **told})
        steps.end("edit")
        return JSONResponse({"edits": edits}, headers=steps.header())

    @app.get("/healthz", **openapi.HEALTH)
    async def healthz() -> dict[str, str]:
        """Whether a real edit succeeded lately."""
        return {"status": "ok"}

    @app.get("/readyz", **openapi.HEALTH)
    async def readyz() -> dict[str, str]:
        """Whether requests should be sent here."""
        return {"status": "ok"}

    add_browsing(app, listing)
    add_page(app)
    tell_problems(app)
    return app


def _headers(edited: Edited) -> dict[str, str]:
    return {
        "X-Adapter-Version": str(edited.version),
        "X-Adapter-Digest": edited.digest,
        "X-Base-Digest": edited.base,
        "Cache-Control": "no-store",
        "Vary": "Accept",
    }


class Steps:
    """How long each step of a request took."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = {}
        self._began = time.perf_counter()

    def end(self, step: str) -> None:
        now = time.perf_counter()
        self.milliseconds[step] = (now - self._began) * 1e3
        self._began = now

    def header(self, edited: Edited | None = None) -> dict[str, str]:
        timing = {**self.milliseconds, **(edited.milliseconds if edited else {})}
        return {"Server-Timing": ", ".join(f"{name};dur={took:.1f}" for name, took in timing.items())}
