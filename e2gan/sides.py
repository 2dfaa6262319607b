"""The sizes that photos are edited at, for those who have no network at hand."""

from __future__ import annotations


def working_size(width: int, height: int, *, longest_side: int) -> tuple[int, int]:
    """Width and height that a photo of this size is edited at: at most `longest_side`, multiples of 8, at least 16.

    Raises:
        ValueError: longest_side is below 16, the smallest side the network takes.
    """
    if longest_side < 16:
        raise ValueError(f"longest_side must be at least 16, not {longest_side}")
    factor = min(1.0, longest_side / max(height, width))
    width, height = (max(2, min(round(side * factor / 8), longest_side // 8)) * 8 for side in (width, height))
    return width, height
