"""Decoding in processes of their own, which can be ended: what an upload does to a decoder stays there.

`python -m farm.serve.decoder` is such a process: it reads requests from its standard input and writes answers to its
standard output, each a line of JSON and the bytes that the line counts.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from farm.images import ImageError, ImageFormatError, ImageSizeError
from farm.serve.photos import Prepared, prepare

if TYPE_CHECKING:
    from e2gan.pairs import Image

PROCESSES = 2

_BYTES_A_PIXEL = 24  # of memory at most while a photo is decoded: RGBA, its conversions and the resized layers
_OWN_BYTES = 1_000_000_000  # of addresses, most of them never touched
_KINDS = {kind.__name__: kind for kind in (ImageError, ImageFormatError, ImageSizeError)}


class SlowImageError(ImageError):
    """An image that takes longer to decode than it may."""


class Decoders:
    """Decodes uploads in a few processes.

    seconds: how long one may take; then its process is ended and another one takes its place.
    max_pixels: of an upload; a process cannot take more memory than that many need.
    """

    def __init__(self, *, seconds: float, max_pixels: int, processes: int = PROCESSES) -> None:
        self._seconds = seconds
        self._max_pixels = max_pixels
        self._own = threading.local()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._threads = ThreadPoolExecutor(processes, "decode", self._start)
        self._threads.submit(self._own.__getattribute__, "process")  # so that the first one is there in time

    async def __call__(self, data: bytes, *, max_side: int, size: int | None) -> Prepared:
        """What `prepare` makes of the upload.

        Raises:
            ImageError: as in `prepare`; SlowImageError, it takes too long.
        """
        asked = {"max_side": max_side, "size": size, "max_pixels": self._max_pixels}
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._decode, data, asked)

    def close(self) -> None:
        """End the processes, once they have decoded what they were given."""
        self._threads.shutdown()
        for process in [*self._processes]:
            self._end(process)

    def _decode(self, data: bytes, asked: dict[str, Any]) -> Prepared:
        process = self._own.process
        if process.poll() is not None:
            self._end(process)
            process = self._start()
        assert process.stdin is not None and process.stdout is not None
        slow = threading.Event()

        def end() -> None:
            slow.set()
            process.kill()

        timer = threading.Timer(self._seconds, end)
        timer.start()
        try:
            _send(process.stdin, asked, data)
            told, layers = _receive(process.stdout)
        except (EOFError, OSError):
            self._end(process)
            if slow.is_set():
                raise SlowImageError(f"the upload: it takes longer than {self._seconds:g} s to decode.") from None
            raise ImageError("the upload: the image file is damaged (its decoder gave up).") from None
        finally:
            timer.cancel()
        if "error" in told:
            raise _KINDS[told["kind"]](told["error"])
        return _unpacked(told, layers)

    def _start(self) -> subprocess.Popen[bytes]:
        """Give this thread a process, and wait until it listens."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        memory = str(_OWN_BYTES + _BYTES_A_PIXEL * self._max_pixels)
        process = self._own.process = subprocess.Popen(
            [sys.executable, "-m", "farm.serve.decoder", memory],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # a Ctrl-C is not for it; it ends with its standard input
        )
        self._processes.add(process)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        with process:  # closes its pipes and waits for it
            self._processes.discard(process)


def main() -> None:
    """Answer until the standard input ends."""
    import resource

    memory = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    answers.write(b"ready\n")
    answers.flush()
    while True:
        try:
            asked, data = _receive(requests)
        except EOFError:
            return
        try:
            told, layers = _packed(prepare(data, **asked))
        except ImageError as error:
            told, layers = {"error": str(error), "kind": type(error).__name__}, b""
        _send(answers, told, layers)


def _send(pipe: IO[bytes], told: dict[str, Any], data: bytes) -> None:
    pipe.write(json.dumps({**told, "bytes": len(data)}).encode() + b"\n")
    pipe.write(data)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    """EOFError when the other side is gone."""
    line = pipe.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    told = json.loads(line)
    count = told.pop("bytes")
    data = pipe.read(count)
    if len(data) < count:
        raise EOFError
    return told, data


def _packed(prepared: Prepared) -> tuple[dict[str, Any], bytes]:
    told = {"shape": prepared.photo.shape, "size": prepared.size}
    alpha = b"" if prepared.alpha is None else prepared.alpha.tobytes()
    return told, prepared.photo.tobytes() + alpha


def _unpacked(told: dict[str, Any], layers: bytes) -> Prepared:
    height, width, channels = told["shape"]
    count = height * width * channels
    photo = np.frombuffer(layers, np.uint8, count).reshape(height, width, channels)
    size = (told["size"][0], told["size"][1])
    alpha: Image | None = None
    if len(layers) > count:
        alpha = np.frombuffer(layers, np.uint8, offset=count).reshape(size[1], size[0])
    return Prepared(photo=photo, size=size, alpha=alpha)


if __name__ == "__main__":
    main()
