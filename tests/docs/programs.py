"""`farm` and `python` for a shell, each a fork of one process that has loaded the libraries: `programs.py SOCKET`.

A shell's command takes some milliseconds instead of seconds. `shims` writes the programs, which hand their terminal,
folder, environment and arguments over and leave with the status that comes back.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
from pathlib import Path

_SHIM = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({socket!r})
told = json.dumps([{program!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(told).to_bytes(4, "big")], [0, 1, 2])
server.sendall(told)
sys.exit(server.recv(1)[0])
"""


def shims(folder: Path, address: Path) -> None:
    """Write `farm` and `python` into the folder; they ask the server that listens at the address."""
    folder.mkdir(parents=True)
    for program in ("farm", "python"):
        shim = folder / program
        shim.write_text(_SHIM.format(python=sys.executable, socket=str(address), program=program))
        shim.chmod(0o755)


def main() -> None:
    # What the commands of the pages import.
    import farm.catalogue
    import farm.cli
    import farm.cluster.inspect
    import farm.editors.procedural.filters
    import farm.serve.bank
    import farm.serve.web
    import farm.stages.adapt  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(sys.argv[1])
        server.listen()
        print("ready", flush=True)
        while True:
            asked, _ = server.accept()
            if not os.fork():
                _answer(asked)
            asked.close()


def _answer(asked: socket.socket) -> None:
    """Run the program in a fork, tell its status, and end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, terminal, _, _ = socket.recv_fds(asked, 4, 3)
    told = b""
    while len(told) < int.from_bytes(size, "big"):
        told += asked.recv(1 << 16)
    program, arguments, folder, environment = json.loads(told)
    if not (child := os.fork()):
        for number, descriptor in enumerate(terminal):
            os.dup2(descriptor, number)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        os._exit(_run(program, arguments))
    _, status = os.waitpid(child, 0)
    asked.sendall(bytes([os.waitstatus_to_exitcode(status) & 0xFF]))
    os._exit(0)


def _run(program: str, arguments: list[str]) -> int:
    try:
        if program == "farm":
            import farm.cli

            sys.argv = ["farm", *arguments]
            farm.cli.main()
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    main()
