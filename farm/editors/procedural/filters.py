"""The parts styles are made of. Pixels are float32 in 0..1; lengths are fractions of the shorter side."""

from __future__ import annotations

from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.floating[Any]]
"""float32, 0..1: RGB colour `[h, w, 3]` or one plane `[h, w]`."""


def auto_levels(image: Pixels) -> Pixels:
    """The photo as "auto levels" leaves it: every channel brought to mean 0.5 and standard deviation 0.22, clipped.

    Every style starts from it: instance norm makes the student blind to a photo's exposure and colour cast, so an
    edit that depended on them could not be learned.
    """
    mean, deviation = image.mean((0, 1)), image.std((0, 1))
    levelled: Pixels = ((image - mean) / (deviation + 0.02) * 0.22 + 0.5).clip(0, 1)
    return levelled


def side(image: Pixels) -> int:
    """The shorter side in pixels."""
    return int(min(image.shape[:2]))


def luma(image: Pixels) -> Pixels:
    """Brightness `[h, w]` of colours (Rec. 601)."""
    return image @ np.array([0.299, 0.587, 0.114], np.float32)


def tint(plane: Pixels, colour: str) -> Pixels:
    """Colour `[h, w, 3]` of a plane whose ones have the hex `colour` and whose zeros are black."""
    return plane[..., None] * rgb(colour)


def mix(first: Pixels, second: Pixels | NDArray[Any], amount: Pixels | float) -> Pixels:
    """`first` where `amount` is 0, `second` where it is 1; a plane of amounts spreads over colours."""
    weight = amount[..., None] if isinstance(amount, np.ndarray) and amount.ndim < first.ndim else amount
    return first + (second - first) * weight


def rgb(colour: str) -> Pixels:
    """`"#ff8000"` as three floats."""
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)], np.float32) / 255


def ramp(plane: Pixels, *colours: str) -> Pixels:
    """Map 0..1 to evenly spaced hex colours, darkest value first."""
    stops = np.linspace(0, 1, len(colours))
    table = np.stack([rgb(colour) for colour in colours])
    return np.stack([np.interp(plane, stops, table[:, c]) for c in range(3)], axis=-1).astype(np.float32)


def step(values: Pixels, low: float, high: float) -> Pixels:
    """0 below `low`, 1 above `high`, a smooth S between."""
    t = ((values - low) / (high - low)).clip(0, 1)
    eased: Pixels = t * t * (3 - 2 * t)
    return eased


def levels(plane: Pixels, count: int, *, soft: float = 0.25) -> Pixels:
    """Posterise 0..1 to `count` even levels; `soft` is the part of a level spent passing to the next one."""
    scaled = plane.clip(0, 1) * (count - 1)
    floor = np.floor(scaled)
    stepped: Pixels = floor + step(scaled - floor, 0.5 - soft / 2, 0.5 + soft / 2)
    return stepped / (count - 1)


def saturate(image: Pixels, factor: float) -> Pixels:
    """Move colours away from grey (factor above 1) or towards it."""
    grey = luma(image)[..., None]
    return (grey + (image - grey) * np.float32(factor)).clip(0, 1)


def blur(image: Pixels, radius: float) -> Pixels:
    """Gaussian blur, `radius` its standard deviation."""
    sigma = radius * side(image)
    return cast(Pixels, cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REFLECT))


def slope(plane: Pixels, radius: float) -> tuple[Pixels, Pixels]:
    """Change of a blurred plane to the right and downwards over one `radius`: free of the image's size."""
    smooth = blur(plane, radius)
    scale = radius * side(plane) / 2
    padded = np.pad(smooth, 1, mode="edge")
    right = (padded[1:-1, 2:] - padded[1:-1, :-2]) * np.float32(scale)
    down = (padded[2:, 1:-1] - padded[:-2, 1:-1]) * np.float32(scale)
    return right, down


def edges(image: Pixels, radius: float = 0.012) -> Pixels:
    """Edge strength `[h, w]`: the steepest channel's change over a radius, 0.4 at most."""
    found = [np.hypot(*slope(np.ascontiguousarray(image[..., c]), radius)) for c in range(3)]
    steepest: Pixels = np.max(found, axis=0)
    return steepest


def flatten(image: Pixels, radius: float) -> Pixels:
    """Generalised Kuwahara filter: every pixel becomes the mean of the quietest of the quadrants it touches.

    The choice is a weighted mean rather than a minimum, so the result varies smoothly with the image.
    """
    size = 2 * max(1, round(radius * side(image) / 2)) + 1
    grey = luma(image)
    mean = cast(Pixels, cv2.blur(image, (size, size), borderType=cv2.BORDER_REFLECT))
    square = cast(Pixels, cv2.blur(grey * grey, (size, size), borderType=cv2.BORDER_REFLECT))
    variance = np.maximum(square - luma(mean) ** 2, 0)
    weight = (1 / (variance + np.float32(2e-4))) ** 3
    half = size // 2
    stacked = np.dstack([mean * weight[..., None], weight])
    padded = np.pad(stacked, ((half, half), (half, half), (0, 0)), mode="edge")
    height, width = grey.shape
    total = sum(padded[y : y + height, x : x + width] for y in (0, 2 * half) for x in (0, 2 * half))
    assert isinstance(total, np.ndarray)
    return total[..., :3] / total[..., 3:]


def lattice(image: Pixels, cells: int) -> tuple[Pixels, Pixels]:
    """Coordinates `y, x` (each `[h, w]`) counted in square cells, `cells` of them along the shorter side."""
    height, width = image.shape[:2]
    scale = cells / side(image)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    return (y + 0.5) * np.float32(scale), (x + 0.5) * np.float32(scale)


def blocks(image: Pixels, cells: int) -> Pixels:
    """Every pixel becomes the mean of its lattice cell."""
    height, width = image.shape[:2]
    cell = side(image) / cells
    small = (max(1, round(width / cell)), max(1, round(height / cell)))
    if small[0] >= width or small[1] >= height:
        return image
    reduced = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
    return cast(Pixels, cv2.resize(reduced, (width, height), interpolation=cv2.INTER_NEAREST))


def screen(darkness: Pixels, cells: int) -> Pixels:
    """Halftone: ink 0..1 in dots on a lattice turned by 45 degrees, larger where `darkness` is."""
    y, x = lattice(darkness, cells)
    spot = (np.cos(2 * np.pi * (x + y)) + np.cos(2 * np.pi * (x - y))) / 4 + 0.5
    return step(1.24 * darkness + spot, 1.0, 1.24)


def grain(image: Pixels, rng: np.random.Generator) -> Pixels:
    """A plane of paper grain around 0, a few hundredths strong; the only random thing in the styles."""
    return blur(rng.standard_normal(image.shape[:2], np.float32), 1 / 110) * np.float32(0.025)
