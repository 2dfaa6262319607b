from __future__ import annotations

import os
import threading
from collections import Counter
from typing import Any

import pytest
from tiny_farm import three_concepts

from farm.serve.published import Published, UnknownConceptError
from farm.store import StoreUnreachableError


class Counted:
    """A store that counts calls, and can be away."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.calls: Counter[str] = Counter()
        self.away = False

    def __getattr__(self, name: str) -> Any:
        if name == "url":
            return self._store.url

        def call(*args: Any) -> Any:
            self.calls[name] += 1
            if self.away:
                raise StoreUnreachableError("file:///away")
            return getattr(self._store, name)(*args)

        return call


@pytest.fixture
def farm(tmp_path):
    return three_concepts(tmp_path / "store")


@pytest.fixture
def counted(farm):
    return Counted(farm.store)


def test_a_look_without_a_change_is_one_call(farm, counted):
    for key in farm.store.list("registry/"):  # a folder's clock tells young files apart too coarsely
        os.utime(farm.store.path(key), (0, 0))
    published = Published(counted)
    before = published.entries
    assert [*before] == ["charcoal", "fog", "ink"]
    counted.calls.clear()
    for _ in range(3):
        published.refresh()
    assert counted.calls == {"marks": 3}
    assert published.entries is before
    farm.publish("ink", seed=11)
    published.refresh()
    assert counted.calls == {"marks": 4, "get": 1}  # the one that changed
    assert (before["ink"].version, published.entries["ink"].version) == (1, 2)


def test_what_comes_and_goes_is_followed(farm, counted):
    published = Published(counted)
    farm.publish("wave", seed=4)
    farm.registry.unpublish("fog")
    farm.store.delete("registry/ink.json")
    farm.store.put("registry/Not-an-id.json", b"{")
    published.refresh()
    assert [*published.entries] == ["charcoal", "wave"]
    farm.registry.rollback("fog")
    published.refresh()
    assert [*published.entries] == ["charcoal", "fog", "wave"]
    assert published.near("charcaol") == ("charcoal",)


def test_a_damaged_record_stays_as_it_was_and_is_tried_again(farm, counted, caplog):
    published = Published(counted)
    farm.publish("fog", seed=12)
    sound = farm.store.get("registry/fog.json")
    farm.store.put("registry/fog.json", b"{")
    for _ in range(2):
        caplog.clear()
        published.refresh()
        assert published.release("fog").version == 1
        assert "fog is not read anew" in caplog.text
    farm.store.put("registry/fog.json", sound)
    published.refresh()
    assert published.release("fog").version == 2


def test_a_store_that_is_away_changes_nothing(farm, counted, caplog):
    published = Published(counted, seconds=0.01)
    looked = threading.Semaphore(0)
    published.listen(looked.release)
    published.follow()
    assert looked.acquire(timeout=60)
    counted.away = True
    for _ in range(2000):
        if "the registry is as it was" in caplog.text:
            break
        threading.Event().wait(0.01)
    assert [*published.entries] == ["charcoal", "fog", "ink"]
    assert published.age > 0
    farm.publish("ink", seed=11)
    counted.away = False
    while published.release("ink").version == 1:
        assert looked.acquire(timeout=60)
    published.close()


def test_an_old_release_is_told_from_one_that_never_was(farm):
    published = Published(farm.store)
    farm.publish("ink", seed=11)
    published.refresh()
    assert [published.release("ink", version).version for version in (None, 1, 2)] == [2, 1, 2]
    with pytest.raises(UnknownConceptError) as caught:
        published.release("ink", 3)
    assert (caught.value.version, caught.value.near) == (3, ())
