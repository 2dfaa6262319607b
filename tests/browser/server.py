"""The service over a store in a process of its own, without Ray: `python server.py CONTROL SETTINGS…`.

For each of the settings it listens at a port, and prints them. CONTROL is a folder with which a test makes it busy or
slow: `busy`, how many edits are refused; `hold`, the concept whose edits wait until that file is gone.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvicorn

from e2gan.pairs import Image
from farm.serve.editing import Edited, Wanted
from farm.serve.editor import Editor
from farm.serve.listing import Listing
from farm.serve.problems import BusyError
from farm.serve.replicas import Replicas
from farm.serve.settings import Settings
from farm.serve.web import create_app


def main() -> None:
    control, *told = sys.argv[1:]
    settings = [Settings.model_validate_json(text) for text in told]
    editor = Editor(settings[0])
    editor.start()
    edit = editing(editor, Path(control))
    sockets, servers = [], []
    for one in settings:
        replicas = Replicas(max_waiting=one.max_waiting)
        app = create_app(edit, Listing(editor.published, one.concepts), one, replicas)
        sockets.append(socket.create_server(("127.0.0.1", 0)))
        servers.append(uvicorn.Server(uvicorn.Config(app, log_level="warning")))
    print(*(listening.getsockname()[1] for listening in sockets), flush=True)

    async def serve() -> None:
        pairs = zip(servers, sockets, strict=True)
        await asyncio.gather(*(server.serve(sockets=[listening]) for server, listening in pairs))

    asyncio.run(serve())


def editing(editor: Editor, control: Path) -> Callable[[Wanted, Image], Awaitable[Edited]]:
    """What edits in this process."""

    async def edit(wanted: Wanted, photo: Image) -> Edited:
        busy, hold = control / "busy", control / "hold"
        if busy.exists() and (left := int(busy.read_text())):
            busy.write_text(str(left - 1))
            raise BusyError
        while hold.exists() and hold.read_text() == wanted.concept:
            await asyncio.sleep(0.02)
        answer = await editor.edit(wanted, photo)
        if not isinstance(answer, Edited):
            raise answer
        return answer

    return edit


if __name__ == "__main__":
    main()
