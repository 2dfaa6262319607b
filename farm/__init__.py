"""The concept farm: orchestration of E2GAN training over a cluster, from photos to served adapters.

`from farm import Farm` is a farm from Python; importing this package by itself costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from farm.api import Farm as Farm

__all__ = ["Farm"]


def __getattr__(name: str) -> Any:
    if name == "Farm":
        from farm.api import Farm

        return Farm
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
