"""Curves as SVG: points to draw, and where the axes have their numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from farm.report.pictures import Facts

CURVE_POINTS = 40  # of a concept's curve, which is as wide as a thumb
CHART_POINTS = 160
LEFT, TOP, WIDTH, HEIGHT = 52, 10, 560, 180  # of a chart's plane, in the units of its picture
TICKS = 5

Line = Sequence[tuple[float, float]]


def curve_of(losses: Sequence[Mapping[str, float]]) -> Facts | None:
    """The training L1, thinned, as points of an SVG polyline in a box of 100 x 24; None without any."""
    if not losses:
        return None
    kept = _thinned(losses, CURVE_POINTS)
    top, end = max(loss["l1"] for loss in kept) or 1, losses[-1]["step"]
    points = dict.fromkeys(f"{100 * loss['step'] / end:.0f},{23 - 22 * loss['l1'] / top:.1f}" for loss in kept)
    return {"points": " ".join(points), "first": losses[0]["l1"], "last": losses[-1]["l1"], "step": int(end)}


def loss_charts(losses: Sequence[Mapping[str, float]]) -> list[Facts]:
    """A chart of every loss over the steps; a loss may join late."""
    kept = _thinned(losses, CHART_POINTS)
    names = dict.fromkeys(name for row in losses for name in row if name != "step")
    return [
        {"name": name, **chart_of({name: [(row["step"], row[name]) for row in kept if name in row]})} for name in names
    ]


def chart_of(lines: Mapping[str, Line], *, whole: bool = False) -> Facts:
    """Lines in one plane that begins at 0 below: their points, and ticks as (place, number) along both axes.

    whole: whether x counts something, so that every whole number has its tick.
    """
    xs = [x for line in lines.values() for x, _ in line]
    ys = [y for line in lines.values() for _, y in line]
    left, right, top = min(xs), max(xs), max(max(ys), 1e-9)
    across = (right - left) or 1

    def place(x: float, y: float) -> tuple[float, float]:
        return round(LEFT + WIDTH * (x - left) / across, 1), round(TOP + HEIGHT * (1 - y / top), 1)

    x_ticks = [float(x) for x in sorted({*xs})] if whole else _ticks(left, right)
    return {
        "lines": [(name, [place(x, y) for x, y in line]) for name, line in lines.items()],
        "x_ticks": [(place(x, 0)[0], f"{x:,.0f}") for x in x_ticks],
        "y_ticks": [(place(left, y)[1], f"{y:.3g}") for y in _ticks(0, top)],
        "box": (LEFT, TOP, WIDTH, HEIGHT),
    }


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between the two."""
    if high <= low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / TICKS))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= TICKS)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def _thinned(rows: Sequence[Mapping[str, float]], most: int) -> list[Mapping[str, float]]:
    return [rows[i * (len(rows) - 1) // (most - 1)] for i in range(most)] if len(rows) > most else list(rows)
