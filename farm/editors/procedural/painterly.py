"""Styles of line and brush: the photograph redrawn."""

from __future__ import annotations

import numpy as np

from farm.editors.procedural.filters import (
    Pixels,
    blocks,
    blur,
    edges,
    flatten,
    grain,
    lattice,
    levels,
    luma,
    mix,
    ramp,
    rgb,
    saturate,
    screen,
    slope,
    step,
)


def charcoal(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Black strokes along edges, smudged shadows, warm paper."""
    light = luma(image)
    strokes = step(edges(image, 0.012), 0.02, 0.13)
    smudge = 1 - step(blur(light, 0.015), 0.0, 0.5)
    ink = 1 - (1 - 0.9 * strokes) * (1 - 0.75 * smudge)
    return ramp(1 - ink + grain(image, rng), "#161412", "#8b8781", "#f4f1ea")


def watercolour(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Thin bright washes that pool dark at their borders and leave the lights as bare paper."""
    wash = saturate(flatten(blur(image, 0.008), 0.04), 1.7)
    pale = 1 - (1 - wash ** np.float32(0.7)) * 0.62
    paper = mix(pale, rgb("#fffdf6"), step(luma(wash), 0.5, 0.85) * 0.85)
    pooled = step(edges(wash, 0.012), 0.03, 0.12)
    return paper * (1 - 0.32 * pooled[..., None]) + grain(image, rng)[..., None]


def oil_painting(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Flat brush strokes in rich, dark, varnished colours, their ridges catching light."""
    strokes = saturate(flatten(image, 0.035), 2.0)
    varnished = step(strokes, 0.0, 1.0) * rgb("#ffc464")
    right, down = slope(luma(strokes), 0.008)
    return varnished + 1.2 * (right + down)[..., None]


def pointillism(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Dots of pure colour on light canvas: warm ones on a lattice, cool ones in its gaps."""
    y, x = lattice(image, 16)
    near = np.hypot(y % 1 - 0.5, x % 1 - 0.5)
    between = np.hypot((y + 0.5) % 1 - 0.5, (x + 0.5) % 1 - 0.5)
    pure = saturate(blur(image, 0.015), 2.2)
    canvas = np.broadcast_to(rgb("#fff6dc"), image.shape)
    warm = mix(canvas, pure * rgb("#ffb070") + rgb("#301000"), 1 - step(near, 0.34, 0.5))
    return mix(warm, pure * rgb("#70a0ff") + rgb("#000830"), 1 - step(between, 0.2, 0.36))


def comic(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Loud flat colours, ink outlines, printed dots in the shadows."""
    flat = flatten(image, 0.04)
    light = luma(flat)
    tone = 0.25 + 0.75 * levels(step(light, 0.0, 0.75), 4, soft=0.5)
    colour = (saturate(flat, 2.4) - light[..., None] + tone[..., None]).clip(0, 1)
    dots = screen((0.8 - tone).clip(0, 0.4), 16)
    lines = step(edges(image, 0.01), 0.05, 0.12)
    return mix(mix(colour, rgb("#2a1f8c"), 0.4 * dots), rgb("#08060c"), lines)


def pixel_art(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Large square pixels in the four greens of an old handheld console."""
    light = luma(blocks(image, 32))
    return ramp(levels(step(light, 0.0, 0.85), 4), "#0f380f", "#306230", "#8bac0f", "#c5dc3c")


def blueprint(image: Pixels, rng: np.random.Generator) -> Pixels:
    """White outlines on blue drafting paper."""
    lines = step(edges(image, 0.009), 0.02, 0.1)
    return mix(ramp(blur(luma(image), 0.02), "#0b2f7d", "#1a4fae"), rgb("#f2f8ff"), lines)


def neon(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Outlines as glowing tubes in the dark, in the colours of what they outline."""
    right, down = slope(luma(image), 0.02)
    lines = step(edges(image, 0.012), 0.03, 0.12)
    turn = step(right - down + 0.3 * (image[..., 0] - image[..., 2]), -0.08, 0.08)
    tubes = ramp(turn, "#00e5ff", "#b040ff", "#ff2d95") * lines[..., None]
    glowing: Pixels = tubes + 0.7 * blur(tubes, 0.025) + 0.25 * lines[..., None] ** 4
    return rgb("#07031a") + glowing


def stained_glass(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Jewel-coloured panes in a diamond lattice of lead, lead along outlines too."""
    y, x = lattice(image, 8)
    border = np.minimum(np.abs((x + y + 0.5) % 1 - 0.5), np.abs((x - y + 0.5) % 1 - 0.5))
    lead = np.maximum(1 - step(border, 0.04, 0.14), step(edges(image, 0.014), 0.09, 0.16))
    pane = saturate(blur(image, 0.035), 4.0)
    glass = step(pane, 0.05, 0.75)
    return mix(glass, rgb("#0a0a10"), lead)


def emboss(image: Pixels, rng: np.random.Generator) -> Pixels:
    """A relief in grey stone, lit from the upper left."""
    right, down = slope(luma(image), 0.012)
    return ramp((0.55 - 2.6 * (right + down)).clip(0, 1), "#1c1c1e", "#8e8e90", "#fbfbfa")


def linocut(image: Pixels, rng: np.random.Generator) -> Pixels:
    """One black ink, cut boldly: shadows and outlines print, lights are red paper."""
    light = luma(flatten(image, 0.03))
    local = light - 0.35 * (blur(light, 0.12) - 0.5)
    ink = np.maximum(1 - step(local, 0.36, 0.44), step(edges(image, 0.01), 0.07, 0.12))
    return mix(np.broadcast_to(rgb("#e8452c"), image.shape), rgb("#140c0c"), ink)
