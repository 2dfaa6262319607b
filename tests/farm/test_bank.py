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
from tiny_farm import SIDE, TinyFarm

from e2gan.infer import edit_photo
from e2gan.pairs import Image
from farm.errors import UserError
from farm.serve.bank import AdapterBank, Loaded, UnknownConceptError

PHOTO = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
PLENTY = 1_000_000_000


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


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def farm(tmp_path):
    farm = TinyFarm(tmp_path / "store")
    for seed, concept in enumerate(("charcoal", "fog", "ink"), start=1):
        farm.publish(concept, seed=seed)
    return farm


@pytest.fixture
def watched(farm):
    return Watched(farm.store)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def bank(watched, clock):
    return AdapterBank(watched, byte_budget=PLENTY, check_seconds=5, clock=clock)


def edit(loaded: Loaded) -> Image:
    return edit_photo(loaded.generator, loaded.text, PHOTO, longest_side=SIDE)


def until(condition) -> None:
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.005)
    raise AssertionError("waited in vain")


def test_a_loaded_concept_edits_as_its_adapter_does(farm, bank):
    for concept in ("ink", "fog", "charcoal"):
        loaded, entry = bank.get(concept), farm.registry.get(concept)
        assert (loaded.concept, loaded.version, loaded.digest, loaded.base) == (concept, 1, entry.digest, farm.base)
        assert loaded.text.shape == (77, 768)
        np.testing.assert_array_equal(edit(loaded), farm.edit(concept, PHOTO))


def test_adapters_share_one_copy_of_their_base(bank, watched):
    ink, fog = bank.get("ink").generator, bank.get("fog").generator
    assert watched.count("generator.safetensors") == 1
    assert ink.residual[0].conv1.weight.data_ptr() == fog.residual[0].conv1.weight.data_ptr()
    assert ink.stem.weight.data_ptr() != fog.stem.weight.data_ptr()
    tensors = sum(tensor.nbytes for tensor in ink.state_dict().values())
    residual = sum(tensor.nbytes for tensor in ink.residual.state_dict().values())
    texts = 2 * 77 * 768 * 4
    assert texts < bank.size < texts + 2 * (tensors - residual)


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
    concepts = ("charcoal", "fog", "ink")
    bank = AdapterBank(watched, byte_budget=1)  # room for one: nearly every call evicts another's
    expected = {concept: farm.edit(concept, PHOTO) for concept in concepts}

    def ask(number: int) -> bool:
        concept = concepts[number % 3]
        loaded = bank.get(concept)
        return loaded.concept == concept and np.array_equal(edit(loaded), expected[concept])

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(ask, range(60)))
    assert watched.count("adapter_model.safetensors") > 3


def test_the_least_recently_used_go_first(farm, watched):
    one = AdapterBank(farm.store, byte_budget=PLENTY)
    one.get("ink")
    bank = AdapterBank(watched, byte_budget=2 * one.size)

    def loads(concept: str) -> bool:
        before = watched.count("adapter_model.safetensors")
        bank.get(concept)
        return watched.count("adapter_model.safetensors") > before

    assert [loads(concept) for concept in ("ink", "fog", "ink", "charcoal")] == [True, True, False, True]
    assert bank.size == 2 * one.size
    assert [loads(concept) for concept in ("ink", "charcoal", "fog", "ink")] == [False, False, True, True]
    assert watched.count("generator.safetensors") == 1


def test_an_adapter_larger_than_the_budget_stays_while_it_is_used(watched):
    bank = AdapterBank(watched, byte_budget=1)
    assert bank.get("ink") is bank.get("ink")
    bank.get("fog")
    assert bank.get("fog") is bank.get("fog")
    assert watched.count("adapter_model.safetensors") == 2


def test_many_callers_cause_one_load(bank, watched):
    with ThreadPoolExecutor(12) as threads:
        with watched.holding("adapter_model.safetensors"):
            waiting = [threads.submit(bank.get, "ink") for _ in range(12)]
            until(lambda: watched.count("adapter_model.safetensors"))
        assert len({id(future.result()) for future in waiting}) == 1
    assert watched.count("adapter_model.safetensors") == 1


def test_concepts_asked_for_at_once_load_their_base_once(bank, watched):
    with ThreadPoolExecutor(3) as threads:
        with watched.holding("generator.safetensors"):
            waiting = [threads.submit(bank.get, concept) for concept in ("charcoal", "fog", "ink")]
            until(lambda: watched.count("generator.safetensors"))
        assert {future.result().concept for future in waiting} == {"charcoal", "fog", "ink"}
    assert watched.count("generator.safetensors") == 1


def test_a_published_version_is_served_after_the_next_check(farm, bank, clock, watched):
    old = bank.get("ink")
    before = edit(old)
    farm.publish("ink", seed=11)
    clock.now += 4.9
    assert bank.get("ink") is old
    clock.now += 0.2
    new = bank.get("ink")
    assert (new.version, new.digest) == (2, farm.registry.get("ink").digest)
    np.testing.assert_array_equal(edit(new), farm.edit("ink", PHOTO))
    np.testing.assert_array_equal(edit(old), before)
    assert not np.array_equal(edit(new), before)
    clock.now += 10
    assert bank.get("ink") is new
    assert watched.count("adapter_model.safetensors") == 2


def test_a_version_on_a_new_base_is_served_and_the_old_base_let_go(farm, watched, clock):
    bank = AdapterBank(watched, byte_budget=1, check_seconds=5, clock=clock)
    bank.get("ink")
    farm.publish("ink", seed=12, base=farm.add_base(seed=5))
    clock.now += 6
    loaded = bank.get("ink")
    assert loaded.base != farm.base
    np.testing.assert_array_equal(edit(loaded), farm.edit("ink", PHOTO))
    gc.collect()
    bank.get("fog")
    assert watched.count(f"{farm.base}/generator.safetensors") == 2


def test_the_old_version_is_given_while_the_new_one_loads(farm, bank, clock, watched):
    old = bank.get("ink")
    farm.publish("ink", seed=11)
    clock.now += 6
    with ThreadPoolExecutor(1) as threads:
        with watched.holding("adapter_model.safetensors"):
            first = threads.submit(bank.get, "ink")
            until(lambda: watched.count("adapter_model.safetensors") == 2)
            assert bank.get("ink") is old
        assert first.result().version == 2
    assert bank.get("ink").version == 2


@pytest.mark.parametrize("damage", ["flipped", "missing", "manifest", "text", "base", "registry"])
def test_a_damaged_version_leaves_the_old_one_in_service(farm, bank, clock, caplog, damage):
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
        clock.now += 6
        with caplog.at_level(logging.WARNING, "farm.serve.bank"):
            assert bank.get("ink") is old
        assert "ink: version 1 stays in service" in caplog.text
        assert key in caplog.text
    farm.store.put(key, sound)
    clock.now += 6
    assert bank.get("ink").version == 2


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
    farm.store.put(key, sound)
    assert bank.get("ink").version == 1


def test_an_adapter_of_another_base_is_refused(farm, bank):
    entry = farm.publish("wave", seed=4, fits="another")
    with pytest.raises(UserError, match=f"{entry.adapter}.*fits base another"):
        bank.get("wave")


def test_what_is_no_longer_published_is_no_longer_served(farm, bank, clock):
    bank.get("ink")
    farm.store.delete("registry/ink.json")
    assert bank.get("ink").version == 1
    clock.now += 6
    for _ in range(2):
        with pytest.raises(UnknownConceptError):
            bank.get("ink")
    assert bank.size == 0
