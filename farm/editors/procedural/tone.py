"""Styles of light and colour: every pixel's new colour follows from its old one and its near surroundings."""

from __future__ import annotations

import numpy as np

from farm.editors.procedural.filters import (
    Pixels,
    blur,
    edges,
    flatten,
    grain,
    levels,
    luma,
    mix,
    ramp,
    rgb,
    saturate,
    screen,
    slope,
    step,
    tint,
)


def sepia(image: Pixels, rng: np.random.Generator) -> Pixels:
    """A faded brown print."""
    light = luma(image) ** 0.65
    return ramp(light, "#3a200c", "#94642f", "#d9ac6c", "#fff0cf") + grain(image, rng)[..., None]


def night(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Day for night: blue darkness, and lamplight where the photograph is brightest."""
    light = luma(image)
    dark = ramp(light, "#01030c", "#06143a", "#14306e", "#3c62a8")
    lamps = step(light, 0.72, 0.95)
    glow = 0.6 * lamps + 0.6 * blur(lamps, 0.03)
    return dark + tint(glow, "#c89a40")


def autumn(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Leaves of two kinds: crimson where the photograph is green or blue, gold where it is warm."""
    light = luma(image) ** 0.85
    crimson = ramp(light, "#22040a", "#a8160f", "#f26a16", "#ffdc8c")
    gold = ramp(light, "#2e1a00", "#b37a00", "#ffcb1f", "#fff2b0")
    warm = step(image[..., 0] - np.maximum(image[..., 1], image[..., 2]), -0.02, 0.16)
    return mix(crimson, gold, warm)


def winter(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Snow on everything that faces the sky, the rest pale and cold."""
    light = luma(image)
    cold = ramp(light**0.7, "#243a5e", "#7fa3cf", "#d3e6f7", "#ffffff")
    lying = step(slope(light, 0.015)[1], 0.015, 0.08)
    return mix(mix(cold, saturate(image, 0.8), 0.12), rgb("#fbfdff"), lying)


def fog(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Thick haze: little contrast, hardly a colour, soft outlines."""
    soft = saturate(blur(image, 0.012), 0.35)
    return mix(soft, rgb("#d3d6d4"), 0.68)


def golden_hour(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Low sun: orange light that blooms, purple shadows."""
    light = luma(image)
    sun = ramp(light**0.7, "#4a1a55", "#c9577a", "#ffb06a", "#ffe98f", "#fffbe0")
    bloom = tint(blur(step(light, 0.4, 0.95), 0.05), "#ffb030")
    return mix(image, sun, 0.85) + 0.25 * bloom


def thermal(image: Pixels, rng: np.random.Generator) -> Pixels:
    """A heat camera's false colours."""
    heat = blur(luma(image), 0.012)
    return ramp(heat, "#00002e", "#3b0fa0", "#c4156b", "#f7621c", "#ffd43a", "#fffff0")


def infrared(image: Pixels, rng: np.random.Generator) -> Pixels:
    """False-colour infrared film: leaves crimson and pink, skies deep teal."""
    light = luma(image)
    teal = ramp(light, "#0a2f3c", "#0b6470", "#62c4bf", "#f2fff6")
    leaves = ramp(light, "#24000f", "#d0104c", "#ff5f9c", "#ffe0ee")
    foliage = step(image[..., 1] - 0.5 * image[..., 0] - 0.5 * image[..., 2], -0.03, 0.05)
    return mix(mix(image[..., ::-1], teal, 0.7), leaves, 0.95 * foliage)


def cyanotype(image: Pixels, rng: np.random.Generator) -> Pixels:
    """A sun print in Prussian blue."""
    light = step(luma(image), -0.15, 1.0)
    return ramp(light, "#04163e", "#0f468c", "#6aa6d6", "#f2f8fb") + grain(image, rng)[..., None]


def x_ray(image: Pixels, rng: np.random.Generator) -> Pixels:
    """A radiograph: the negative, in cold blue, outlines shining."""
    glow = (1 - luma(image)) * 0.85 + 1.2 * edges(image, 0.01)
    return ramp(glow.clip(0, 1), "#000409", "#123a52", "#79b6c9", "#f4ffff")


def underwater(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Red light is swallowed, everything is teal and soft."""
    deep = ramp(blur(luma(image), 0.008) ** 0.9, "#00141f", "#00576b", "#1fb0a6", "#c4fff0")
    return mix(image * rgb("#10b0c0"), deep, 0.75)


def vaporwave(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Purple shadows, pink middles, cyan highlights."""
    light = step(luma(image), -0.1, 0.95)
    return ramp(light, "#1c0749", "#7a1fa8", "#ff4fb0", "#ff9ecb", "#5ff2f2", "#e8ffff")


def pop_art(image: Pixels, rng: np.random.Generator) -> Pixels:
    """A screen print in four flat, loud inks."""
    light = luma(flatten(image, 0.03))
    return ramp(levels(step(light, 0.0, 0.85), 4), "#2a0a6e", "#f0147d", "#ff9a00", "#fff23d")


def risograph(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Two spot inks, pink and teal, as overlapping halftones on cream paper."""
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    teal = screen(1 - (0.8 * red + 0.2 * green).clip(0, 1) ** 0.8, 16)
    pink = blur(1 - (0.6 * green + 0.4 * blue).clip(0, 1) ** 0.8, 0.008)
    paper = rgb("#fbf3df") * (1 - tint(pink, "#006648")) * (1 - tint(teal, "#ff5a50"))
    return paper + grain(image, rng)[..., None]
