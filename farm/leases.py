"""Leases in the store: an object says who holds a key, and changes for as long as its owner lives.

No two clocks are compared. Who wants a key that another holds watches its object, and breaks the lease once the object
has stayed the same for the lease's `seconds` by the watcher's own monotonic clock; or at once when its owner ran on
this host and is gone: the rerun of a killed driver does not wait. A broken lease is taken over by compare-and-swap,
and its former holder, if it still lives, gets LeaseLostError.
"""

import os
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from farm.artifacts import dump, read
from farm.store import NotFoundError, Store


class LeaseLostError(Exception):
    """The owner fell silent and another has taken the lease, or somebody dropped it: abandon the work."""


class Hold(BaseModel):
    """What a lease's object says: `owner` renews it within `seconds`, or loses it.

    The token tells two leases of one owner apart, and every renewal changes the object. `expires_at`, in Unix seconds
    of the owner's clock, is for people and for single looks.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    owner: str
    token: str
    seconds: float
    expires_at: float
    renewals: int = 0


@dataclass(frozen=True)
class _Seen:
    """A hold, first seen as it is by `since`, and read again by a call that began at `asked_at` (monotonic)."""

    hold: Hold
    since: float
    asked_at: float


@dataclass
class Leases:
    """The leases in a folder of a store (`queue/turns/`), with what this process has seen of them.

    For one thread at a time, and for one host: what was seen is dated by its monotonic clock.
    """

    store: Store
    folder: str
    now: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    _seen: dict[str, _Seen] = field(default_factory=dict, init=False, repr=False, compare=False)

    def path(self, key: str) -> str:
        return f"{self.folder}{key}.json"

    def take(self, key: str, owner: str, seconds: float, *, by_clock: bool = False) -> Hold | None:
        """Hold the key; None while another does.

        `owner` is `owner_name()` of the process whose death should free it. Another's lease is broken only when earlier
        calls of `take` or `watch` have seen it as it is, so call again until it is yours. by_clock: go by `expires_at`
        instead, for who cannot wait; a live lease is stolen when the clocks differ.
        """
        hold = Hold(owner=owner, token=uuid.uuid4().hex, seconds=seconds, expires_at=self.now() + seconds)
        if not self.store.put_if_absent(self.path(key), dump(hold)):
            try:
                seen, etag = self._read(key)
            except NotFoundError:  # given back this moment: the next call gets it
                return None
            free = self._expired(seen.hold) if by_clock else _broken(seen, seen.asked_at)
            if not free or not self.store.replace_if_match(self.path(key), dump(hold), etag):
                return None
        self._note(key, hold)
        return hold

    def watch(self, key: str, remember: float = 0) -> Hold | None:
        """The hold that keeps others off the key; None when there is none or `take` would break it.

        remember: for how many seconds to rely on what was read before.
        """
        seen = self._seen.get(key)
        if seen is None or self.monotonic() - seen.asked_at >= remember:
            try:
                seen, _ = self._read(key)
            except NotFoundError:
                return None
        return None if _broken(seen, self.monotonic()) else seen.hold

    def look(self, key: str) -> Hold | None:
        """The hold that has neither expired by this host's clock nor lost its owner on this host.

        One look cannot tell who is silent: it is wrong by as much as the clocks differ.
        """
        try:
            seen, _ = self._read(key)
        except NotFoundError:
            return None
        return None if self._expired(seen.hold) else seen.hold

    def renew(self, key: str, hold: Hold) -> None:
        """Hold the key for another `hold.seconds` from now. LeaseLostError when it is no longer ours."""
        while True:
            try:
                seen, etag = self._read(key)
            except NotFoundError:
                raise LeaseLostError(f"the lease {self.path(key)} of {hold.owner} is gone") from None
            present = seen.hold
            if present.token != hold.token:
                raise LeaseLostError(f"{present.owner} has taken {self.path(key)} from {hold.owner}")
            changes = {"expires_at": self.now() + hold.seconds, "renewals": present.renewals + 1}
            renewed = present.model_copy(update=changes)
            if self.store.replace_if_match(self.path(key), dump(renewed), etag):
                self._note(key, renewed)
                return

    def release(self, key: str, hold: Hold) -> None:
        """Give the key back. LeaseLostError when it is no longer ours."""
        self.renew(key, hold)  # so that nobody takes it before the deletion
        self.drop(key)

    def drop(self, key: str) -> None:
        """Remove the lease, whoever holds it."""
        self.store.delete(self.path(key))
        self._seen.pop(key, None)

    def _read(self, key: str) -> tuple[_Seen, str]:
        """The lease and its etag. NotFoundError when there is none."""
        asked_at, path = self.monotonic(), self.path(key)
        hold, etag = read(Hold, store=self.store, key=path, fix="delete it")
        known = self._seen.get(key)
        # A slow answer is no watching: what counts runs from the end of the first read to the start of the last.
        since = known.since if known and known.hold == hold else self.monotonic()
        self._seen[key] = seen = _Seen(hold, since, asked_at)
        return seen, etag

    def _note(self, key: str, written: Hold) -> None:
        at = self.monotonic()
        self._seen[key] = _Seen(written, since=at, asked_at=at)

    def _expired(self, hold: Hold) -> bool:
        return hold.expires_at <= self.now() or _gone(hold.owner)


def owner_name() -> str:
    """This process as the owner of a lease, `host:pid:starttime`.

    The start time, from `/proc/<pid>/stat`, tells a process from a later one with the same pid; the host's
    part includes the pid namespace, since containers may share a host's name but not its pids.
    """
    return f"{_host()}:{os.getpid()}:{_start_time(os.getpid())}"


def _host() -> str:
    return f"{socket.gethostname()}/{Path('/proc/self/ns/pid').stat().st_ino}"


def _start_time(pid: int) -> str | None:
    """When the process started, in clock ticks since the boot; None when it is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # the command before it may hold spaces; see proc_pid_stat(5)
    return None if fields[0] in "ZX" else fields[19]


def _gone(owner: str) -> bool:
    """Whether the owner ran on this host and does not run any more."""
    host, _, process = owner.partition(":")
    if host != _host():
        return False
    pid, _, started = process.partition(":")
    return _start_time(int(pid)) != started


def _broken(seen: _Seen, at: float) -> bool:
    """Whether the lease was silent for its seconds by the time `at` of the watcher's monotonic clock."""
    return at - seen.since >= seen.hold.seconds or _gone(seen.hold.owner)
