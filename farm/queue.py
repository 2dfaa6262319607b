"""A durable queue in the store: work survives the death of whoever was doing it.

An item is one object, `queue/<name>/pending/<key>.json`, from the moment it is enqueued until it is done or
has failed for good; a worker takes it with a lease, `leases/<key>.json` beside it (see `farm.leases`), which is
taken over when the worker falls silent. Items that failed too often move to `failed/<key>.json`.

Every change is ordered so that a death between two writes leaves the item in `pending/`: work may be done
twice, never lost. While there is an object `queue/<name>/paused.json`, nothing is leased; what is held already can
be renewed and settled.
"""

import json
import time
from collections.abc import Callable, Collection, Container
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict

from farm.artifacts import dump, read
from farm.leases import Hold, LeaseLostError, Leases, owner_name
from farm.store import NotFoundError, Store
from farm.threads import in_threads

__all__ = ["Item", "Lease", "LeaseLostError", "Queue", "owner_name"]


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
    """An item, and the hold of whoever works on it as it was when it was read."""

    item: Item
    hold: Hold


@dataclass
class Queue:
    """The queue `name` in a store, for any number of workers on any hosts, whatever their clocks say.

    remember: for how many seconds `lease` relies on what it has read of the items' order and of others' leases, so
        that leasing n items takes O(n) store calls. An item dropped and enqueued anew in between keeps its old place,
        and a silent worker's is given out later by up to as much; who gets an item is settled in the store all the
        same. With 0 each `lease` reads all that wait.
    """

    store: Store
    name: str
    now: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    remember: float = 0
    _known: dict[str, tuple[float, Item]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _leases: Leases = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._leases = Leases(self.store, self._folder("leases"), self.now, self.monotonic)

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
        work on; another's items stay where they are. A silent worker's item is given out once this queue's own calls
        have watched its lease for as long as it lasts.
        """
        listed = set(self.store.list(f"queue/{self.name}/"))
        if self._pause in listed:
            return None
        self._known = {key: known for key, known in self._known.items() if self._path("pending", key) in listed}
        for key in self._free(listed, among):
            hold = self._leases.take(key, owner, seconds)
            if hold is None:
                continue
            try:
                return Lease(self._item("pending", key), hold)
            except NotFoundError:  # finished by another worker after we listed it
                self._leases.drop(key)
        return None

    def renew(self, lease: Lease) -> None:
        """Hold the item for as long again from now. LeaseLostError when it is no longer ours."""
        self._leases.renew(lease.item.key, lease.hold)

    def ack(self, lease: Lease) -> None:
        """The item is done: remove it. LeaseLostError when it is no longer ours."""
        self.renew(lease)  # so that nobody takes the item between the deletions
        self.drop(lease.item.key)

    def fail(self, lease: Lease, error: str, max_attempts: int) -> bool:
        """Count a failed attempt; True when it was the last one and the item is now in `failed/`.

        LeaseLostError when the item is no longer ours.
        """
        self.renew(lease)
        key = lease.item.key
        item = lease.item.model_copy(update={"attempts": lease.item.attempts + 1, "error": error})
        if item.attempts < max_attempts:
            self.store.put(self._path("pending", key), dump(item))
            self._leases.drop(key)
            return False
        self.store.put(self._path("failed", key), dump(item))
        self.store.delete(self._path("pending", key))
        self._leases.drop(key)
        return True

    def release(self, lease: Lease) -> None:
        """Give the item back untried. LeaseLostError when it is no longer ours."""
        self._leases.release(lease.item.key, lease.hold)

    def pending(self) -> list[Item]:
        """The items neither done nor failed, leased ones included, in the order they would be leased."""
        return sorted(self._items("pending"), key=_order)

    def waiting(self) -> set[str]:
        """The keys of the pending items, in one store call."""
        return set(self._keys("pending"))

    def leased(self) -> list[Lease]:
        """The leases that have not expired by this host's clock, nor lost their owner on this host.

        One look cannot tell who is silent: with clocks that differ, the list is wrong by as much.
        """
        held = set(self._keys("leases"))
        items = self._items("pending", held) if held else []
        holds = in_threads(lambda item: self._leases.look(item.key), items, self.store.at_once)
        return [Lease(item, hold) for item, hold in zip(items, holds, strict=True) if hold]

    def failed(self) -> list[Item]:
        """The items that failed for good, each with its last error."""
        waiting = self.waiting()  # after a death inside `retry` or `fail` an item is in both
        return [item for item in self._items("failed") if item.key not in waiting]

    def retry(self, key: str) -> None:
        """Make a failed item pending again with no attempts counted. NotFoundError when it has not failed."""
        item = self._item("failed", key).model_copy(update={"attempts": 0})
        self.store.put_if_absent(self._path("pending", key), dump(item))
        self.store.delete(self._path("failed", key))

    def drop(self, key: str) -> None:
        """Forget the item whatever its state; whoever holds it gets LeaseLostError."""
        self.store.delete(self._path("failed", key))
        self.store.delete(self._path("pending", key))
        self._leases.drop(key)

    def withdraw(self, key: str, owner: str) -> bool:
        """Drop the item unless somebody works on it; False when its lease has not expired.

        One look cannot tell who is silent, so this goes by `expires_at` and this host's clock: one that is ahead may
        drop an item that is worked on, whose worker then gets LeaseLostError.
        """
        if self._leases.take(key, owner, 60, by_clock=True) is None:  # so that nobody begins it meanwhile
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
            if self._leases.path(key) in listed and self._leases.watch(key, self.remember):
                continue
            with suppress(NotFoundError):  # finished since it was listed
                free.append(self._remembered(key))
        return [item.key for item in sorted(free, key=_order)]

    def _remembered(self, key: str) -> Item:
        """A pending item as it is, or was within `remember`."""
        if key in self._known and self.monotonic() - self._known[key][0] < self.remember:
            return self._known[key][1]
        item = self._item("pending", key)
        self._known[key] = (self.monotonic(), item)
        return item

    def _items(self, state: str, among: Container[str] | None = None) -> list[Item]:
        def read(key: str) -> Item | None:
            try:
                return self._item(state, key)
            except NotFoundError:  # it has moved on since it was listed
                return None

        keys = [key for key in self._keys(state) if among is None or key in among]
        return [item for item in in_threads(read, keys, self.store.at_once) if item]

    def _item(self, state: str, key: str) -> Item:
        path = self._path(state, key)
        return read(Item, store=self.store, key=path, fix="delete it")[0]

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


def _order(item: Item) -> tuple[int, float, str]:
    return (-item.priority, item.enqueued_at, item.key)
