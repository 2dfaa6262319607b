"""Many documents looked at together: the answers of a store that is asked for each, in far fewer calls."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.glance import Documents, Glance
from farm.store import LocalStore, NotFoundError, StoreUnreachableError

SECONDS = count(1)  # of the past, in which files were put


class Counted:
    """A store that counts what is asked of it, and does something before it is read the next time."""

    def __init__(self, store: LocalStore) -> None:
        self.store, self.calls = store, Counter[str]()
        self.before_reading = lambda: None

    def __getattr__(self, name: str) -> Any:
        if name in ("get", "marks", "list"):
            self.calls[name] += 1
        if name == "get":
            self.before_reading()
            self.before_reading = lambda: None
        return getattr(self.store, name)


@pytest.fixture
def store(tmp_path: Path) -> Counted:
    store = LocalStore(tmp_path / "store")
    for number in range(40):
        put_of_old(store, f"registry/c-{number}.json", b"one")
        put_of_old(store, f"registry/c-{number}.txt", b"other")
    return Counted(store)


def put_of_old(store: LocalStore, key: str, data: bytes) -> None:
    """Put it as if time had gone by since."""
    store.put(key, data)
    at = next(SECONDS)
    os.utime(store.path(key), (at, at))


def is_json(key: str) -> bool:
    return key.endswith(".json")


def test_a_second_look_reads_what_has_changed(store: Counted) -> None:
    documents = Documents(store)
    first = documents.look("registry/", wanted=is_json)
    assert store.calls == {"marks": 1, "get": 40}
    assert {first.get(f"registry/c-{number}.json") for number in range(40)} == {b"one"}
    store.calls.clear()
    assert documents.look("registry/", wanted=is_json).documents == first.documents
    assert store.calls == {"marks": 1}

    put_of_old(store.store, "registry/c-3.json", b"two")
    put_of_old(store.store, "registry/new.json", b"new")
    store.store.delete("registry/c-4.json")
    store.calls.clear()
    second = documents.look("registry/", wanted=is_json)
    assert store.calls == {"marks": 1, "get": 2}
    assert (second.get("registry/c-3.json"), second.get("registry/new.json")) == (b"two", b"new")
    with pytest.raises(NotFoundError):
        second.get("registry/c-4.json")
    assert first.get("registry/c-4.json") == b"one", "a look stays as it was"


def test_looks_at_other_places_do_not_forget(store: Counted) -> None:
    put_of_old(store.store, "adapters/ink/a/manifest.json", b"{}")
    documents = Documents(store)
    for _ in range(2):
        documents.look("registry/", wanted=is_json)
        documents.look("adapters/", wanted=is_json)
    assert store.calls == {"marks": 4, "get": 41}


def test_what_is_written_just_now_is_read_anew(store: Counted) -> None:
    """Its mark could be that of what comes next: clocks stand still for milliseconds, and inodes are used again."""
    documents = Documents(store)
    for number in range(50):
        data = f"{number:04d}".encode()
        store.store.put("registry/c-0.json", data)
        assert documents.look("registry/", wanted=is_json).get("registry/c-0.json") == data


def test_what_changes_during_a_look_is_found_by_the_next(store: Counted) -> None:
    documents = Documents(store)
    store.before_reading = lambda: put_of_old(store.store, "registry/c-0.json", b"two")
    assert documents.look("registry/", wanted=is_json).get("registry/c-0.json") in (b"one", b"two")
    assert documents.look("registry/", wanted=is_json).get("registry/c-0.json") == b"two"


def test_what_is_deleted_during_a_look_is_not_there(store: Counted) -> None:
    store.before_reading = lambda: [store.store.delete(f"registry/c-{n}.json") for n in range(40)]
    found = Documents(store).look("registry/", wanted=is_json)
    gone = [n for n in range(40) if f"registry/c-{n}.json" not in found.list("registry/")]
    assert gone and found.documents.keys().isdisjoint(f"registry/c-{n}.json" for n in gone)
    for number in gone:
        with pytest.raises(NotFoundError):
            found.get(f"registry/c-{number}.json")


def test_a_store_that_is_away_is_not_an_empty_one(store: Counted) -> None:
    store.store.root.rename(store.store.root.with_name("elsewhere"))
    with pytest.raises(StoreUnreachableError):
        Documents(store).look("registry/", wanted=is_json)


def test_another_process_reads_only_what_was_not_kept(store: Counted) -> None:
    put_of_old(store.store, "registry/c-5.json", bytes(range(256)))
    first = Documents(store, "glance/farm.json.zlib")
    before = first.look("registry/", wanted=is_json).documents
    assert first.news == 40
    first.keep()
    put_of_old(store.store, "registry/c-3.json", b"two")
    store.store.delete("registry/c-4.json")
    other = Documents(store, "glance/farm.json.zlib")
    found = other.look("registry/", wanted=is_json).documents
    assert other.news == 1 and found == {
        **{key: data for key, data in before.items() if key != "registry/c-4.json"},
        "registry/c-3.json": b"two",
    }


@pytest.mark.parametrize(
    "kept", [b"", b"no zlib", zlib.compress(b"[1"), zlib.compress(b'{"a": 1}'), zlib.compress(b"7")]
)
def test_what_was_kept_and_is_damaged_is_not_missed(store: Counted, kept: bytes) -> None:
    store.store.put("glance/farm.json.zlib", kept)
    documents = Documents(store, "glance/farm.json.zlib")
    assert len(documents.look("registry/", wanted=is_json).documents) == 40 == documents.news


KEYS = st.sampled_from(["a/b", "a/b/c", "a/bc", "a/d", "ab/c", "b/a", "b/c/d", "c"])


@given(st.sets(KEYS), st.sets(st.sampled_from(["a/", "a/b/", "b/"])), st.sets(KEYS), KEYS)
def test_a_glance_answers_as_the_store_does(there: set[str], prefixes: set[str], wanted: set[str], key: str) -> None:
    class Dictionary:
        url = "dict:"
        at_once = 1

        def get(self, key: str, at_most: int | None = None) -> bytes:
            if key not in there:
                raise NotFoundError(key, self.url)
            return key.encode()

        def list(self, prefix: str = "") -> Any:
            return iter(sorted(name for name in there if name.startswith(prefix)))

        def marks(self, prefix: str = "") -> dict[str, str]:
            return dict.fromkeys(self.list(prefix), "mark")

    store = Dictionary()
    glance: Glance = Documents(store).look(*prefixes, wanted=wanted.__contains__)  # type: ignore[arg-type]
    for prefix in ("", "a", "a/", "a/b", "a/b/", "b/", "b/c/", "c", key):
        assert list(glance.list(prefix)) == list(store.list(prefix))
    if key in there:
        assert glance.get(key) == key.encode()
    else:
        with pytest.raises(NotFoundError):
            glance.get(key)
