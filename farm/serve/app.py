"""The service on Ray Serve: one deployment speaks HTTP, another holds the adapters and edits.

Started by `serve run farm.serve.app:build config=configs/demo.yaml`, `serve deploy serve.yaml` or `farm serve`.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from e2gan.pairs import Image
from farm.errors import UserError
from farm.serve.editing import Answer, Edited, UnavailableError, Wanted
from farm.serve.editor import HEALTHY_SECONDS, Editor, Job
from farm.serve.listing import Listing
from farm.serve.problems import BusyError
from farm.serve.published import Published
from farm.serve.replicas import Replicas
from farm.serve.settings import Settings
from farm.serve.web import create_app
from farm.signing import open_keys
from farm.store import open_store

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

_log = logging.getLogger(__name__)

_BATCH_SECONDS = 0.005  # for how long a GPU waits for more photos
_LISTEN_SECONDS = 5.0
_TELL_SECONDS = 30.0


class Editing:
    """Edits photos with the published adapters of a store."""

    def __init__(self, settings: Settings) -> None:
        _keep_to_loopback()
        self._editor = Editor(settings)
        if settings.gpus:
            from ray import serve

            @serve.batch(max_batch_size=settings.batch, batch_wait_timeout_s=_BATCH_SECONDS)
            async def collect(jobs: list[Job]) -> list[Edited]:
                return await self._editor.together(jobs)

            self._editor.collect = collect
        self._editor.start()

    async def edit(self, wanted: Wanted, photo: Image) -> Answer:
        return await self._editor.edit(wanted, photo)

    def tell(self, method: str, *args: Any) -> Any:
        """Run a method of the editor's in one of Serve's threads."""
        return getattr(self._editor, method)(*args)

    def check_health(self) -> None:
        """Asked by Serve every few seconds: an exception has the replica replaced."""
        self._editor.check()


class Web:
    """Speaks HTTP and hands the decoded photos to `Editing`."""

    def __init__(self, settings: Settings, editing: DeploymentHandle[Editing]) -> None:
        _keep_to_loopback()
        self._settings = settings
        self._editing = editing
        self._ended = threading.Event()
        self._replicas = Replicas(fewest=settings.replicas, max_waiting=settings.max_waiting)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self.application()

    def application(self) -> FastAPI:
        """What speaks HTTP; `app.state.close()` ends its threads, and the processes that decode."""
        settings = self._settings
        keys = open_keys(None, settings.public_keys)
        published = Published(open_store(settings.store), keys, seconds=settings.watch_seconds)
        published.follow()
        listening = threading.Thread(target=self._listen, name="replicas", daemon=True)
        listening.start()
        listing = Listing(published, settings.concepts)
        app = create_app(self._edit, listing, settings, self._replicas, self._broadcast)
        close = app.state.close

        def end() -> None:
            self._ended.set()
            published.close()
            close()
            listening.join()

        app.state.close = end
        return app

    async def _edit(self, wanted: Wanted, photo: Image) -> Edited:
        from ray.serve.exceptions import BackPressureError

        try:
            answer: Answer = await self._editing.edit.remote(wanted, photo)
        except BackPressureError as error:
            raise BusyError from error
        if isinstance(answer, Edited):
            return answer
        if isinstance(answer, UnavailableError):
            raise BusyError(f"{answer} cannot be loaded now", 5)
        raise answer

    async def _broadcast(self, method: str, *args: Any) -> list[Any]:
        call = self._editing.broadcast("tell", method, *args)
        return await call.results_async(timeout_s=_TELL_SECONDS, return_exceptions=True)

    def _listen(self) -> None:
        """Have the replicas check themselves, and hear how they are."""
        while not self._ended.is_set():
            try:
                reports = self._editing.broadcast("tell", "check").results(
                    timeout_s=_TELL_SECONDS, return_exceptions=True
                )
            except Exception as error:  # none is running
                reports = [error]
            for report in reports:
                if isinstance(report, Exception):
                    _log.warning("an editing replica does not edit: %s", report)
                else:
                    self._replicas.hear(report)
            self._ended.wait(_LISTEN_SECONDS)


def build(args: dict[str, Any]) -> Application:
    """The application for `serve run` and `serve deploy`; the arguments are those of `Settings.of`."""
    settings = Settings.of(args)
    from ray import serve

    web = serve.deployment(max_ongoing_requests=100, ray_actor_options={"num_cpus": 0})(serve.ingress()(Web))
    return web.bind(settings, _editing(settings))


def _editing(settings: Settings) -> Application:
    from ray import serve

    # Web decides how many wait, and they wait in the replicas: Serve's own queue looks for a free one now and then.
    at_once = 2 * (1 + settings.max_waiting)
    editing = serve.deployment(
        max_ongoing_requests=at_once,
        autoscaling_config={
            "min_replicas": settings.replicas,
            "max_replicas": settings.max_replicas or settings.replicas,
            "target_ongoing_requests": max(1, settings.max_waiting / 2),
        },
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        health_check_period_s=HEALTHY_SECONDS,
        health_check_timeout_s=60,
        logging_config={"enable_access_log": False},  # Web's says it all
    )(Editing)
    return editing.bind(settings)


def run(args: dict[str, Any], host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve until Ctrl-C; prints the address and an example.

    Raises:
        UserError: as in `Settings.of` and `running`.
    """
    settings = Settings.of(args)
    with suppress(KeyboardInterrupt), running(settings, host, port) as url:
        listed = [*Published(open_store(settings.store), open_keys(None, settings.public_keys)).entries]
        print(f"{len(listed)} concepts at {url}/, for example:")
        key = "-H 'X-API-Key: KEY' " if settings.keys else ""
        print(f"curl {key}--data-binary @photo.jpg {url}/v1/edit/{listed[0] if listed else 'CONCEPT'} > edited.png")
        threading.Event().wait()


@contextmanager
def running(settings: Settings, host: str = "127.0.0.1", port: int = 8000) -> Iterator[str]:
    """The service on one machine, on the Ray this process is connected to or on a local one started here; its address.

    This process speaks HTTP itself. Serve's proxy and an ingress replica behind it, which `build` has, would be two
    more processes on the way of every photo, with some 20 ms of processor time for each.

    Raises:
        UserError: the address is taken; or Ray Serve runs on this Ray already.
    """
    import uvicorn

    try:
        listening = socket.create_server((host, port))
    except OSError as error:
        raise UserError(
            f"The service cannot listen at {host}:{port} ({error.strerror}): choose another port."
        ) from error
    with closing(listening), _serving(settings) as web:
        app = web.application()
        config = uvicorn.Config(app, log_level="warning", timeout_keep_alive=75, timeout_graceful_shutdown=10)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],), name="http")
        thread.start()
        try:
            yield f"http://{host}:{port}"
        finally:
            server.should_exit = True
            thread.join()
            app.state.close()


@contextmanager
def _serving(settings: Settings) -> Iterator[Web]:
    """The editing replicas, and what hands them photos."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Despite its name it puts the ports of a Ray started here on 127.0.0.1; it is read when ray is imported.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # Photos of up to this many bytes go to a replica and back in the messages, not through Ray's object store.
    os.environ.setdefault("RAY_max_direct_call_object_size", str(2 << 20))
    # Threads that wait for each other give their core away: other processes of the service may need it sooner.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Ten times a second, as is the default, costs a twentieth of a core.
    os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5")
    import ray
    from ray import serve

    with ExitStack() as stack:
        if not ray.is_initialized():
            stack.enter_context(ray.init(address="local", include_dashboard=False))
        if serve.status().applications:
            raise UserError("Ray Serve runs already: `serve deploy serve.yaml` changes it, `serve shutdown` ends it.")
        serve.start(proxy_location="Disabled")
        stack.callback(serve.shutdown)
        yield Web(settings, serve.run(_editing(settings), name="farm", route_prefix=None))


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
