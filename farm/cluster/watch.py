"""Following what workers do: their progress, and why they failed."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from e2gan.train import DivergedError
from farm.errors import UserError

Result = TypeVar("Result")

POLL_SECONDS = 0.5
WORKER_RETRIES = 3  # of work whose worker died; work that raised is not repeated


@dataclass(frozen=True)
class Failure:
    """Why a concept failed: a user's mistake in one sentence, or a bug with its traceback."""

    message: str
    traceback: str | None = None


@contextmanager
def followed(
    show: Callable[[dict[str, tuple[int, int, str]]], None],
) -> Iterator[Callable[[str], Callable[[Any], None]]]:
    """A place where workers leave their progress: yields `tell(key)`, a callable for a worker; `show` runs here."""
    import ray

    class Board:
        def __init__(self) -> None:
            self.told: dict[str, tuple[int, int, str]] = {}

        def tell(self, key: str, done: int, total: int, note: str) -> None:
            self.told[key] = (done, total, note)

        def read(self) -> dict[str, tuple[int, int, str]]:
            return self.told

    board: Any = ray.remote(num_cpus=0)(Board).remote()

    def tell(key: str) -> Callable[[Any], None]:
        def progress(done: Any) -> None:
            note = ", ".join(f"{name} {value:.3f}" for name, value in done.losses.items())
            board.tell.remote(key, done.step, done.steps, note)

        return progress

    stop = threading.Event()

    def follow() -> None:
        while not stop.wait(POLL_SECONDS):
            if told := ray.get(board.read.remote()):
                show(told)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield tell
    finally:
        stop.set()
        thread.join()
        ray.kill(board)


def in_thread(call: Callable[[], Result]) -> Result:
    """Run a call in a thread of its own and wait for it: a Ctrl-C then interrupts the wait.

    On the main thread Ray Train and Ray Tune put their own handler in its place, and Ray Train leaves it there.
    """
    outcome: Future[Result] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return outcome.result()


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and everything it wraps, as Ray wraps what a worker raised."""
    while error is not None:
        yield error
        for inner in getattr(error, "worker_failures", {}).values():
            yield from _causes(inner)
        error = getattr(error, "cause", None) or error.__cause__


def user_error(error: BaseException) -> UserError | None:
    """The mistake of the user's behind what Ray raised, if it is one."""
    from ray.exceptions import RayTaskError

    for cause in _causes(error):
        if isinstance(cause, UserError | DivergedError) and not isinstance(cause, RayTaskError):
            return UserError(str(cause))
    return None


def failure_of(error: BaseException) -> Failure:
    """What to tell of an error that Ray raised."""
    if mistake := user_error(error):
        return Failure(str(mistake))
    last = list(_causes(error))[-1]
    return Failure(f"{type(last).__name__}: {last}".splitlines()[0], "".join(traceback.format_exception(error)))
