"""Requests to the web application in this process."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import httpx
import numpy as np
import PIL.Image
from tiny_farm import SIDE, TinyFarm

from e2gan.infer import edit_photo
from e2gan.pairs import Image
from farm.config import ServiceConfig
from farm.serve.bank import AdapterBank
from farm.serve.editing import Edited, Wanted
from farm.serve.listing import Described, Listing
from farm.serve.published import Published
from farm.serve.web import create_app

PHOTO = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def encoded(image: Image | PIL.Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture = PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(response: httpx.Response) -> Image:
    assert response.status_code == 200, response.text
    return np.asarray(PIL.Image.open(io.BytesIO(response.content)))


class Service:
    """Requests to an application in this process; its errors come as a server would send them."""

    def __init__(self, app: Any) -> None:
        self.transport = httpx.ASGITransport(app, raise_app_exceptions=False)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            async with httpx.AsyncClient(transport=self.transport, base_url="http://farm") as client:
                del client.headers["accept"]
                return await client.request(method, path, **options)

        return asyncio.run(send())

    def edit(self, concept: str, content: Any, **options: Any) -> httpx.Response:
        return self.request("POST", f"/v1/edit/{concept}", content=content, **options)


def service_of(farm: TinyFarm) -> Service:
    """The service over a farm, with a bank so small that concepts push each other out."""
    bank = AdapterBank(farm.store, byte_budget=1)

    def now(wanted: Wanted, photo: Image) -> Edited:
        loaded = bank.get(wanted.concept)
        image = edit_photo(loaded.generator, loaded.text, photo, longest_side=SIDE)
        return Edited(
            image=image, version=loaded.version, digest=loaded.digest, base=loaded.base, milliseconds={"edit": 1.25}
        )

    async def edit(wanted: Wanted, photo: Image) -> Edited:
        return await asyncio.to_thread(now, wanted, photo)

    published = Published(farm.store)
    listing = Listing(published, [Described(id="ink", prompt="an ink drawing", domain="scenery", category="drawing")])
    return Service(create_app(edit, published, listing, ServiceConfig(max_side=SIDE, max_body_mb=10)))
