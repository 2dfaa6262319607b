"""Routes for administrators: what every replica keeps in memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Path

from farm.serve import openapi
from farm.serve.problems import BusyError
from farm.serve.published import Published

Broadcast = Callable[..., Awaitable[list[Any]]]
"""Has every replica run a method of `farm.serve.editor.Editor`, by name; the results, exceptions among them."""

Concept = Annotated[str, Path(max_length=100, examples=["charcoal"])]


def admin_routes(broadcast: Broadcast, published: Published) -> APIRouter:
    """What is told to the replicas lasts as long as they do: `pinned` in the configuration lasts longer."""
    router = APIRouter(prefix="/v1/admin", tags=["admin"])

    async def told(method: str, *args: Any) -> dict[str, int]:
        answers = await broadcast(method, *args)
        failed = [answer for answer in answers if isinstance(answer, Exception)]
        if failed:
            raise BusyError(f"{len(failed)} of {len(answers)} replicas could not do it; the service's log says why", 5)
        return {"replicas": len(answers)}

    @router.post("/pin/{concept}", **openapi.ADMIN)
    async def pin(concept: Concept) -> dict[str, int]:
        """Load a concept and keep it in memory."""
        published.release(concept)
        return await told("pin", concept, True)

    @router.delete("/pin/{concept}", **openapi.ADMIN)
    async def unpin(concept: Concept) -> dict[str, int]:
        """Keep a concept in memory no longer than others."""
        return await told("pin", concept, False)

    @router.post("/evict/{concept}", **openapi.ADMIN)
    async def evict(concept: Concept) -> dict[str, int]:
        """Put a concept out of memory; the next request loads it anew."""
        return await told("evict", concept)

    @router.post("/reload", **openapi.ADMIN)
    async def reload() -> dict[str, int]:
        """Look at the registry now, and load what changed."""
        return await told("reload")

    return router
