"""What is asked of an editing replica, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from farm.serve.published import UnknownConceptError

if TYPE_CHECKING:
    from e2gan.pairs import Image


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """An edit. version: a published one, the current one when None. strength: 0 to 1, a factor on the adapter."""

    concept: str
    version: int | None = None
    strength: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Edited:
    """An edited photo, uint8 `[h, w, 3]`, and what edited it. milliseconds: duration of each step.

    report: the replica's own figures (`farm.serve.metrics`), empty when it tells none.
    """

    image: Image
    version: int
    digest: str
    base: str
    milliseconds: Mapping[str, float]
    report: Mapping[str, Any] = field(default_factory=dict)


class UnavailableError(Exception):
    """A published concept that cannot be loaded now: it is damaged, or the store is away."""


Answer = Edited | UnknownConceptError | UnavailableError
