"""Turns: one run at a time does a thing, and the others wait until it is done or has fallen silent."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from farm.leases import Hold, LeaseLostError, Leases, owner_name
from farm.stop import Stop
from farm.store import Store

FIRST_POLL_SECONDS = 1.0
LONGEST_POLL_SECONDS = 5.0

_log = logging.getLogger(__name__)


@contextmanager
def turn(
    store: Store, name: str, *, seconds: float, on_wait: Callable[[str], None], stop: Stop | None = None
) -> Iterator[None]:
    """Run the block while no other process runs one of this name.

    The turn is a lease, `queue/turns/<name>.json`. While another holds it, `on_wait(owner)` is called once and the
    turn is waited for: until it is given back, its owner is gone from this host, or has been silent for its `seconds`.
    A turn lost to another meanwhile is a warning in the log and no more: artifacts are committed by put-if-absent,
    so two at once only do work twice.

    Raises:
        StoppedError: `stop` was asked for while waiting.
    """
    leases = Leases(store, "queue/turns/")
    hold = _wait(leases, name, seconds, on_wait, stop or Stop())
    ended = threading.Event()
    keeper = threading.Thread(target=_keep, args=(leases, name, hold, ended), name=f"turn {name}", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join()


def _wait(leases: Leases, name: str, seconds: float, on_wait: Callable[[str], None], stop: Stop) -> Hold:
    owner, told, pause = owner_name(), False, FIRST_POLL_SECONDS
    while True:
        stop.check()
        if other := leases.watch(name):
            if not told:
                on_wait(other.owner)
                told = True
            time.sleep(pause)
            pause = min(1.25 * pause, LONGEST_POLL_SECONDS)
        elif hold := leases.take(name, owner, seconds):
            return hold


def _keep(leases: Leases, name: str, hold: Hold, ended: threading.Event) -> None:
    """Renew the turn until the block has ended, then give it back."""
    try:
        while not ended.wait(hold.seconds / 3):
            try:
                leases.renew(name, hold)
            except LeaseLostError:
                raise
            except Exception as error:  # a thread that dies of a passing trouble would lose the turn without a word
                _log.warning("the turn %s could not be renewed, trying again: %s", name, error)
        leases.release(name, hold)
    except LeaseLostError as error:
        _log.warning("this run goes on without the turn %s, which may do work twice: %s", name, error)
    except Exception as error:  # what is done is done: the others find the turn silent and go on
        _log.warning("the turn %s could not be given back: %s", name, error)
