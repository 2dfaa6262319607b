"""Following what workers do: their progress, and why they failed."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from e2gan.train import DivergedError
from farm.errors import StoreError, UserError
from farm.objects import StoreUnreachableError
from farm.stop import Stop, StoppedError

Result = TypeVar("Result")

POLL_SECONDS = 0.5
ANSWER_SECONDS = 10.0
WORKER_RETRIES = 3  # of work whose worker died; work that raised is not repeated


@dataclass(frozen=True)
class Failure:
    """Why a concept failed: a user's mistake in one sentence, or a bug with its traceback.

    lost: it was not its own doing, its worker died.
    """

    message: str
    traceback: str | None = None
    lost: bool = False


class Line:
    """What a worker holds to be in touch with the driver: call it with a `Progress`."""

    def __init__(self, board: Any, key: str) -> None:
        self._board, self._key = board, key

    def __call__(self, done: Any) -> None:
        note = ", ".join(f"{name} {value:.3f}" for name, value in done.losses.items())
        self._board.tell.remote(self._key, done.step, done.steps, note)

    def should_stop(self) -> bool:
        """Whether the driver asks everybody to checkpoint and stop."""
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        try:
            return bool(ray.get(self._board.stopping.remote(), timeout=ANSWER_SECONDS))
        except (RayActorError, GetTimeoutError):  # being started again
            return False


@contextmanager
def followed(show: Callable[[dict[str, tuple[int, int, str]]], None], stop: Stop) -> Iterator[Callable[[str], Line]]:
    """A place where workers leave their progress: yields `line(key)`, which a worker is given; `show` runs here."""
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Board:
        def __init__(self) -> None:
            self.told: dict[str, tuple[int, int, str]] = {}
            self.stop = False

        def tell(self, key: str, done: int, total: int, note: str) -> None:
            self.told[key] = (done, total, note)

        def read(self, stop: bool) -> dict[str, tuple[int, int, str]]:
            self.stop = stop
            return self.told

        def stopping(self) -> bool:
            return self.stop

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # Not on a spot node, which would take it along.
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here}
    board: Any = ray.remote(**options)(Board).remote()
    over = threading.Event()

    def follow() -> None:
        while not over.wait(POLL_SECONDS):
            with suppress(RayActorError, GetTimeoutError):  # being started again: what it knew is told anew
                if told := ray.get(board.read.remote(stop.asked), timeout=ANSWER_SECONDS):
                    show(told)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield lambda key: Line(board, key)
    finally:
        over.set()
        thread.join()
        ray.kill(board)


def ended(results: Collection[Any], timeout: float) -> list[Any]:
    """Those of Ray's results that are there, all of them; waits up to `timeout` seconds for the first."""
    import ray

    if not results:
        time.sleep(timeout)
        return []
    waiting = list(results)
    there: list[Any] = ray.wait(waiting, num_returns=len(waiting), timeout=0)[0]
    return there or ray.wait(waiting, timeout=timeout)[0]


def in_thread(call: Callable[[], Result], stop: Stop) -> Result:
    """Run a call in a thread of its own and wait for it: a Ctrl-C then interrupts the wait.

    On the main thread Ray Train and Ray Tune put their own handler in its place, and Ray Train leaves it there.

    Raises:
        StoppedError: the grace period of `stop` is over and the call is not.
    """
    outcome: Future[Result] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    while True:
        try:
            return outcome.result(timeout=POLL_SECONDS)
        except TimeoutError:
            if outcome.done():  # just now, or with a TimeoutError of its own
                return outcome.result()
            if stop.over:
                raise StoppedError from None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and everything it wraps, as Ray wraps what a worker raised."""
    while error is not None:
        yield error
        for inner in getattr(error, "worker_failures", {}).values():
            yield from causes(inner)
        yield from causes(getattr(error, "controller_failure", None))
        error = getattr(error, "cause", None) or error.__cause__


def user_error(error: BaseException) -> UserError | None:
    """The mistake of the user's behind what Ray raised, if it is one."""
    from ray.exceptions import RayTaskError

    for cause in causes(error):
        if isinstance(cause, UserError | DivergedError) and not isinstance(cause, RayTaskError):
            return cause if isinstance(cause, UserError) else UserError(str(cause))
    return None


def failure_of(error: BaseException) -> Failure:
    """What to tell of an error that Ray raised.

    Raises:
        StoreError: it is the store's, so that every other concept would fail of it too.
    """
    from ray.exceptions import RayError, RayTaskError

    for cause in causes(error):
        if isinstance(cause, StoreUnreachableError):
            raise StoreError(f"{cause}; the same command goes on when it is back.") from error
    if mistake := user_error(error):
        if isinstance(mistake, StoreError):
            raise mistake from error
        return Failure(str(mistake))
    last = list(causes(error))[-1]
    lost = isinstance(error, RayError) and not isinstance(error, RayTaskError)
    message = f"{type(last).__name__}: {last}".splitlines()[0]
    return Failure(message, "".join(traceback.format_exception(error)), lost)
