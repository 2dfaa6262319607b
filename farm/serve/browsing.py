"""Routes that tell what is published."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from farm.serve import openapi
from farm.serve.listing import Detail, Listing, Rows, etag
from farm.serve.problems import ProblemError

MOST_ROWS = 200
"""Of a page."""

Known = Annotated[str, Path(max_length=100, description="A concept's id.", examples=["charcoal"])]


def browsing_routes(listing: Listing) -> APIRouter:
    """`/v1/concepts` and what is below it."""
    router = APIRouter(prefix="/v1/concepts", tags=["concepts"])

    @router.get("", **openapi.browsing(Rows))
    def list_concepts(
        request: Request,
        q: Annotated[str, Query(max_length=200, description="Words of the id, the prompt or the category.")] = "",
        category: Annotated[str | None, Query(max_length=100)] = None,
        page: Annotated[int, Query(ge=1, le=10**6)] = 1,
        per_page: Annotated[int, Query(ge=1, le=MOST_ROWS)] = 60,
    ) -> Response:
        """The published concepts, sorted by id."""
        return cached(request, listing.search(q, category, page=page, per_page=per_page))

    @router.get("/{concept}", **openapi.browsing(Detail))
    def one_concept(concept: Known, request: Request) -> Response:
        """A published concept and its history."""
        return cached(request, listing.detail(concept))

    @router.get("/{concept}/lineage", **openapi.LINEAGE)
    def lineage(concept: Known) -> JSONResponse:
        """What a concept was made from, back to the photographs."""
        return JSONResponse(listing.lineage(concept))

    @router.get("/{concept}/preview.webp", **openapi.PREVIEW)
    def preview(
        concept: Known,
        request: Request,
        small: Annotated[bool, Query(description="One photo only, in a small file.")] = False,
    ) -> Response:
        """Test photos, the teacher's edits of them, and the adapter's, a row each."""
        picture, tag = listing.preview(concept, small=small)
        if picture is None:
            raise ProblemError(404, f"{concept} has no preview")
        headers = {"ETag": tag, "Cache-Control": "private, max-age=60"}
        if _has(request, tag):
            return Response(status_code=304, headers=headers)
        return Response(picture, media_type="image/webp", headers=headers)

    return router


def cached(request: Request, document: BaseModel) -> Response:
    """A document as JSON, or 304 to a client that has it."""
    headers = {"ETag": etag(document), "Cache-Control": "private, no-cache"}
    if _has(request, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return JSONResponse(document.model_dump(), headers=headers)


def _has(request: Request, tag: str) -> bool:
    """Whether the client has what the etag stands for (RFC 9110, section 13.1.2)."""
    known = ",".join(request.headers.getlist("if-none-match"))
    return known.strip() == "*" or tag in [one.strip().removeprefix("W/") for one in known.split(",")]
