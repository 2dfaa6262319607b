"""The wire to a server, which loses, cuts and changes what it carries when it is told to."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit

LOST = "the request is lost"
ANSWER_LOST = "the answer is lost"
CUT = "the second half of the answer's body is lost"
CHANGED = "a byte of the answer's body is changed"
TORN = "a byte of the request's body is changed"
BUSY = "the server says that it is busy"
CARRIED = "all is carried"

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"


class Wire(ThreadingHTTPServer):
    """fates: of the requests to come; then they are carried. carried: methods of those that reached the server."""

    daemon_threads = True

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.server_host = urlsplit(endpoint).netloc
        self.fates: list[str] = []
        self.carried: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Wire

    def carry(self) -> None:
        fate = self.server.fates.pop(0) if self.server.fates else CARRIED
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fate == TORN:
            body = flipped(body)
        if fate == LOST:
            self.close_connection = True
        elif fate == BUSY:
            self.send_response(503)
            self.answer({"Content-Length": str(len(SLOW_DOWN))}, SLOW_DOWN)
        else:
            self.forward(fate, body)

    def forward(self, fate: str, body: bytes) -> None:
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        server = http.client.HTTPConnection(self.server.server_host)
        server.request(self.command, self.path, body, headers)
        with server.getresponse() as answer:
            data = answer.read()
        server.close()
        self.server.carried.append(self.command)
        if fate == ANSWER_LOST:
            self.close_connection = True
            return
        self.send_response_only(answer.status)
        kept = {k: v for k, v in answer.getheaders() if k.lower() not in ("connection", "transfer-encoding")}
        if self.command != "HEAD":
            kept |= {"Content-Length": str(len(data))}
        self.answer(kept, data[: len(data) // 2] if fate == CUT else flipped(data) if fate == CHANGED else data)
        self.close_connection = fate == CUT

    def answer(self, headers: dict[str, str], data: bytes) -> None:
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = carry  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


def flipped(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:] if data else data


@contextmanager
def wire_to(endpoint: str) -> Iterator[Wire]:
    with Wire(endpoint) as wire:
        thread = Thread(target=wire.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield wire
        finally:
            wire.shutdown()
            thread.join()
