"""Adapters in memory: loaded when first asked for, bounded in bytes, renewed from the registry.

There are two kinds of things. An adapter as it was trained takes some hundred kB and a call of the store; made ready
for its engine at one strength it takes as much again or, merged, some MB, and milliseconds. So what is ready goes
first when memory is short, and the adapters stay as long as they can.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor

from e2gan.config import GeneratorConfig
from e2gan.lora import Adapter
from e2gan.memory import mapped
from e2gan.pairs import Image
from farm.registry import Release
from farm.serve.engines import Engine, Ready
from farm.serve.once import Once
from farm.serve.published import Published
from farm.threads import in_threads
from farm.weights import read_adapter, read_base

_log = logging.getLogger(__name__)

LOADERS = 4
"""Adapters that are loaded at once, of those that nobody waits for."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A concept ready to edit with. Later changes to the bank do not touch it.

    version, digest: of the published adapter. base: digest of the base it belongs to.
    """

    concept: str
    version: int
    digest: str
    base: str
    engine: Engine
    ready: Ready

    def edit(self, photo: Image) -> Image:
        """Edit a photo, uint8 `[h, w, 3]` with sides as the network takes them; the same comes back."""
        return self.engine.edit([(self.ready, photo)])[0]


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """An adapter as it was trained, its tensors in fp16 as its files have them, with its prompt's embedding.

    engine: kept alive by those that need it.
    """

    concept: str
    adapter: Adapter
    text: Tensor
    engine: Engine
    nbytes: int


@dataclass(frozen=True)
class _Slot:
    """What is ready for the engine, of a concept."""

    concept: str
    engine: Engine
    ready: Ready

    @property
    def nbytes(self) -> int:
        return self.ready.nbytes


_Key = tuple[str, float]
"""An adapter's folder, and a strength."""


class Bank:
    """The published concepts of a store, for any number of threads.

    new_engine: makes an engine of a base's configuration and weights.
    byte_budget: bytes of adapters kept, beside the bases. The least recently used go first; what was used last stays
        even when it alone is larger than the budget, and so does what is pinned.

    Of a concept that changes while it is served, the new version is loaded first and given afterwards. One that cannot
    be loaded is logged and tried again, and the old one stays.
    """

    def __init__(
        self,
        published: Published,
        new_engine: Callable[[GeneratorConfig, dict[str, Tensor]], Engine],
        *,
        byte_budget: int,
        pinned: Iterable[str] = (),
    ) -> None:
        self._published = published
        self._new_engine = new_engine
        self._byte_budget = byte_budget
        self._pinned = set(pinned)
        self._lock = threading.Lock()  # guards what follows; never held while something loads
        self._kept: OrderedDict[str, _Kept] = OrderedDict()  # least recently used first, by folder
        self._ready: OrderedDict[_Key, _Slot] = OrderedDict()
        self._served: dict[str, Release] = {}  # what each concept that was asked for is given as
        self._stale: set[str] = set()  # concepts whose new version cannot be loaded
        self._counts: Counter[str] = Counter()
        self._once = Once()
        self._base_lock = threading.Lock()  # held while a base loads, so that it loads once
        self._engines: WeakValueDictionary[str, Engine] = WeakValueDictionary()

    def get(self, concept: str, version: int | None = None, strength: float = 1.0) -> Loaded:
        """The concept's current version, or an earlier one, at a strength of 0 to 1.

        Many callers at once cause one load, which the others wait for.

        Raises:
            UnknownConceptError: nothing is published under this name, or not in this version.
            UserError, OSError: it cannot be loaded: damaged, made for another base, or the store is away.
        """
        release = self._published.release(concept, version)
        if version is None:
            release = self._served.get(concept, release)  # the new one is being loaded
        slot = self._slot(concept, release, strength)
        if version is None:
            self._served.setdefault(concept, release)
        return Loaded(
            concept=concept,
            version=release.version,
            digest=release.digest,
            base=release.base,
            engine=slot.engine,
            ready=slot.ready,
        )

    def renew(self) -> None:
        """Load what was published since, of the concepts that are served."""
        entries = self._published.entries
        with self._lock:
            served = dict(self._served)
        for concept in served.keys() - entries.keys():
            with self._lock:
                self._served.pop(concept, None)
                self._stale.discard(concept)
        changed = [concept for concept, release in served.items() if _differs(entries.get(concept), release)]
        for _ in in_threads(self._renew, changed, LOADERS):
            pass

    def prefetch(self, first: Iterable[str] = ()) -> None:
        """Load adapters while half of the budget is free: those that are pinned, the ones given, then all others."""
        order = dict.fromkeys([*sorted(self._pinned), *first])
        for concept in [*order, *(other for other in self._published.entries if other not in order)]:
            if concept not in self._pinned and self.nbytes > self._byte_budget / 2:
                break
            with suppress(Exception):  # whoever asks for it is told
                if concept in order:
                    self.get(concept)
                else:
                    self._adapter(concept, self._published.release(concept))

    def pin(self, concept: str, pinned: bool = True) -> None:
        """Keep a concept in memory whatever else is asked for, or no longer. Loads it. Raises as `get`."""
        if pinned:
            self._published.release(concept)
            self._pinned.add(concept)
            self.get(concept)
        else:
            self._pinned.discard(concept)

    def evict(self, concept: str) -> None:
        """Forget what is in memory of a concept; requests under way keep theirs."""
        with self._lock:
            for key in [key for key, slot in self._ready.items() if slot.concept == concept]:
                self._dropped(self._ready, key)
            for path in [path for path, kept in self._kept.items() if kept.concept == concept]:
                self._dropped(self._kept, path)

    @property
    def nbytes(self) -> int:
        """Bytes of the adapters in memory, ready or not, that they do not share with their bases."""
        with self._lock:
            return self._nbytes()

    def report(self) -> dict[str, Any]:
        """Counts since the start (`hits`, `misses`, `loads`, `evictions`, `failures`), and how things are now."""
        with self._lock:
            now = {"bytes": self._nbytes(), "adapters": len(self._kept), "ready": len(self._ready)}
            return {**self._counts, **now, "stale": len(self._stale), "pinned": len(self._pinned)}

    def _renew(self, concept: str) -> None:
        entry = self._published.entries.get(concept)
        if entry is None:
            return
        try:
            self._slot(concept, entry, 1.0)
        except Exception as error:  # whatever is wrong with the new version, the old one still works
            with self._lock:
                self._stale.add(concept)
            _log.warning("%s: version %d is not served, the one before it stays: %s", concept, entry.version, error)
        else:
            with self._lock:
                self._served[concept] = entry
                self._stale.discard(concept)

    def _slot(self, concept: str, release: Release, strength: float) -> _Slot:
        key = (release.adapter, strength)
        with self._lock:
            slot = self._ready.get(key)
            if slot is not None:
                self._ready.move_to_end(key)
                if release.adapter in self._kept:
                    self._kept.move_to_end(release.adapter)
                self._counts["hits"] += 1
                return slot
            self._counts["misses"] += 1

        def make() -> _Slot:
            kept = self._adapter(concept, release)
            tensors = {name: tensor.float() for name, tensor in kept.adapter.tensors.items()}
            scaled = replace(kept.adapter, scale=strength * kept.adapter.scale, tensors=tensors)
            slot = _Slot(concept, kept.engine, kept.engine.ready(scaled, kept.text.float()))
            with self._lock:
                self._ready[key] = slot
                self._make_room()
            return slot

        made: _Slot = self._once(key, make)
        return made

    def _adapter(self, concept: str, release: Release) -> _Kept:
        """The adapter as it was trained, from memory or from the store."""
        with self._lock:
            found = self._kept.get(release.adapter)
            if found is not None:
                self._kept.move_to_end(release.adapter)
                return found

        def fetch() -> _Kept:
            try:
                kept = self._load(concept, release)
            except Exception:
                with self._lock:
                    self._counts["failures"] += 1
                raise
            with self._lock:
                self._counts["loads"] += 1
                self._kept[release.adapter] = kept
                self._make_room()
            return kept

        kept: _Kept = self._once(release.adapter, fetch)
        return kept

    def _make_room(self) -> None:
        slots: OrderedDict[Any, Any]
        for slots in (self._ready, self._kept):
            last = next(reversed(slots), None)
            for key in [key for key, slot in slots.items() if slot.concept not in self._pinned and key != last]:
                if self._nbytes() <= self._byte_budget:
                    return
                self._dropped(slots, key)

    def _dropped(self, slots: OrderedDict[Any, Any], key: Any) -> None:
        del slots[key]
        self._counts["evictions"] += 1

    def _nbytes(self) -> int:
        return sum(slot.nbytes for slots in (self._ready, self._kept) for slot in slots.values())

    def _load(self, concept: str, release: Release) -> _Kept:
        engine = self._engine(release.base)
        store, keys = self._published.store, self._published.keys
        adapter, text = read_adapter(store, release.adapter, release.base, engine.config, keys)
        halves = mapped({name: tensor.half() for name, tensor in {**adapter.tensors, "": text}.items()})
        nbytes = sum(tensor.nbytes for tensor in halves.values())
        tensors, text = {name: halves[name] for name in adapter.tensors}, halves[""]
        adapter = replace(adapter, tensors=tensors)
        return _Kept(concept=concept, adapter=adapter, text=text, engine=engine, nbytes=nbytes)

    def _engine(self, base: str) -> Engine:
        with self._base_lock:
            engine = self._engines.get(base)
            if engine is None:
                found = read_base(self._published.store, f"bases/{base}", self._published.keys)
                engine = self._engines[base] = self._new_engine(*found)
            return engine


def _differs(entry: Release | None, served: Release) -> bool:
    return entry is not None and entry.version != served.version
