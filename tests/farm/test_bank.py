from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from tiny_farm import three_concepts

from farm.errors import UserError
from farm.serve.bank import Bank
from farm.serve.engines import Merging
from farm.serve.published import Published, UnknownConceptError

PHOTO = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
PLENTY = 1_000_000_000
CONCEPTS = ("charcoal", "fog", "ink")

pytestmark = pytest.mark.usefixtures("one_thread")


class Watched:
    """A store that counts what is read of it and can hold readers back."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._held: tuple[str, threading.Event] | None = None
        self.reads: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def get(self, key: str, at_most: int | None = None) -> bytes:
        self.reads.append(key)
        if self._held and key.endswith(self._held[0]):
            assert self._held[1].wait(20)
        return self._store.get(key, at_most)

    def count(self, ending: str) -> int:
        return sum(key.endswith(ending) for key in self.reads)

    @contextmanager
    def holding(self, ending: str) -> Iterator[None]:
        self._held = ending, threading.Event()
        try:
            yield
        finally:
            self._held[1].set()


@pytest.fixture
def farm(tmp_path):
    return three_concepts(tmp_path / "store")


@pytest.fixture
def watched(farm):
    return Watched(farm.store)


@pytest.fixture
def bank(watched):
    return bank_of(watched)


def bank_of(store: Any, byte_budget: int = PLENTY, **options: Any) -> Bank:
    return Bank(Published(store), Merging, byte_budget=byte_budget, **options)


def look(bank: Bank) -> None:
    """What the threads of an editing replica do every two seconds."""
    bank._published.refresh()
    bank.renew()


def same(edited: Any, expected: Any) -> bool:
    """Merged weights in bf16 and bf16 where autocast wants it round differently."""
    difference = np.abs(edited.astype(int) - expected)
    return bool(difference.mean() < 3)


def until(condition) -> None:
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.005)
    raise AssertionError("waited in vain")


def test_a_loaded_concept_edits_as_its_adapter_does(farm, bank):
    edits = {}
    for concept in CONCEPTS:
        loaded, entry = bank.get(concept), farm.registry.get(concept)
        assert (loaded.concept, loaded.version, loaded.digest, loaded.base) == (concept, 1, entry.digest, farm.base)
        edits[concept] = loaded.edit(PHOTO)
        assert same(edits[concept], farm.edit(concept, PHOTO))
    assert not same(edits["ink"], edits["fog"])  # so that the comparison can tell


def test_strength_is_a_factor_on_the_adapter(farm, bank):
    weights = {s: bank.get("ink", strength=s).ready.weights["stem.weight"].float() for s in (0, 0.25, 0.5, 1)}
    update = weights[1] - weights[0]
    assert update.abs().max() > 0.01
    for strength in (0.25, 0.5):
        torch.testing.assert_close(weights[strength] - weights[0], strength * update, atol=4e-3, rtol=0)  # bf16
    untouched = bank.get("fog", strength=0).ready.weights["stem.weight"].float()
    torch.testing.assert_close(weights[0], untouched, atol=0, rtol=0)
    assert np.array_equal(bank.get("ink", strength=0.5).edit(PHOTO), bank.get("ink", strength=0.5).edit(PHOTO))


def test_earlier_versions_are_given_when_asked_for(farm, bank):
    first = bank.get("ink").edit(PHOTO)
    farm.publish("ink", seed=11)
    farm.registry.unpublish("ink")
    look(bank)
    with pytest.raises(UnknownConceptError, match="no concept 'ink' is published"):
        bank.get("ink", 1)
    farm.registry.rollback("ink", to=2)
    look(bank)
    assert np.array_equal(bank.get("ink", 1).edit(PHOTO), first)
    assert (bank.get("ink", 2).version, bank.get("ink").version) == (2, 4)
    assert bank.get("ink", 2).digest == bank.get("ink").digest
    for version in (3, 5):  # unpublished, and not there
        with pytest.raises(UnknownConceptError, match=f"ink was never published as version {version}"):
            bank.get("ink", version)


def test_adapters_share_one_copy_of_their_base(farm, bank, watched):
    ink, fog = bank.get("ink"), bank.get("fog")
    assert ink.engine is fog.engine
    assert watched.count("generator.safetensors") == 1
    files = {c: farm.store.get(f"{farm.registry.get(c).adapter}/adapter_model.safetensors") for c in ("ink", "fog")}
    trained = 2 * 77 * 768 * 2 + sum(map(len, files.values()))
    assert trained * 0.9 < bank.nbytes - ink.ready.nbytes - fog.ready.nbytes < trained


@pytest.mark.parametrize(
    ("concept", "near"), [("inkk", ("ink",)), ("Charcoal", ("charcoal",)), ("../ink", ("ink",)), ("zzz", ()), ("", ())]
)
def test_an_unknown_concept_is_told_with_near_names(bank, concept, near):
    with pytest.raises(UnknownConceptError) as caught:
        bank.get(concept)
    assert caught.value.near == near
    assert repr(concept) in str(caught.value)
    assert all(name in str(caught.value) for name in near)
    assert isinstance(caught.value, KeyError)


def test_threads_never_get_anothers_adapter_and_evictions_change_nothing(farm, watched):
    bank = bank_of(watched, 1)  # room for one: nearly every call evicts another's
    expected = {concept: bank.get(concept).edit(PHOTO) for concept in CONCEPTS}

    def ask(number: int) -> bool:
        concept = CONCEPTS[number % 3]
        loaded = bank.get(concept)
        return loaded.concept == concept and np.array_equal(loaded.edit(PHOTO), expected[concept])

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(ask, range(60)))
    assert watched.count("adapter_model.safetensors") > 6


def loads(bank: Bank, concept: str) -> tuple[int, int]:
    """How much a call adds to what is read, and to what is made ready."""
    before = bank.report()
    bank.get(concept)
    after = bank.report()
    return after.get("loads", 0) - before.get("loads", 0), after["misses"] - before.get("misses", 0)


def test_what_is_ready_goes_before_the_adapters_and_the_least_recently_used_first(farm, watched):
    plenty = bank_of(farm.store)
    ready = plenty.get("ink").ready.nbytes
    adapter = plenty.nbytes - ready
    bank = bank_of(watched, 3 * adapter + 2 * ready)
    asked = ("ink", "fog", "ink", "charcoal", "ink", "fog")
    assert [loads(bank, concept) for concept in asked] == [(1, 1), (1, 1), (0, 0), (1, 1), (0, 0), (0, 1)]
    assert bank.nbytes == 3 * adapter + 2 * ready
    bank = bank_of(watched, 2 * adapter + ready)
    assert [loads(bank, concept) for concept in asked] == [(1, 1), (1, 1), (0, 1), (1, 1), (0, 1), (1, 1)]
    assert bank.report()["evictions"] == 5 + 2
    assert watched.count("generator.safetensors") == 2  # once for each bank


def test_what_is_pinned_stays(farm, watched):
    bank = bank_of(watched, 1, pinned=["fog"])
    bank.prefetch()
    for concept in ("ink", "charcoal", "ink"):
        bank.get(concept)
    assert loads(bank, "fog") == (0, 0)
    bank.pin("fog", False)
    bank.pin("ink")
    bank.get("charcoal")
    assert loads(bank, "ink") == (0, 0)
    assert loads(bank, "fog") == (1, 1)
    with pytest.raises(UnknownConceptError):
        bank.pin("nothing")
    bank.evict("ink")
    assert loads(bank, "ink") == (1, 1)


def test_prefetching_begins_with_what_is_popular_and_leaves_room(farm, watched):
    everything = bank_of(watched)
    everything.prefetch(["ink", "not-there"])
    assert (everything.report()["adapters"], everything.report()["ready"]) == (3, 1)
    assert loads(everything, "ink") == (0, 0)
    little = bank_of(watched, int(2.5 * everything.nbytes))
    little.prefetch()
    assert little.report()["adapters"] == 3
    little = bank_of(watched, everything.get("ink").ready.nbytes)
    little.prefetch(["fog"])
    assert [kept.concept for kept in little._kept.values()] == ["fog"]


def test_an_adapter_larger_than_the_budget_stays_while_it_is_used(watched):
    bank = bank_of(watched, 1)
    for concept in ("ink", "fog"):
        assert bank.get(concept).ready is bank.get(concept).ready
    assert watched.count("adapter_model.safetensors") == 2


def test_many_callers_cause_one_load(bank, watched):
    with ThreadPoolExecutor(12) as threads:
        with watched.holding("adapter_model.safetensors"):
            waiting = [threads.submit(bank.get, "ink") for _ in range(12)]
            until(lambda: watched.count("adapter_model.safetensors"))
        assert len({id(future.result().ready) for future in waiting}) == 1
    assert watched.count("adapter_model.safetensors") == 1


def test_concepts_asked_for_at_once_load_their_base_once(bank, watched):
    with ThreadPoolExecutor(3) as threads:
        with watched.holding("generator.safetensors"):
            waiting = [threads.submit(bank.get, concept) for concept in CONCEPTS]
            until(lambda: watched.count("generator.safetensors"))
        assert {future.result().concept for future in waiting} == {*CONCEPTS}
    assert watched.count("generator.safetensors") == 1


def test_a_published_version_is_served_after_the_next_look(farm, bank, watched):
    old = bank.get("ink")
    before = old.edit(PHOTO)
    farm.publish("ink", seed=11)
    assert bank.get("ink").ready is old.ready
    look(bank)
    assert watched.count("adapter_model.safetensors") == 2  # nobody waits for it
    new = bank.get("ink")
    assert (new.version, new.digest) == (2, farm.registry.get("ink").digest)
    assert same(new.edit(PHOTO), farm.edit("ink", PHOTO))
    assert np.array_equal(old.edit(PHOTO), before)
    assert not same(new.edit(PHOTO), before)
    look(bank)
    assert bank.get("ink").ready is new.ready
    farm.registry.rollback("ink")
    look(bank)
    assert (bank.get("ink").version, bank.get("ink").digest) == (3, old.digest)
    assert np.array_equal(bank.get("ink").edit(PHOTO), before)


def test_a_version_on_a_new_base_is_served_and_the_old_base_let_go(farm, watched):
    bank = bank_of(watched, 1)
    bank.get("ink")
    farm.publish("ink", seed=12, base=farm.add_base(seed=5))
    look(bank)
    loaded = bank.get("ink")
    assert loaded.base != farm.base
    assert same(loaded.edit(PHOTO), farm.edit("ink", PHOTO))
    gc.collect()
    bank.get("fog")
    assert watched.count(f"{farm.base}/generator.safetensors") == 2


def test_the_old_version_is_given_while_the_new_one_loads(farm, bank, watched):
    old = bank.get("ink")
    farm.publish("ink", seed=11)
    with ThreadPoolExecutor(1) as threads:
        with watched.holding("adapter_model.safetensors"):
            looked = threads.submit(look, bank)
            until(lambda: watched.count("adapter_model.safetensors") == 2)
            assert bank.get("ink").ready is old.ready
        looked.result()
    assert bank.get("ink").version == 2


@pytest.mark.parametrize("damage", ["flipped", "missing", "manifest", "text", "base", "registry"])
def test_a_damaged_version_leaves_the_old_one_in_service(farm, bank, caplog, damage):
    old = bank.get("ink")
    entry = farm.publish("ink", seed=11, base=farm.add_base(seed=5))
    key = {
        "flipped": f"{entry.adapter}/adapter_model.safetensors",
        "missing": f"{entry.adapter}/adapter_model.safetensors",
        "manifest": f"{entry.adapter}/manifest.json",
        "text": f"{entry.adapter}/text.safetensors",
        "base": f"bases/{entry.base}/generator.safetensors",
        "registry": "registry/ink.json",
    }[damage]
    sound = farm.store.get(key)
    farm.store.put(key, sound[:-1] + bytes([sound[-1] ^ 1]))
    if damage == "missing":
        farm.store.delete(key)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            look(bank)
        assert bank.get("ink").ready is old.ready
        assert key in caplog.text
        assert bank.report()["stale"] == (damage != "registry")
    farm.store.put(key, sound)
    look(bank)
    assert bank.get("ink").version == 2
    assert bank.report()["stale"] == 0


def test_the_old_version_stays_when_it_was_evicted_meanwhile(farm, watched):
    bank = bank_of(watched, 1)
    bank.get("ink")
    entry = farm.publish("ink", seed=11)
    farm.store.put(f"{entry.adapter}/adapter_model.safetensors", b"")
    look(bank)
    bank.get("fog")
    assert bank.get("ink").version == 1


def test_a_damaged_first_version_is_an_error_until_it_is_mended(farm, bank, watched):
    key = f"{farm.registry.get('ink').adapter}/adapter_model.safetensors"
    sound = farm.store.get(key)
    farm.store.put(key, sound[:-8])
    with ThreadPoolExecutor(4) as threads:
        with watched.holding("adapter_model.safetensors"):
            waiting = [threads.submit(bank.get, "ink") for _ in range(4)]
            until(lambda: watched.count("adapter_model.safetensors"))
        for future in waiting:
            with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
                future.result()
    assert bank.report()["failures"] >= 1
    farm.store.put(key, sound)
    assert bank.get("ink").version == 1


def test_an_adapter_of_another_base_is_refused(farm):
    entry = farm.publish("wave", seed=4, fits="another")
    with pytest.raises(UserError, match=f"{entry.adapter}.*fits base another"):
        bank_of(farm.store).get("wave")


def test_what_is_no_longer_published_is_no_longer_served(farm, bank):
    bank.get("ink")
    farm.store.delete("registry/ink.json")
    assert bank.get("ink").version == 1
    look(bank)
    for _ in range(2):
        with pytest.raises(UnknownConceptError):
            bank.get("ink")
