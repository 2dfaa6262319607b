"""The pictures of a page: read at a size that there is room for, and given the bytes that the page can spare."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import PIL.Image

from farm.threads import in_threads

Facts = dict[str, Any]

GAP = 2  # pixels between the pictures of a sheet (`farm.stages.pictures`)
WIDTH = 800  # of a sheet where there is room for all; a lossless one of 256-pixel pictures is 2 MB
FEWEST = 3  # columns of a sheet that are always shown
LEAST_SIDE = 64  # a picture is not made smaller than this while its sheet has more columns than FEWEST
BYTES_A_PIXEL = 0.2  # of photographs as WebP, at a quality between the ends
QUALITIES = (85, 75, 65, 55, 45, 35)
SHRINK = 0.8
CORES = os.cpu_count() or 1


@dataclass
class Picture:
    """A picture of a page. data: as WebP, once it is developed; `uri` is what an `img` shows."""

    image: PIL.Image.Image
    data: bytes = b""

    @property
    def width(self) -> int:
        return self.image.width

    @property
    def height(self) -> int:
        return self.image.height

    @property
    def uri(self) -> str:
        return f"data:image/webp;base64,{base64.b64encode(self.data).decode()}"


class Album:
    """All pictures of a page, for any number of threads. expected: how many there will be, roughly.

    bytes: what they may have together, as WebP, roughly: `develop` is told exactly.
    """

    def __init__(self, expected: int, bytes: int) -> None:
        self._pixels = bytes / max(1, expected) / BYTES_A_PIXEL
        self._pictures: list[Picture] = []
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._pictures)

    def add(self, sheet: bytes, rows: int, parts: int = 1) -> list[Picture]:
        """A sheet of `rows` rows of square pictures, cut into `parts` of equal height, with as many of its columns as
        there is room for, spread evenly."""
        with PIL.Image.open(io.BytesIO(sheet)) as opened:
            whole = opened.convert("RGB")
        side = (whole.height + GAP) // rows
        columns = (whole.width + GAP) // side
        each = rows // parts
        shown = max(min(columns, FEWEST), min(columns, int(self._pixels / each / LEAST_SIDE**2)))
        width = min(WIDTH, shown * max(1, int(math.sqrt(self._pixels / each / shown))), whole.width)
        chosen = [round(n * (columns - 1) / max(1, shown - 1)) for n in range(shown)]
        made = []
        for part in range(parts):
            top, height = part * each * side, each * side - GAP
            piece = PIL.Image.new("RGB", (shown * side - GAP, height), "white")
            for place, column in enumerate(chosen):
                left = column * side
                piece.paste(whole.crop((left, top, left + side - GAP, top + height)), (place * side, 0))
            made.append(self._keep(piece, width))
        return made

    def add_photo(self, image: PIL.Image.Image) -> Picture:
        """A picture as it is, made smaller where there is little room."""
        return self._keep(image, min(image.width, max(1, int(math.sqrt(self._pixels * image.width / image.height)))))

    def develop(self, budget: int) -> None:
        """Encode all pictures in at most `budget` bytes: as good as the best that leaves enough for the others, and
        smaller where even the worst does not."""

        def best(picture: Picture) -> None:
            picture.data = _encoded(picture.image, QUALITIES[0])

        def smaller(picture: Picture) -> None:
            picture.data = _within(picture, most)

        list(in_threads(best, self._pictures, CORES))
        most = _fair([len(picture.data) for picture in self._pictures], budget)
        list(in_threads(smaller, [p for p in self._pictures if len(p.data) > most], CORES))

    def _keep(self, image: PIL.Image.Image, width: int) -> Picture:
        height = max(1, round(image.height * width / image.width))
        if width < image.width:
            image = image.resize((width, height), PIL.Image.Resampling.LANCZOS)
        picture = Picture(image)
        with self._lock:
            self._pictures.append(picture)
        return picture


def _fair(sizes: Sequence[int], budget: int) -> int:
    """The most that each may have for all together to have `budget`: what one does not need is the others'."""
    left = budget
    for done, size in enumerate(sorted(sizes)):
        share = left // (len(sizes) - done)
        if size > share:
            return share
        left -= size
    return max(sizes, default=0)


def _within(picture: Picture, most: int) -> bytes:
    for quality in QUALITIES[1:]:
        if len(data := _encoded(picture.image, quality)) <= most:
            return data
    while len(data) > most and picture.width > 1:
        size = max(1, int(picture.width * SHRINK)), max(1, int(picture.height * SHRINK))
        picture.image = picture.image.resize(size, PIL.Image.Resampling.LANCZOS)
        data = _encoded(picture.image, QUALITIES[-1])
    return data


def _encoded(image: PIL.Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=quality)
    return buffer.getvalue()
