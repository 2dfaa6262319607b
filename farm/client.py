"""A client of the editing service: `Client("http://…").edit("photo.jpg", "zombie").image.save("zombie.png")`.

It needs neither PyTorch nor Ray. What it can ask for, and what it gets, is what the service's OpenAPI says.
"""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self
from urllib.parse import quote

import httpx
import PIL.Image
import tenacity
from PIL import ImageOps
from pydantic import BaseModel

from farm.client_errors import (
    BusyError,
    KeyRefusedError,
    NotFoundError,
    Problem,
    RefusedError,
    ServiceError,
    UnreachableError,
    error_of,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Photo = str | os.PathLike[str] | bytes | PIL.Image.Image | NDArray[np.uint8]

__all__ = [
    "BusyError",
    "Client",
    "Concept",
    "ConceptDetail",
    "ConceptPage",
    "Edit",
    "KeyRefusedError",
    "NotFoundError",
    "RefusedError",
    "ServiceError",
    "UnreachableError",
]

Format = Literal["png", "jpeg", "webp"]

PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


class Category(BaseModel):
    """A kind of concept, and how many there are of it."""

    id: str
    count: int


class Concept(BaseModel):
    """A published concept. metrics: what its adapter was judged by. preview: path of a picture of its edits."""

    id: str
    prompt: str | None
    domain: str | None
    category: str | None
    version: int
    digest: str
    metrics: dict[str, Any]
    preview: str


class Version(BaseModel):
    """A release of a concept. restores: the version whose adapter a rollback published again."""

    version: int
    action: str
    digest: str
    base: str
    published_at: str
    restores: int | None = None


class ConceptDetail(Concept):
    """A published concept with its history, oldest release first. lineage: path of what it was made from."""

    base: str
    history: list[Version]
    lineage: str


class ConceptPage(BaseModel):
    """A page of what was searched for. total: on all pages."""

    concepts: list[Concept]
    total: int
    page: int
    pages: int
    categories: list[Category]


@dataclass(frozen=True, kw_only=True)
class Edit:
    """An edited photo.

    image, data: the picture, and the file it came in. version, digest: of the adapter that edited it; base: of its
    base. timing: milliseconds of each of the service's steps.
    """

    concept: str
    image: PIL.Image.Image
    data: bytes
    version: int
    digest: str
    base: str
    timing: Mapping[str, float]


class Client:
    """A connection to the service at `url`; close it, or use it in a `with` statement. May be shared by threads.

    key: what the service knows its users by, where it asks for one. timeout: seconds for each step of a request.
    A service that is busy is asked again when it says, up to `tries` times in all, as long as that does not take more
    than `patience` seconds.

    Every method raises a ServiceError where the service does not answer with what was asked for.
    """

    def __init__(
        self, url: str, key: str | None = None, timeout: float = 60, *, tries: int = 5, patience: float = 60
    ) -> None:
        self._http = httpx.Client(
            base_url=url, timeout=timeout, headers={"Authorization": f"Bearer {key}"} if key else None
        )
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(BusyError),
            wait=_as_told,
            stop=tenacity.stop_after_attempt(tries) | tenacity.stop_before_delay(patience),
            reraise=True,
        )

    def edit(
        self,
        image: Photo,
        concept: str,
        *,
        size: int | None = None,
        quality: int | None = None,
        version: int | None = None,
        strength: float | None = None,
        format: Format = "png",
    ) -> Edit:
        """The photo edited with a concept.

        image: a path, a file's bytes, a Pillow image, or uint8 `[h, w]`, `[h, w, 3]` or `[h, w, 4]`.
        size: longest side of the answer in pixels, 1 to 4096; the photo's own when None. quality: of JPEG and WebP,
        1 to 100. version: a published one; the current one when None. strength: of the edit, 0 to 1.
        """
        response = self._request(
            "POST",
            f"v1/edit/{quote(concept, safe='')}",
            params={"size": size, "quality": quality, "version": version, "strength": strength},
            headers={"Accept": f"image/{format}"},
            content=_file(image),
        )
        headers = response.headers
        return Edit(
            concept=concept,
            image=_picture(response.content),
            data=response.content,
            version=int(headers["X-Adapter-Version"]),
            digest=headers["X-Adapter-Digest"],
            base=headers["X-Base-Digest"],
            timing=_timing(headers),
        )

    def edits(
        self,
        image: Photo,
        concepts: Sequence[str],
        *,
        size: int | None = None,
        quality: int | None = None,
        strength: float | None = None,
        format: Format = "png",
    ) -> list[Edit | ServiceError]:
        """The photo, sent once, edited with several concepts, in their order; see `edit`.

        What is wrong with a single concept is returned in its place.
        """
        response = self._request(
            "POST",
            "v1/edit",
            params={"concept": concepts, "size": size, "quality": quality, "strength": strength, "format": format},
            content=_file(image),
        )
        timing = _timing(response.headers)
        return [_one_of_several(one, timing) for one in response.json()["edits"]]

    def concepts(self, q: str = "", category: str | None = None, *, per_page: int = 200) -> Iterator[Concept]:
        """The published concepts whose id, prompt or category has all words of `q`, sorted by id.

        They are fetched `per_page` at a time, when they are needed.
        """
        page = pages = 1
        while page <= pages:
            found = self.page(q, category, page=page, per_page=per_page)
            yield from found.concepts
            page, pages = page + 1, found.pages

    def page(self, q: str = "", category: str | None = None, *, page: int = 1, per_page: int = 60) -> ConceptPage:
        """One page of the concepts, with how many there are in all and of each category."""
        params = {"q": q or None, "category": category, "page": page, "per_page": per_page}
        return ConceptPage.model_validate_json(self._request("GET", "v1/concepts", params=params).content)

    def concept(self, id: str) -> ConceptDetail:
        """A published concept and its history."""
        path = f"v1/concepts/{quote(id, safe='')}"
        return ConceptDetail.model_validate_json(self._request("GET", path).content)

    def preview(self, id: str, *, small: bool = False) -> PIL.Image.Image:
        """Rows of small pictures: test photos, the teacher's edits, and the concept's; or one column of that."""
        path, params = f"v1/concepts/{quote(id, safe='')}/preview.webp", {"small": small or None}
        return _picture(self._request("GET", path, params=params).content)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _request(
        self, method: str, path: str, *, params: Mapping[str, Any] | None = None, **sent: Any
    ) -> httpx.Response:
        given = {name: value for name, value in (params or {}).items() if value is not None}

        def once() -> httpx.Response:
            try:
                response = self._http.request(method, path, params=given, **sent)
            except httpx.TransportError as error:
                where = self._http.base_url
                raise UnreachableError(None, f"no answer from {where} ({error or type(error).__name__})") from error
            if not response.is_success:
                raise error_of(response)
            return response

        return self._retrying(once)


def _as_told(state: tenacity.RetryCallState) -> float:
    """Seconds until the next try: what the service said, else 1."""
    error = state.outcome and state.outcome.exception()
    return error.retry_after if isinstance(error, BusyError) and error.retry_after is not None else 1.0


def _timing(headers: httpx.Headers) -> dict[str, float]:
    steps = re.findall(r"([\w-]+);dur=([\d.]+)", headers.get("Server-Timing", ""))
    return {step: float(took) for step, took in steps}


def _one_of_several(one: Mapping[str, Any], timing: Mapping[str, float]) -> Edit | ServiceError:
    if problem := one.get("problem"):
        return Problem.model_validate(problem).error(one["status"])
    data = base64.b64decode(one["image"])
    own = {name: one[name] for name in ("concept", "version", "digest", "base")}
    return Edit(image=_picture(data), data=data, timing=timing, **own)


def _picture(data: bytes) -> PIL.Image.Image:
    picture = PIL.Image.open(io.BytesIO(data))
    picture.load()
    return picture


def _file(image: Photo) -> bytes:
    """A file with the photo: what is in memory becomes a PNG, upright, with its transparency and colour profile."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    if not isinstance(image, PIL.Image.Image):
        if image.dtype != "uint8":
            raise ValueError(f"a photo's array must be uint8, not {image.dtype}")
        image = PIL.Image.fromarray(image)
    image = ImageOps.exif_transpose(image)
    if image.mode not in PNG_MODES:
        image = image.convert("RGB")
        image.info.pop("icc_profile", None)  # it was one of the colours before
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
