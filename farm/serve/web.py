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

from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse

from e2gan.pairs import Image
from farm.serve import openapi
from farm.serve.access import Access
from farm.serve.admin import Broadcast, admin_routes
from farm.serve.browsing import browsing_routes
from farm.serve.config import ServiceConfig
from farm.serve.decoder import Decoders
from farm.serve.editing import Edited, Wanted
from farm.serve.listing import Listing
from farm.serve.metrics import Counting, Metrics
from farm.serve.packs import Packs, pack_routes
from farm.serve.page_files import add_page
from farm.serve.photos import LONGEST_ANSWER, Prepared, finish
from farm.serve.problems import BusyError, problem_of, tell_problems
from farm.serve.published import Published
from farm.serve.replicas import Replicas
from farm.serve.uploads import Format, choose_format, read_photo

MOST_CONCEPTS = 16
"""Of one request."""

TOLD = ("X-Adapter-Version", "X-Adapter-Digest", "X-Base-Digest", "Server-Timing", "Retry-After")
"""Headers that the pages of other origins may read."""

Edit = Callable[[Wanted, Image], Awaitable[Edited]]

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
Version = Annotated[int | None, Query(ge=1, le=10**9, description="A published version; the current one without it.")]
Strength = Annotated[float, Query(ge=0, le=1, description="Of the edit: a factor on the adapter.", examples=[0.7])]


def create_app(
    edit: Edit,
    listing: Listing,
    settings: ServiceConfig,
    replicas: Replicas,
    broadcast: Broadcast | None = None,
) -> FastAPI:
    """The web application.

    edit: takes what is wanted and a photo, uint8 `[h, w, 3]` with sides as the network takes them; raises
        UnknownConceptError or BusyError. replicas: those that edit; who makes the application has them report.
    broadcast: has all of them do something; without it there are no routes for administrators.

    `app.state.close()` ends the processes that decode.
    """
    app = FastAPI(**openapi.ABOUT, docs_url=None, redoc_url=None)
    access = Access(settings.keys)
    metrics = Metrics(replicas)
    decode = Decoders(seconds=settings.decode_seconds, max_pixels=int(settings.max_megapixels * 1e6))
    app.state.close = decode.close
    keys = [Depends(access)] if settings.keys else []
    editing = edit_routes(edit, listing.published, settings, decode, replicas, access, metrics)
    app.include_router(editing, dependencies=keys)
    app.include_router(browsing_routes(listing), dependencies=keys)
    app.include_router(pack_routes(Packs(listing.published, offers=settings.packs)), dependencies=keys)
    if broadcast and any(key.admin for key in settings.keys):
        admin = [Depends(access), Depends(access.admin)]
        app.include_router(admin_routes(broadcast, listing.published), dependencies=admin)

    @app.get("/healthz", **openapi.HEALTH)
    async def healthz() -> dict[str, str]:
        """Whether a real edit succeeded lately."""
        if not replicas.reports:
            raise BusyError("no edit succeeded lately", 5)
        return {"status": "ok"}

    @app.get("/readyz", **openapi.HEALTH)
    async def readyz() -> dict[str, str]:
        """Whether requests should be sent here: edits succeed, and there is room for another."""
        await healthz()
        replicas.admit()
        return {"status": "ok"}

    @app.get("/metrics", **openapi.METRICS)
    async def counts() -> Response:
        """What the service counts, for Prometheus."""
        text, kind = metrics.text()
        return Response(text, media_type=kind)

    add_page(app)
    tell_problems(app)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "X-API-Key", "Content-Type", "If-None-Match"],
            expose_headers=[*TOLD, "ETag"],
        )
    app.add_middleware(Counting, metrics=metrics)
    return app


def edit_routes(
    edit: Edit,
    published: Published,
    settings: ServiceConfig,
    decode: Decoders,
    replicas: Replicas,
    access: Access,
    metrics: Metrics,
) -> APIRouter:
    """The routes that edit."""
    router = APIRouter(prefix="/v1/edit", tags=["edit"])
    encoders = ThreadPoolExecutor(2, "encode")
    limit = int(settings.max_body_mb * 1e6)

    async def decoded(data: bytes, steps: Steps, size: int | None) -> Prepared:
        photo = await decode(data, max_side=settings.max_side, size=size)
        steps.end("decode")
        return photo

    async def made(wanted: Wanted, photo: Prepared, format: Format, quality: int, steps: Steps) -> tuple[Edited, bytes]:
        """The edit, and its file."""
        edited = await edit(wanted, photo.photo)
        steps.end("call")
        replicas.hear(edited.report)
        metrics.edits.labels(wanted.concept).inc()
        file = await asyncio.get_running_loop().run_in_executor(encoders, finish, edited.image, photo, format, quality)
        steps.end("encode")
        return edited, file

    @router.post("/{concept}", **openapi.EDIT)
    async def edit_photo(
        concept: Concept,
        request: Request,
        size: Size = None,
        quality: Quality = 90,
        version: Version = None,
        strength: Strength = 1.0,
    ) -> Response:
        """Edit a photo with a concept."""
        format = choose_format(",".join(request.headers.getlist("accept")) or "*/*")
        published.release(concept, version)  # whatever can be refused is refused before the upload is read
        replicas.admit()
        access.spend(request)
        wanted = Wanted(concept=concept, version=version, strength=round(strength, 2))
        steps = Steps()
        data = await read_photo(request, limit=limit)
        steps.end("receive")
        with replicas.editing():
            photo = await decoded(data, steps, size)
            edited, file = await made(wanted, photo, format, quality, steps)
        steps.milliseconds.update(edited.milliseconds)
        metrics.staged(steps.milliseconds)
        headers = {
            "X-Adapter-Version": str(edited.version),
            "X-Adapter-Digest": edited.digest,
            "X-Base-Digest": edited.base,
            "Cache-Control": "no-store",
            "Vary": "Accept",
            "Server-Timing": steps.timing(),
        }
        return Response(file, media_type=f"image/{format}", headers=headers)

    @router.post("", **openapi.EDITS)
    async def edit_photo_several(
        request: Request,
        concept: Annotated[list[str], Query(min_length=1, max_length=MOST_CONCEPTS, examples=[["charcoal", "night"]])],
        format: Annotated[Format, Query(description="Of the edited photos.")] = "png",
        size: Size = None,
        quality: Quality = 90,
        strength: Strength = 1.0,
    ) -> JSONResponse:
        """Edit a photo with several concepts; what is wrong with one of them is told in its place."""
        replicas.admit(len(concept))
        access.spend(request, len(concept))
        steps = Steps()
        data = await read_photo(request, limit=limit)
        steps.end("receive")
        edits = []
        with replicas.editing(len(concept)):
            photo = await decoded(data, steps, size)
            for name in concept:
                try:
                    published.release(name[:100])
                    wanted = Wanted(concept=name, strength=round(strength, 2))
                    edited, file = await made(wanted, photo, format, quality, Steps())
                except Exception as error:
                    problem, _ = problem_of(error)
                    if problem.status == 500:
                        raise
                    told = problem.model_dump(exclude_none=True)
                    edits.append({"concept": name, "status": problem.status, "problem": told})
                else:
                    about = {"version": edited.version, "digest": edited.digest, "base": edited.base}
                    image = {"type": f"image/{format}", "image": base64.b64encode(file).decode()}
                    edits.append({"concept": name, "status": 200, **image, **about})
        steps.end("edit")
        return JSONResponse({"edits": edits}, headers={"Server-Timing": steps.timing(), "Cache-Control": "no-store"})

    return router


class Steps:
    """How long each step of a request took."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = {}
        self._began = time.perf_counter()

    def end(self, step: str) -> None:
        now = time.perf_counter()
        self.milliseconds[step] = (now - self._began) * 1e3
        self._began = now

    def timing(self) -> str:
        """A Server-Timing header."""
        return ", ".join(f"{name};dur={took:.1f}" for name, took in self.milliseconds.items())
