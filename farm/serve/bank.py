"""Adapters in memory: merged into their base on demand, bounded in bytes, renewed from the registry."""

from __future__ import annotations

import difflib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from weakref import WeakValueDictionary

import safetensors.torch
from torch import Tensor

from e2gan.config import GeneratorConfig
from e2gan.infer import adapted_generator
from e2gan.lora_peft import load
from e2gan.model import Generator
from farm.artifacts import open_artifact
from farm.errors import UserError
from farm.registry import Entry, Registry
from farm.serve.published import UnknownConceptError
from farm.stages.pretrain import read_base
from farm.store import Store, where

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A concept ready to edit with: `edit_photo(loaded.generator, loaded.text, photo, …)`.

    version, digest: of the published adapter. base: digest of the base it is merged into.
    text: the prompt's embedding, `[77, 768]`.
    """

    concept: str
    version: int
    digest: str
    base: str
    generator: Generator
    text: Tensor


@dataclass(frozen=True)
class _Base:
    config: GeneratorConfig
    weights: dict[str, Tensor]


@dataclass
class _Slot:
    """A concept in memory. base: kept for the adapters to come; size: bytes not shared with the base."""

    loaded: Loaded
    base: _Base
    size: int
    check_at: float = 0.0


class AdapterBank:
    """The published concepts of a store, loaded when first asked for; safe to share between threads.

    byte_budget: bytes of the adapters kept, counting only what each does not share with its base. The least
        recently used go first; the most recently used one stays even when it alone is larger than the budget.
    check_seconds: how old an answer of the registry may be. A version published meanwhile is then loaded by
        the first caller while the others are still given the old one. One that cannot be loaded is logged and
        tried again at the next check, and the old one stays.
    """

    def __init__(
        self,
        store: Store,
        *,
        byte_budget: int,
        check_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._byte_budget = byte_budget
        self._check_seconds = check_seconds
        self._clock = clock
        self._lock = threading.Lock()  # guards _slots and _loading; never held while something loads
        self._slots: OrderedDict[str, _Slot] = OrderedDict()  # least recently used first
        self._loading: dict[str, Future[_Slot]] = {}
        self._base_lock = threading.Lock()  # held while a base loads, so that it loads once
        self._bases: WeakValueDictionary[str, _Base] = WeakValueDictionary()

    def get(self, concept: str) -> Loaded:
        """The concept's published version; later changes to the bank do not touch what was returned.

        Many callers at once cause one load, which the others wait for.

        Raises:
            UnknownConceptError: nothing is published under this name.
            UserError: the first version ever asked for cannot be loaded (damaged, or made for another base).
        """
        with self._lock:
            slot = self._slots.get(concept)
            if slot is not None:
                self._slots.move_to_end(concept)
                if concept in self._loading or self._clock() < slot.check_at:
                    return slot.loaded
            others = self._loading.get(concept)
            if others is None:
                mine = self._loading[concept] = Future()
        if others is not None:
            return others.result().loaded
        try:
            current = self._current(concept, slot)
        except BaseException as error:
            with self._lock:
                self._slots.pop(concept, None)
                del self._loading[concept]
            mine.set_exception(error)
            raise
        with self._lock:
            self._keep(concept, current)
            del self._loading[concept]
        mine.set_result(current)
        return current.loaded

    @property
    def size(self) -> int:
        """Bytes of the adapters in memory that they do not share with their bases."""
        with self._lock:
            return self._size()

    def _size(self) -> int:
        return sum(slot.size for slot in self._slots.values())

    def _keep(self, concept: str, slot: _Slot) -> None:
        slot.check_at = self._clock() + self._check_seconds
        self._slots[concept] = slot
        self._slots.move_to_end(concept)
        while self._size() > self._byte_budget and len(self._slots) > 1:
            self._slots.popitem(last=False)

    def _current(self, concept: str, old: _Slot | None) -> _Slot:
        """The old slot when it is what is published, or what is published cannot be had; else a new one."""
        try:
            entry = self._entry(concept)
            if old and (old.loaded.version, old.loaded.digest) == (entry.version, entry.digest):
                return old
            return self._load(entry)
        except UnknownConceptError:
            raise
        except Exception as error:  # whatever is wrong with the new version, the old one still works
            if old is None:
                raise
            _log.warning("%s: version %d stays in service: %s", concept, old.loaded.version, error)
            return old

    def _entry(self, concept: str) -> Entry:
        try:
            entry = Registry(self._store).get(concept)
        except ValueError:  # not even a slug
            entry = None
        if entry is None:
            near = difflib.get_close_matches(concept, Registry(self._store).list())
            raise UnknownConceptError(concept, tuple(near))
        return entry

    def _load(self, entry: Entry) -> _Slot:
        base = self._base(entry.base)
        artifact = open_artifact(self._store, entry.adapter)
        files = {name: artifact.read(name) for name in ("adapter_config.json", "adapter_model.safetensors")}
        text = safetensors.torch.load(artifact.read("text.safetensors"))["text"]
        try:
            adapter = load(files, base=entry.base)
            generator = adapted_generator(base.config, base.weights, adapter)
        except ValueError as error:
            raise UserError(f"{where(self._store, entry.adapter)}: {error}.") from error
        owned = [
            tensor
            for name, tensor in generator.state_dict().items()
            if tensor.data_ptr() != base.weights[name].data_ptr()
        ]
        loaded = Loaded(
            concept=entry.concept,
            version=entry.version,
            digest=entry.digest,
            base=entry.base,
            generator=generator,
            text=text,
        )
        return _Slot(loaded, base, sum(tensor.nbytes for tensor in (*owned, text)))

    def _base(self, digest: str) -> _Base:
        with self._base_lock:
            base = self._bases.get(digest)
            if base is None:
                base = self._bases[digest] = _Base(*read_base(self._store, f"bases/{digest}"))
            return base
