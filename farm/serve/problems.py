"""Every error is a problem document (RFC 9457)."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from farm.images import ImageError, ImageFormatError, ImageSizeError
from farm.serve.published import UnknownConceptError


class Problem(BaseModel):
    """An error, as RFC 9457 has it. near: of an unknown concept, published ids that resemble it."""

    model_config = ConfigDict(title="Problem")

    type: str = "about:blank"
    title: str = Field(examples=["Not Found"])
    status: int = Field(examples=[404])
    detail: str = Field(examples=["no concept 'zombi' is published; did you mean zombie?"])
    near: list[str] | None = Field(default=None, examples=[["zombie"]])


class ProblemError(Exception):
    """An error to be told to the client."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, detail)
        self.status = status
        self.detail = detail
        self.headers = headers


class BusyError(ProblemError):
    """More edits are waiting than the service takes on, or it cannot edit now."""

    def __init__(self, detail: str = "too many edits are waiting; try again shortly", seconds: int = 1) -> None:
        super().__init__(503, detail, {"Retry-After": str(seconds)})


def problem_of(error: Exception) -> tuple[Problem, Mapping[str, str] | None]:
    """What the client is told of an error, and the headers that go with it."""
    match error:
        case ProblemError():
            return _problem(error.status, error.detail), error.headers
        case UnknownConceptError():
            return _problem(404, str(error), near=list(error.near)), None
        case ImageFormatError():
            return _problem(415, str(error)), None
        case ImageSizeError():
            return _problem(413, str(error)), None
        case ImageError():
            return _problem(400, str(error)), None
        case RequestValidationError():
            first = error.errors()[0]
            return _problem(422, f"{first['loc'][-1]}: {first['msg']}"), None
    return _problem(500, "something went wrong here; the service's log says what"), None


def answer(problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse(
        problem.model_dump(exclude_none=True), problem.status, headers, media_type="application/problem+json"
    )


def tell_problems(app: FastAPI) -> None:
    """Answer every error of the application with a problem document."""

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        details = {404: f"nothing is at {request.url.path}", 405: f"{request.method} is not possible here"}
        detail = details.get(error.status_code, str(error.detail))
        return answer(_problem(error.status_code, detail), error.headers)

    @app.exception_handler(ProblemError)
    @app.exception_handler(UnknownConceptError)
    @app.exception_handler(ImageError)
    @app.exception_handler(RequestValidationError)
    @app.exception_handler(Exception)  # this one the server logs
    async def told(_: Request, error: Exception) -> Response:
        return answer(*problem_of(error))


def _problem(status: int, detail: str, **members: Any) -> Problem:
    return Problem(title=HTTPStatus(status).phrase, status=status, detail=detail, **members)
