"""What OpenAPI says of the routes beside their parameters: bodies, answers, examples."""

from __future__ import annotations

from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from farm.serve.problems import Problem

ABOUT: dict[str, Any] = {
    "title": "E2GAN concept farm",
    "version": "1",
    "summary": "Edits photos with small image-to-image GANs, one adapter a concept.",
    "description": "Nothing of a photo is logged or kept. Errors are problem documents (RFC 9457). Where keys are "
    "configured, everything under `/v1` wants one: `Authorization: Bearer KEY` or `X-API-Key: KEY`.",
}

IMAGES = ("image/png", "image/jpeg", "image/webp")

_WHY = {
    400: "The upload is damaged or cut off.",
    401: "A key is wanted, or this one is not known.",
    403: "The key is not an administrator's.",
    404: "No such concept, version or pack is published; `near` holds names that resemble an unknown concept.",
    406: "`Accept` takes none of PNG, JPEG and WebP.",
    408: "The upload took too long.",
    413: "The upload has too many bytes or pixels.",
    415: "The upload is no JPEG, PNG or WebP, by its first bytes.",
    422: "A parameter is out of range, or the upload takes too long to decode.",
    429: "The key's edits of this minute are used up.",
    503: "Too many edits are waiting, or the service cannot edit now.",
}
_RETRY = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}


class EditOfSeveral(BaseModel):
    """What became of one concept: an image, or a problem."""

    concept: str = Field(examples=["charcoal"])
    status: int = Field(description="As a request for this concept alone would have.", examples=[200])
    type: str | None = Field(default=None, examples=["image/png"])
    image: str | None = Field(default=None, description="The file in base64.", examples=["iVBORw0KGgo…"])
    version: int | None = Field(default=None, examples=[3])
    digest: str | None = Field(default=None, examples=["0e1f9f2bd1b94d7aa6b1f1b7d0c2a3e4"])
    base: str | None = Field(default=None, examples=["8a5c0e2f6f0c4c7f9d0c1e2b3a495867"])
    problem: Problem | None = None


class Edits(BaseModel):
    """The edits of a photo, in the order they were asked for."""

    edits: list[EditOfSeveral]


class Health(BaseModel):
    status: str = Field(examples=["ok"])


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route."""
    return {
        status: {
            "description": _WHY[status],
            "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
            **({"headers": _RETRY} if status in (429, 503) else {}),
        }
        for status in statuses
    }


def browsing(kind: type[BaseModel]) -> dict[str, Any]:
    """Of a route that answers with such a document and an etag."""
    etag = {"ETag": {"description": "For If-None-Match.", "schema": {"type": "string"}}}
    return {
        "responses": {
            200: {"model": kind, "description": "What is published.", "headers": etag},
            304: {"description": "The client has it: If-None-Match names its etag."},
            **problems(401, 404, 422),
        },
        "openapi_extra": {"parameters": [_IF_NONE_MATCH]},
    }


_IF_NONE_MATCH = {"name": "If-None-Match", "in": "header", "required": False, "schema": {"type": "string"}}
_IMAGE = {"schema": {"type": "string", "format": "binary"}}
_PHOTO = {
    "requestBody": {
        "required": True,
        "description": "The photo: a JPEG, PNG or WebP file, whatever the Content-Type says, or a form with it.",
        "content": {
            **dict.fromkeys(IMAGES, _IMAGE),
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {"image": {"type": "string", "format": "binary"}},
                }
            },
        },
    }
}


def _header(description: str, example: Any, kind: str = "string") -> dict[str, Any]:
    return {"description": description, "schema": {"type": kind}, "example": example}


_TIMING = {"Server-Timing": _header("Milliseconds of each step.", "receive;dur=0.4, decode;dur=3.1, edit;dur=71.0")}
_DIGEST = "0e1f9f2bd1b94d7aa6b1f1b7d0c2a3e4"

EDIT: dict[str, Any] = {
    "response_class": Response,
    "responses": {
        200: {
            "description": "The edited photo.",
            "content": dict.fromkeys(IMAGES, _IMAGE),
            "headers": {
                "X-Adapter-Version": _header("The version that edited it.", 3, "integer"),
                "X-Adapter-Digest": _header("That version's adapter.", _DIGEST),
                "X-Base-Digest": _header("The base that the adapter belongs to.", "8a5c0e2f6f0c4c7f9d0c1e2b3a495867"),
                **_TIMING,
            },
        },
        **problems(400, 401, 404, 406, 408, 413, 415, 422, 429, 503),
    },
    "openapi_extra": _PHOTO,
}
EDITS: dict[str, Any] = {
    "response_class": JSONResponse,
    "responses": {
        200: {"model": Edits, "description": "The edits, and the problems of single concepts.", "headers": _TIMING},
        **problems(400, 401, 408, 413, 415, 422, 429, 503),
    },
    "openapi_extra": _PHOTO,
}
LINEAGE: dict[str, Any] = {
    "responses": {
        200: {
            "description": "`path`, `release` and `artifacts`, as `farm lineage --json` prints them.",
            "content": {"application/json": {"schema": {"type": "object"}}},
        },
        **problems(401, 404, 422),
    },
    "response_class": JSONResponse,
}
PREVIEW: dict[str, Any] = {
    "response_class": Response,
    "responses": {
        200: {"description": "The picture.", "content": {"image/webp": _IMAGE}},
        304: {"description": "The client has it: If-None-Match names its etag."},
        **problems(401, 404, 422),
    },
    "openapi_extra": {"parameters": [_IF_NONE_MATCH]},
}
PACK: dict[str, Any] = {
    "response_class": Response,
    "responses": {
        200: {
            "description": "The pack's files below one folder.",
            "content": {"application/zip": _IMAGE},
            "headers": {"Content-Disposition": _header("The file's name.", 'attachment; filename="coreml-5b1f.zip"')},
        },
        **problems(401, 404, 422, 503),
    },
}
HEALTH: dict[str, Any] = {
    "response_model": Health,
    "responses": {**problems(503)},
    "tags": ["service"],
}
METRICS: dict[str, Any] = {
    "response_class": Response,
    "responses": {200: {"description": "Prometheus' text format.", "content": {"text/plain": {}}}},
    "tags": ["service"],
}
ADMIN: dict[str, Any] = {
    "responses": {
        200: {
            "description": "How many replicas did it.",
            "content": {"application/json": {"example": {"replicas": 2}}},
        },
        **problems(401, 403, 404, 422, 503),
    }
}
