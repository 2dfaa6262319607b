"""Using the page as people do."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image

KEY = "sesame"
"""Opens the farm that wants one."""


def choose(page, concept):
    page.locator(f'.tile:has(input[value="{concept}"])').click()


def edited(page, concept):
    """Waits until the photo is shown edited with the concept."""
    page.locator(f'#after[alt$=": {concept}"]').wait_for()
    page.locator("#frame:not(.busy)").wait_for()


def shown(page, selector="#frame"):
    """What can be seen there, uint8 `[h, w, 3]`, when nothing moves any more."""
    picture = page.locator(selector).screenshot(animations="disabled")
    return np.asarray(PIL.Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)
