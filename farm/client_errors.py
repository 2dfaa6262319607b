"""What can go wrong between a client and the service, as exceptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import httpx
from pydantic import BaseModel


class ServiceError(Exception):
    """What the service, or the way to it, answered instead of what was asked for.

    status: of HTTP, None where no answer came. detail: the service's own sentence. near: of an unknown concept,
    published ids that resemble it. retry_after: seconds after which a busy service wants to be asked again.
    """

    def __init__(
        self, status: int | None, detail: str, *, near: Sequence[str] = (), retry_after: float | None = None
    ) -> None:
        super().__init__(status, detail)
        self.status = status
        self.detail = detail
        self.near = tuple(near)
        self.retry_after = retry_after

    def __str__(self) -> str:
        return self.detail


class NotFoundError(ServiceError):
    """No such concept or version is published (404)."""


class KeyRefusedError(ServiceError):
    """The service wants a key, or another one (401, 403)."""


class RefusedError(ServiceError):
    """The photo is damaged, too large, too slow or none, or a parameter is out of range (400, 408, 413, 415, 422)."""


class BusyError(ServiceError):
    """The service takes on no more now (503), or no more from this key (429), after all tries."""


class UnreachableError(ServiceError):
    """No answer came: nobody listens there, or not in time."""


ERRORS: Mapping[int, type[ServiceError]] = {
    **dict.fromkeys((400, 408, 413, 415, 422), RefusedError),
    **dict.fromkeys((401, 403), KeyRefusedError),
    **dict.fromkeys((429, 503), BusyError),
    404: NotFoundError,
}


class Problem(BaseModel):
    """An error, as RFC 9457 has it."""

    detail: str = ""
    near: list[str] | None = None

    def error(self, status: int, detail: str = "", *, retry_after: float | None = None) -> ServiceError:
        """The exception for it; `detail` where it has none."""
        kind = ERRORS.get(status, ServiceError)
        return kind(status, self.detail or detail, near=self.near or (), retry_after=retry_after)


def error_of(response: httpx.Response) -> ServiceError:
    """The error that an answer without success stands for."""
    try:
        problem = Problem.model_validate_json(response.content)
    except ValueError:  # something on the way answered, not the service
        problem = Problem()
    after = response.headers.get("Retry-After", "")
    return problem.error(
        response.status_code,
        f"{response.url} answered {response.status_code} {response.reason_phrase}",
        retry_after=float(after) if after.isdecimal() else None,
    )
