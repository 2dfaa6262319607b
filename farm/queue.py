"""A durable queue in the store: work survives the death of whoever was doing it.

An item is one object, `queue/<name>/pending/<key>.json`, from the moment it is enqueued until it is done or
has failed for good; a worker takes it by writing `leases/<key>.json` beside it, which expires unless it is
renewed. A lease is broken when it has expired, or at once when its owner ran on this host and is gone: the
rerun of a killed driver does not wait. A broken lease is taken over by compare-and-swap, and its former
holder, if it still lives, gets LeaseLostError. Items that failed too often move to `failed/<key>.json`.

Every change is ordered so that a death between two writes leaves the item in `pending/`: work may be done
twice, never lost. While there is an object `queue/<name>/paused.json`, nothing is leased; what is held already can
be renewed and settled.
"""

import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Collection, Container
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from farm.artifacts import dump, parse
from farm.store import NotFoundError, Store

Model = TypeVar("Model", bound=BaseModel)


class LeaseLostError(Exception):
    """The lease expired and another worker has taken the item, or somebody dropped it: abandon the work."""


class Item(BaseModel):
    """A unit of work. `attempts` counts its failures, `error` is the text of the last; Unix seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    payload: dict[str, Any]
    priority: int
    attempts: int
    enqueued_at: float
    error: str = ""


@dataclass(frozen=True)
class Lease:
    """An item held by `owner` until `expires_at` (Unix seconds) or later, when it has been renewed."""

    item: Item
    owner: str
    token: str
    seconds: float
    expires_at: float


class _Hold(BaseModel):
    """What a lease's object says. The token tells two leases of one owner apart."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    owner: str
    token: str
    seconds: float
    expires_at: float


@dataclass
class Queue:
    """The queue `name` in a store, for any number of workers on hosts whose clocks agree.

    remember: for how many seconds `lease` relies on what it has read of the items' order and of others' leases, so
        that leasing n items takes O(n) store calls. An item dropped and enqueued anew in between keeps its old place,
        and a lease given back and taken by another its old expiry, for as long; who gets an item is settled in the
        store all the same. With 0 each `lease` reads all that wait.
    """

    store: Store
    name: str
    now: Callable[[], float] = time.time
    remember: float = 0
    _memory: dict[str, tuple[float, Any]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def enqueue(self, key: str, payload: dict[str, Any], priority: int = 0) -> bool:
        """Add an item; False when the key is pending already, or has failed and waits for `retry`."""
        if self.store.exists(self._path("failed", key)):
            return False
        item = Item(key=key, payload=payload, priority=priority, attempts=0, enqueued_at=self.now())
        return self.store.put_if_absent(self._path("pending", key), dump(item))

    def lease(self, owner: str, seconds: float, *, among: Container[str] | None = None) -> Lease | None:
        """Take the first item nobody holds: highest priority, then oldest, then key. None when there is none
        or the queue is paused.

        `owner` is `owner_name()` of the process whose death should free the item. `among`: the keys this worker can
        work on; another's items stay where they are.
        """
        listed = set(self.store.list(f"queue/{self.name}/"))
        if self._pause in listed:
            return None
        self._memory = {path: known for path, known in self._memory.items() if path in listed}
        for key in self._free(listed, among):
            hold = self._new_hold(owner, seconds)
            if not self._take(key, hold, held=self._path("leases", key) in listed):
                continue
            try:
                item = self._item("pending", key)
            except NotFoundError:  # finished by another worker after we listed it
                self.store.delete(self._path("leases", key))
                continue
            self._memory[self._path("leases", key)] = (self.now(), hold)
            return _lease(item, hold)
        return None

    def renew(self, lease: Lease) -> None:
        """Hold the item for another `lease.seconds` from now. LeaseLostError when it is no longer ours."""
        key = lease.item.key
        while True:
            try:
                hold, etag = self._hold(key)
            except NotFoundError:
                raise LeaseLostError(f"the lease of {key} in the queue {self.name} is gone") from None
            if hold.token != lease.token:
                raise LeaseLostError(f"{hold.owner} has taken {key} in the queue {self.name} from {lease.owner}")
            renewed = hold.model_copy(update={"expires_at": self.now() + hold.seconds})
            if self.store.replace_if_match(self._path("leases", key), dump(renewed), etag):
                return

    def ack(self, lease: Lease) -> None:
        """The item is done: remove it. LeaseLostError when it is no longer ours."""
        self.renew(lease)  # so that nobody takes the item between the deletions
        self._remove("failed", "pending", "leases", key=lease.item.key)

    def fail(self, lease: Lease, error: str, max_attempts: int) -> bool:
        """Count a failed attempt; True when it was the last one and the item is now in `failed/`.

        LeaseLostError when the item is no longer ours.
        """
        self.renew(lease)
        key = lease.item.key
        item = lease.item.model_copy(update={"attempts": lease.item.attempts + 1, "error": error})
        if item.attempts < max_attempts:
            self.store.put(self._path("pending", key), dump(item))
            self._remove("leases", key=key)
            return False
        self.store.put(self._path("failed", key), dump(item))
        self._remove("pending", "leases", key=key)
        return True

    def release(self, lease: Lease) -> None:
        """Give the item back untried. LeaseLostError when it is no longer ours."""
        self.renew(lease)
        self._remove("leases", key=lease.item.key)

    def pending(self) -> list[Item]:
        """The items neither done nor failed, leased ones included, in the order they would be leased."""
        return sorted(self._items("pending"), key=_order)

    def waiting(self) -> set[str]:
        """The keys of the pending items, in one store call."""
        return set(self._keys("pending"))

    def leased(self) -> list[Lease]:
        """The leases that hold now; broken ones are left out."""
        leases = []
        for item in self._items("pending"):
            try:
                hold, _ = self._hold(item.key)
            except NotFoundError:
                continue
            if not self._broken(hold):
                leases.append(_lease(item, hold))
        return leases

    def failed(self) -> list[Item]:
        """The items that failed for good, each with its last error."""
        waiting = self.waiting()  # after a death inside `retry` or `fail` an item is in both
        return [item for item in self._items("failed") if item.key not in waiting]

    def retry(self, key: str) -> None:
        """Make a failed item pending again with no attempts counted. NotFoundError when it has not failed."""
        item = self._item("failed", key).model_copy(update={"attempts": 0})
        self.store.put_if_absent(self._path("pending", key), dump(item))
        self._remove("failed", key=key)

    def drop(self, key: str) -> None:
        """Forget the item whatever its state; whoever holds it gets LeaseLostError."""
        self._remove("pending", "failed", "leases", key=key)

    def withdraw(self, key: str, owner: str) -> bool:
        """Drop the item unless somebody works on it; False when its lease holds."""
        if not self._take(key, self._new_hold(owner, 60), held=True):  # so that nobody begins it meanwhile
            return False
        self.drop(key)
        return True

    def pause(self) -> bool:
        """Lease nothing from now on; False when the queue is paused already."""
        return self.store.put_if_absent(self._pause, json.dumps({"since": self.now()}).encode())

    def resume(self) -> bool:
        """End a pause; False when there is none."""
        there = self.paused()
        self.store.delete(self._pause)
        return there

    def paused(self) -> bool:
        return self.store.exists(self._pause)

    def _free(self, listed: Collection[str], among: Container[str] | None) -> list[str]:
        """The keys of the items that nobody seems to hold, in the order of leasing; `listed`: all the queue's paths."""
        folder, free = self._folder("pending"), []
        for path in listed:
            key = path.removeprefix(folder).removesuffix(".json")
            if not path.startswith(folder) or (among is not None and key not in among):
                continue
            with suppress(NotFoundError):  # given back since it was listed
                if self._path("leases", key) in listed and not self._broken(self._known(_Hold, "leases", key)):
                    continue
            with suppress(NotFoundError):  # finished since it was listed
                free.append(self._known(Item, "pending", key))
        return [item.key for item in sorted(free, key=_order)]

    def _known(self, model: type[Model], state: str, key: str) -> Model:
        path = self._path(state, key)
        if path in self._memory:
            read_at, known = self._memory[path]
            if self.now() - read_at < self.remember:
                assert isinstance(known, model)
                return known
        found = parse(model, self.store.get(path), store=self.store, key=path, fix="delete it")
        self._memory[path] = (self.now(), found)
        return found

    def _new_hold(self, owner: str, seconds: float) -> _Hold:
        return _Hold(owner=owner, token=uuid.uuid4().hex, seconds=seconds, expires_at=self.now() + seconds)

    def _take(self, key: str, hold: _Hold, *, held: bool) -> bool:
        """Write the lease unless another holds. held: whether there seems to be one, which is then looked at first."""
        path = self._path("leases", key)
        if not held:
            return self.store.put_if_absent(path, dump(hold))
        try:
            present, etag = self._hold(key)
        except NotFoundError:  # given back since it was listed
            return self.store.put_if_absent(path, dump(hold))
        self._memory[path] = (self.now(), present)
        return self._broken(present) and self.store.replace_if_match(path, dump(hold), etag)

    def _broken(self, hold: _Hold) -> bool:
        return hold.expires_at <= self.now() or _gone(hold.owner)

    def _items(self, state: str) -> list[Item]:
        items = []
        for key in self._keys(state):
            try:
                items.append(self._item(state, key))
            except NotFoundError:  # it has moved on since it was listed
                continue
        return items

    def _item(self, state: str, key: str) -> Item:
        path = self._path(state, key)
        return parse(Item, self.store.get(path), store=self.store, key=path, fix="delete it")

    def _hold(self, key: str) -> tuple[_Hold, str]:
        path = self._path("leases", key)
        data, etag = self.store.get_with_etag(path)
        return parse(_Hold, data, store=self.store, key=path, fix="delete it"), etag

    def _keys(self, state: str) -> list[str]:
        folder = self._folder(state)
        return [path.removeprefix(folder).removesuffix(".json") for path in self.store.list(folder)]

    def _folder(self, state: str) -> str:
        return f"queue/{self.name}/{state}/"

    def _path(self, state: str, key: str) -> str:
        return f"{self._folder(state)}{key}.json"

    @property
    def _pause(self) -> str:
        return f"queue/{self.name}/paused.json"

    def _remove(self, *states: str, key: str) -> None:
        for state in states:
            self.store.delete(self._path(state, key))


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


def _order(item: Item) -> tuple[int, float, str]:
    return (-item.priority, item.enqueued_at, item.key)


def _lease(item: Item, hold: _Hold) -> Lease:
    return Lease(item, hold.owner, hold.token, hold.seconds, hold.expires_at)
