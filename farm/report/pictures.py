"""Pictures small enough to travel inside a page."""

from __future__ import annotations

import base64
import io
from typing import Any

import PIL.Image

Facts = dict[str, Any]

PICTURE_WIDTH = 800  # a lossless sheet of 256-pixel pictures is 2 MB, and a report may show hundreds


def pictures_of(sheet: bytes, parts: int = 1) -> list[Facts]:
    """A sheet cut into `parts` of equal height, each small enough for a page: `data:` address, width, height."""
    pictures = []
    with PIL.Image.open(io.BytesIO(sheet)) as opened:
        whole = opened.convert("RGB")
    for part in range(parts):
        piece = whole.crop((0, whole.height * part // parts, whole.width, whole.height * (part + 1) // parts))
        piece.thumbnail((PICTURE_WIDTH, PICTURE_WIDTH * 4), PIL.Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        piece.save(buffer, format="WEBP", quality=85)
        uri = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        pictures.append({"uri": uri, "width": piece.width, "height": piece.height})
    return pictures
