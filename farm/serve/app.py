"""The service on Ray Serve: one deployment speaks HTTP, another holds the adapters and edits.

Started by `serve run farm.serve.app:build config=configs/demo.yaml`, `serve deploy serve.yaml` or `farm serve`.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import torch
from fastapi import FastAPI

from e2gan.infer import edit_photo
from e2gan.pairs import Image
from farm.errors import UserError
from farm.serve.bank import AdapterBank
from farm.serve.editing import Edited, Wanted
from farm.serve.listing import Listing
from farm.serve.problems import BusyError
from farm.serve.published import Published, UnknownConceptError
from farm.serve.settings import Settings
from farm.serve.web import create_app
from farm.store import open_store

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle


class Editing:
    """Edits photos with the published adapters of a store."""

    def __init__(self, settings: Settings) -> None:
        _keep_to_loopback()
        torch.set_num_threads(settings.cpus)
        self._bank = AdapterBank(open_store(settings.store), byte_budget=settings.cache_mb * 1_000_000)
        self._longest_side = settings.max_side

    def edit(self, wanted: Wanted, photo: Image) -> Edited | UnknownConceptError:
        """An unknown concept is returned rather than raised: Serve would log a traceback for it."""
        began = time.perf_counter()
        try:
            loaded = self._bank.get(wanted.concept)
        except UnknownConceptError as error:
            return error
        ready = time.perf_counter()
        image = edit_photo(loaded.generator, loaded.text, photo, longest_side=self._longest_side)
        steps = {"load": (ready - began) * 1e3, "edit": (time.perf_counter() - ready) * 1e3}
        return Edited(image=image, version=loaded.version, digest=loaded.digest, base=loaded.base, milliseconds=steps)


class Web:
    """Speaks HTTP and hands the decoded photos to `Editing`."""

    def __init__(self, settings: Settings, editing: DeploymentHandle[Editing]) -> None:
        _keep_to_loopback()
        self._settings = settings
        self._editing = editing

    def __serve_build_asgi_app__(self) -> FastAPI:
        published = Published(open_store(self._settings.store), seconds=self._settings.watch_seconds)
        published.follow()
        return create_app(self._edit, published, Listing(published, self._settings.concepts), self._settings)

    async def _edit(self, wanted: Wanted, photo: Image) -> Edited:
        from ray.serve.exceptions import BackPressureError

        try:
            edited: Edited | UnknownConceptError = await self._editing.edit.remote(wanted, photo)
        except BackPressureError as error:
            raise BusyError from error
        if isinstance(edited, UnknownConceptError):
            raise edited
        return edited


def build(args: dict[str, Any]) -> Application:
    """The application for `serve run` and `serve deploy`; the arguments are those of `Settings.of`."""
    settings = Settings.of(args)
    from ray import serve

    editing = serve.deployment(
        max_ongoing_requests=2,  # one edits while the other's adapter loads
        max_queued_requests=50,  # below what Web takes on, so that it is Web that says the service is busy
        ray_actor_options={"num_cpus": settings.cpus},
    )(Editing)
    web = serve.deployment(max_ongoing_requests=100, ray_actor_options={"num_cpus": 0})(serve.ingress()(Web))
    return web.bind(settings, editing.bind(settings))


def run(args: dict[str, Any], host: str = "127.0.0.1", port: int = 8000, *, block: bool = True) -> None:
    """Serve at `host:port` on the Ray this process is connected to, or on a local one started here.

    Prints the address and an example. With `block`, returns at Ctrl-C, having shut the service down.

    Raises:
        UserError: as in `Settings.of`; the address is taken; or Ray Serve runs on this Ray already.
    """
    settings = Settings.of(args)
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise UserError(
            f"The service cannot listen at {host}:{port} ({error.strerror}): choose another port."
        ) from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Despite its name it puts the ports of a Ray started here on 127.0.0.1; it is read when ray is imported.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray
    from ray import serve

    if not ray.is_initialized():
        ray.init(address="local", include_dashboard=False)
    if serve.status().proxies:
        raise UserError("Ray Serve runs already: `serve deploy serve.yaml` changes it, `serve shutdown` ends it.")
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    try:
        serve.run(build(args), name="farm", route_prefix="/")
        listed = [*Published(open_store(settings.store)).entries]
        url = f"http://{host}:{port}"
        print(f"{len(listed)} concepts at {url}/, for example:")
        print(f"curl --data-binary @photo.jpg {url}/v1/edit/{listed[0] if listed else 'CONCEPT'} > edited.png")
        if block:
            threading.Event().wait()
    except BaseException as error:
        serve.shutdown()  # type: ignore[no-untyped-call]
        if not isinstance(error, KeyboardInterrupt):
            raise


def _keep_to_loopback() -> None:
    """Where Ray itself is on 127.0.0.1, have it bind this replica's own gRPC port there too.

    Ray 2.60 binds that port, which handles do not use and which unpickles what it is sent, to every interface.
    """
    import ray
    from ray.serve._private import replica

    module: Any = replica
    if ray.util.get_node_ip_address() == "127.0.0.1":  # type: ignore[no-untyped-call]
        bind = module.add_port_to_grpc_server
        module.add_port_to_grpc_server = lambda server, address: bind(server, address.replace("[::]", "127.0.0.1"))
