"""The styles by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from farm.editors.procedural import painterly, tone
from farm.editors.procedural.filters import Pixels

Style = Callable[[Pixels, np.random.Generator], Pixels]
"""Edits one image; what leaves 0..1 is clipped afterwards."""

STYLES: Mapping[str, Style] = MappingProxyType(
    {
        "autumn": tone.autumn,
        "blueprint": painterly.blueprint,
        "charcoal": painterly.charcoal,
        "comic": painterly.comic,
        "cyanotype": tone.cyanotype,
        "emboss": painterly.emboss,
        "fog": tone.fog,
        "golden-hour": tone.golden_hour,
        "infrared": tone.infrared,
        "linocut": painterly.linocut,
        "neon": painterly.neon,
        "night": tone.night,
        "oil-painting": painterly.oil_painting,
        "pixel-art": painterly.pixel_art,
        "pointillism": painterly.pointillism,
        "pop-art": tone.pop_art,
        "risograph": tone.risograph,
        "sepia": tone.sepia,
        "stained-glass": painterly.stained_glass,
        "thermal": tone.thermal,
        "underwater": tone.underwater,
        "vaporwave": tone.vaporwave,
        "watercolour": painterly.watercolour,
        "winter": tone.winter,
        "x-ray": tone.x_ray,
    }
)
