"""Requests to the web application in this process."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import httpx
import numpy as np
import PIL.Image
from tiny_farm import SIDE, TinyFarm

from e2gan.pairs import Image
from farm.serve.editing import Edited, UnavailableError, Wanted
from farm.serve.editor import Editor
from farm.serve.listing import Listing
from farm.serve.problems import BusyError
from farm.serve.replicas import Replicas
from farm.serve.settings import Settings
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

    editor: Editor

    def __init__(self, app: Any) -> None:
        self.app = app
        self.transport = httpx.ASGITransport(app, raise_app_exceptions=False)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            async with httpx.AsyncClient(transport=self.transport, base_url="http://farm") as client:
                del client.headers["accept"]
                return await client.request(method, path, **options)

        return asyncio.run(send())

    def close(self) -> None:
        self.app.state.close()

    def edit(self, concept: str, content: Any, **options: Any) -> httpx.Response:
        return self.request("POST", f"/v1/edit/{concept}", content=content, **options)


def service_of(farm: TinyFarm, **settings: Any) -> Service:
    """The service over a farm, with so little memory for adapters that concepts push each other out."""
    settings = {"max_side": SIDE, "max_body_mb": 10, "cache_mb": 1} | settings
    described = [{"id": "ink", "prompt": "an ink drawing", "domain": "scenery", "category": "drawing"}]
    return service_with(Settings(store=farm.store.url, concepts=described, **settings))


def service_with(settings: Settings) -> Service:
    """The service with an editor in this process."""
    editor = Editor(settings)
    replicas = Replicas(max_waiting=settings.max_waiting)
    replicas.hear(editor.check())

    async def edit(wanted: Wanted, photo: Image) -> Edited:
        answer = await editor.edit(wanted, photo)
        if isinstance(answer, UnavailableError):
            raise BusyError(f"{answer} cannot be loaded now", 5)
        if not isinstance(answer, Edited):
            raise answer
        return answer

    async def broadcast(method: str, *args: Any) -> list[Any]:
        return [await asyncio.to_thread(getattr(editor, method), *args)]

    listing = Listing(editor.published, settings.concepts)
    service = Service(create_app(edit, listing, settings, replicas, broadcast))
    service.editor = editor
    return service
