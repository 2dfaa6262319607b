"""Numbers as the report prints them; what is None is a dash."""

from __future__ import annotations

from collections.abc import Callable

DASH = "—"


def number(value: float | None, digits: int = 3) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def distance(value: float | None) -> str:
    """Fréchet distances are a few thousandths or some hundred."""
    return DASH if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def count(value: float | None) -> str:
    return DASH if value is None else f"{value:,.0f}"


def size(value: float | None) -> str:
    return DASH if value is None else f"{value / 1e6:.1f} MB" if value >= 1e6 else f"{value / 1e3:.0f} kB"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return DASH
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 10 else f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def money(value: float | None, currency: str) -> str:
    return DASH if value is None else f"{value:,.2f} {currency}" if value >= 1 else f"{value:.3g} {currency}"


FILTERS: dict[str, Callable[..., str]] = {
    "number": number,
    "distance": distance,
    "count": count,
    "duration": duration,
    "size": size,
    "money": money,
}
