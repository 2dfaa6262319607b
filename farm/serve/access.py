"""Who may use the service, and how much.

Keys are 256 random bits, so that a plain hash of one keeps it: nobody can try them all. A slow hash is for passwords.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Annotated

from fastapi import Request, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from farm.serve.config import ApiKey
from farm.serve.problems import ProblemError

PREFIX = "farm_"
"""Of every key: tools that look for leaked keys know it by that."""

_BEARER = HTTPBearer(auto_error=False, description="A key of the service.")
_HEADER = APIKeyHeader(name="X-API-Key", auto_error=False, description="The same in a header of its own.")


def new_key() -> tuple[str, str]:
    """A key, and the hash that the service is told of it."""
    key = PREFIX + secrets.token_urlsafe(32)
    return key, hash_of(key)


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class Access:
    """The keys of the service; anybody may use it when there are none."""

    def __init__(self, keys: Sequence[ApiKey], clock: Callable[[], float] = time.monotonic) -> None:
        self._keys = keys
        self._buckets = {key.name: _Bucket(key.per_minute, clock) for key in keys if key.per_minute}

    async def __call__(
        self,
        request: Request,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)] = None,
        header: Annotated[str | None, Security(_HEADER)] = None,
    ) -> None:
        """A dependency of every route that wants a key. ProblemError 401 without a known one."""
        if self._keys:
            request.state.key = self._known(bearer.credentials if bearer else header)

    async def admin(self, request: Request) -> None:
        """The same of a route that wants an administrator's. ProblemError 403 with another."""
        if not request.state.key.admin:
            raise ProblemError(403, "this key is not an administrator's")

    def spend(self, request: Request, edits: int = 1) -> None:
        """Count edits against the key's limit. ProblemError 429 when it is reached."""
        if self._keys and (bucket := self._buckets.get(request.state.key.name)):
            bucket.take(edits)

    def _known(self, given: str | None) -> ApiKey:
        headers = {"WWW-Authenticate": "Bearer"}
        if not given:
            raise ProblemError(401, "a key is wanted: Authorization: Bearer KEY, or X-API-Key: KEY", headers)
        hashed = hash_of(given)
        # All are compared, each in constant time: how long it takes tells nothing.
        matches = [key for key in self._keys if hmac.compare_digest(key.sha256, hashed)]
        if not matches:
            raise ProblemError(401, "this key is not known", headers)
        return matches[0]


class _Bucket:
    """Tokens that come back at a steady pace (a token bucket): as many at once as a minute brings."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._size = per_minute
        self._clock = clock
        self._tokens = float(per_minute)
        self._at = clock()

    def take(self, tokens: int) -> None:
        now = self._clock()
        self._tokens = min(self._size, self._tokens + (now - self._at) * self._size / 60)
        self._at = now
        if tokens > self._tokens:
            seconds = -int(-(min(tokens, self._size) - self._tokens) * 60 // self._size)
            raise ProblemError(
                429, f"this key is good for {self._size} edits a minute", {"Retry-After": str(max(1, seconds))}
            )
        self._tokens -= tokens
