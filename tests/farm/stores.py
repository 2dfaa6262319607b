"""What every store does, as tests: a class of them for a kind of store inherits these and says how to make one."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from farm.objects import NotFoundError, Store, TooLargeError
from farm.s3 import S3Store, open_s3
from farm.store import open_store

SPAWN = multiprocessing.get_context("spawn")
WORKERS = 4

KEYS = st.sampled_from(
    ["a/b", "a/bc", "a/b-c/d", "a-b/c", "b", "A/B", "queue/x/pending/k.json", "_/x=1,y@2", "a+b/=", "0/a..b."]
)
PREFIXES = st.sampled_from(["", "a", "a/", "a/b", "a/b-c/", "b", "A", "queue/x/", "nothing/", "b/", "a+b/=", "_/x="])
DATA = st.sampled_from([b"", b"one", b"two", bytes(range(256)) * 20])
BAD_KEYS = [
    "", "/", "/etc/passwd", "a//b", "a/", "..", "a/../../b", "./a", "a/.hidden", ".store/tmp/x", "a\\b", "a\nb",
    "a\x00", "x" * 256, "a/" * 512 + "a", "a b", "a/ ", "~", "a%2e", "a?b", "a#b", "a*", "a:b", "a|b", "$a", "a`b",
    "é", "e\u0301", "a\u2044b", "a\u2215b", "a\uff0fb", "\u2024\u2024/a", "\uff0e\uff0e/a", "\u2025/a", "a\u29f8b",
    "\u0430", "a\u202eb", "a\u200bb", "a\ufeff", "a\u00adb", "a\u0085b", "\ue000", "\U000e0041", "\ud800", "\u0378",
    "a\u00a0b", "\u212a", "ﬁ", "１",
]  # fmt: skip
"""Among them what looks like a slash, a dot or a letter and is none, and what is not seen at all."""


def fresh(bucket: str) -> S3Store:
    """An empty store in a bucket that others use too."""
    return replace(open_s3(bucket), prefix=f"tests/{uuid.uuid4().hex}")


class StoreAgainstDict(RuleBasedStateMachine):
    """The store does what a dict from keys to bytes would do."""

    new_store: Callable[[], Store]

    def __init__(self) -> None:
        super().__init__()
        self.store = type(self).new_store()
        self.folder = tempfile.TemporaryDirectory()
        self.file = Path(self.folder.name) / "file"
        self.model: dict[str, bytes] = {}
        self.marked: dict[str, set[bytes]] = {}

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule(key=KEYS, data=DATA)
    def put(self, key: str, data: bytes) -> None:
        self.store.put(key, data)
        self.model[key] = data

    @rule(key=KEYS, data=DATA)
    def upload(self, key: str, data: bytes) -> None:
        self.file.write_bytes(data)
        self.store.upload(key, self.file)
        self.model[key] = data

    @rule(key=KEYS, data=DATA)
    def put_if_absent(self, key: str, data: bytes) -> None:
        assert self.store.put_if_absent(key, data) == (key not in self.model)
        self.model.setdefault(key, data)

    @rule(key=KEYS, other=KEYS, data=DATA)
    def replace_if_match(self, key: str, other: str, data: bytes) -> None:
        etag = self.store.get_with_etag(other)[1] if other in self.model else "none"
        matches = key in self.model and other in self.model and self.model[key] == self.model[other]
        assert self.store.replace_if_match(key, data, etag) == matches
        if matches:
            self.model[key] = data

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        self.store.delete(key)
        self.model.pop(key, None)

    @rule(key=KEYS)
    def read(self, key: str) -> None:
        assert self.store.exists(key) == (key in self.model)
        if key in self.model:
            assert self.store.get(key) == self.store.get_with_etag(key)[0] == self.model[key]
        else:
            with pytest.raises(NotFoundError):
                self.store.get(key)

    @rule(key=KEYS, start=st.integers(0, 6000), length=st.integers(0, 6000))
    def read_a_part(self, key: str, start: int, length: int) -> None:
        if key in self.model:
            assert self.store.get_range(key, start, length) == self.model[key][start : start + length]
        else:
            with pytest.raises(NotFoundError):
                self.store.get_range(key, start, length)

    @rule(key=KEYS)
    def download(self, key: str) -> None:
        self.file.write_bytes(b"of before")
        if key in self.model:
            self.store.download(key, self.file)
        else:
            with pytest.raises(NotFoundError):
                self.store.download(key, self.file)
        assert self.file.read_bytes() == self.model.get(key, b"of before")
        assert [*self.file.parent.iterdir()] == [self.file]

    @rule()
    def reopen(self) -> None:
        self.store = pickle.loads(pickle.dumps(open_store(self.store.url)))

    @rule(prefix=PREFIXES)
    def list_below(self, prefix: str) -> None:
        assert list(self.store.list(prefix)) == sorted(key for key in self.model if key.startswith(prefix))

    @rule(prefix=PREFIXES)
    def mark_below(self, prefix: str) -> None:
        marks = self.store.marks(prefix)
        assert list(marks) == sorted(key for key in self.model if key.startswith(prefix))
        for key, mark in marks.items():
            bytes_of = self.marked.setdefault(f"{key} {mark}", {self.model[key]})
            assert bytes_of == {self.model[key]}, "one mark for different bytes"


class StoreContract:
    """Needs a fixture `new_store`: a function that makes an empty store at each call."""

    examples = 20
    machine: type[StoreAgainstDict] = StoreAgainstDict

    @pytest.fixture
    def store(self, new_store: Callable[[], Any]) -> Any:
        return new_store()

    def test_it_does_what_a_dict_would(self, new_store: Callable[[], Any]) -> None:
        machine = type("Machine", (self.machine,), {"new_store": staticmethod(new_store)})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=self.examples,
                stateful_step_count=25,
                deadline=None,
                suppress_health_check=[HealthCheck.too_slow],
            ),
        )

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_refuses_keys(self, store: Any, tmp_path: Path, key: str) -> None:
        file = tmp_path / "file"
        file.touch()
        calls = (
            lambda: store.get(key),
            lambda: store.get_with_etag(key),
            lambda: store.exists(key),
            lambda: store.delete(key),
            lambda: store.put(key, b""),
            lambda: store.put_if_absent(key, b""),
            lambda: store.replace_if_match(key, b"", "x"),
            lambda: store.get_range(key, 0, 1),
            lambda: store.download(key, file),
            lambda: store.upload(key, file),
            lambda: store.presigned_url(key, 60),
        )
        for call in calls:
            with pytest.raises(ValueError, match="is not a key"):
                call()

    @pytest.mark.parametrize("prefix", ["../", "/", "a//", ".store", ".store/"])
    def test_refuses_prefixes(self, store: Any, prefix: str) -> None:
        for call in (store.list, store.marks):
            with pytest.raises(ValueError, match="is not a key"):
                call(prefix)

    def test_not_found_names_the_key_and_pickles(self, store: Any, tmp_path: Path) -> None:
        calls = (
            lambda: store.get("edits/charcoal"),
            lambda: store.get_range("edits/charcoal", 0, 1),
            lambda: store.download("edits/charcoal", tmp_path / "here" / "file"),
            lambda: store.presigned_url("edits/charcoal", 60),
        )
        (tmp_path / "here").mkdir()
        for call in calls:
            with pytest.raises(NotFoundError) as caught:
                call()
            again = pickle.loads(pickle.dumps(caught.value))
            assert str(again) == f"the store {store.url} holds no edits/charcoal"
        assert not list((tmp_path / "here").iterdir())

    def test_its_address_opens_it_again(self, store: Any) -> None:
        store.put("a", b"here")
        for again in (open_store(store.url), pickle.loads(pickle.dumps(store))):
            assert again == store
            assert again.url == store.url
            assert len({again, store}) == 1
            assert again.get("a") == b"here"

    def test_a_long_listing_is_whole_and_in_order(self, store: Any) -> None:
        keys = [f"{n % 7}/{n:04d}" for n in range(250)]
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda key: store.put(key, b""), keys))
        assert list(store.list()) == sorted(keys)
        assert list(store.marks()) == sorted(keys)
        assert list(store.list("3/00")) == sorted(key for key in keys if key.startswith("3/00"))

    @pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, -1)])
    def test_no_object_has_a_negative_part(self, store: Any, start: int, length: int) -> None:
        store.put("a", b"abc")
        with pytest.raises(ValueError, match="no object has"):
            store.get_range("a", start, length)

    def test_no_more_is_read_than_may_be(self, store: Any) -> None:
        store.put("a/b", b"abc")
        store.put("a/empty", b"")
        for read in (store.get, lambda key, at_most: store.get_with_etag(key, at_most)[0]):
            assert read("a/b", 3) == read("a/b", 10**15) == b"abc" and read("a/empty", 0) == b""
            for at_most in (2, 0):
                with pytest.raises(TooLargeError) as caught:
                    read("a/b", at_most)
                told = f"The object a/b of the store {store.url} has more than the {at_most} bytes that it can have: "
                assert str(caught.value) == f"{told}delete it and run again."
            with pytest.raises(NotFoundError):
                read("a/c", 0)
        assert store.get_with_etag("a/b", 3) == store.get_with_etag("a/b") and store.get("a/b") == b"abc"

    def test_a_large_file_comes_back_as_it_went(self, store: Any, tmp_path: Path) -> None:
        went, back = tmp_path / "went", tmp_path / "back"
        went.write_bytes(os.urandom((20 << 20) + 1))
        store.upload("weights/a", went)
        assert list(store.list()) == ["weights/a"]
        assert store.get_range("weights/a", (8 << 20) - 5, 10) == went.read_bytes()[(8 << 20) - 5 :][:10]
        store.download("weights/a", back)
        assert went.read_bytes() == back.read_bytes() == store.get("weights/a")
        data, etag = store.get_with_etag("weights/a")
        assert store.replace_if_match("weights/a", b"small", etag)
        assert not store.replace_if_match("weights/a", data, etag)

    def test_the_users_own_files_are_the_users(self, store: Any, tmp_path: Path) -> None:
        """What is wrong with them is not the store's fault, and is not waited for."""
        store.put("a", b"abc")
        with pytest.raises(FileNotFoundError, match="missing"):
            store.upload("b", tmp_path / "missing")
        with pytest.raises(FileNotFoundError):
            store.download("a", tmp_path / "missing" / "file")
        assert list(store.list()) == ["a"]

    def test_a_presigned_address_needs_no_credentials(self, store: Any) -> None:
        data = os.urandom(1000)
        store.put("packs/a=1,b@c+d", data)
        with urllib.request.urlopen(store.presigned_url("packs/a=1,b@c+d", 60)) as answer:
            assert answer.read() == data

    @pytest.mark.parametrize("seconds", [0, -1, 604_801])
    def test_a_presigned_address_is_good_for_a_week_at_most(self, store: Any, seconds: int) -> None:
        with pytest.raises(ValueError, match="604800 seconds"):
            store.presigned_url("a", seconds)


class StoreRaces:
    """Several processes and threads on one store; needs a fixture `store`, empty."""

    rounds = 100

    @pytest.fixture(scope="class")
    @classmethod
    def pool(cls) -> Iterator[Any]:
        with SPAWN.Pool(WORKERS) as pool:
            pool.map(abs, range(WORKERS))  # they have started and imported this module
            yield pool
            pool.close()
            pool.join()

    def test_put_if_absent_has_one_winner(self, pool: Any, store: Any) -> None:
        results = race(pool, _claim, store, self.rounds)
        for key in range(self.rounds):
            winners = [worker for worker in range(WORKERS) if results[worker][key]]
            assert len(winners) == 1
            assert store.get(f"claims/{key}") == str(winners[0]).encode()

    def test_put_if_absent_has_one_winner_between_threads(self, store: Any) -> None:
        with ThreadPoolExecutor(WORKERS) as threads:
            results = list(threads.map(lambda worker: _claim(store, worker, self.rounds), range(WORKERS)))
        assert [sum(won) for won in zip(*results, strict=True)] == [1] * self.rounds

    def test_replace_if_match_loses_no_update(self, pool: Any, store: Any) -> None:
        store.put("counter", b"0")
        lost = race(pool, _count, store, self.rounds)
        assert store.get("counter") == str(self.rounds * WORKERS).encode()
        assert sum(lost) > 0, "the workers never met, so the race proved nothing"

    def test_replace_if_match_loses_no_update_between_threads(self, store: Any) -> None:
        store.put("counter", b"0")
        with ThreadPoolExecutor(WORKERS) as threads:
            list(threads.map(lambda worker: _count(store, worker, self.rounds), range(WORKERS)))
        assert store.get("counter") == str(self.rounds * WORKERS).encode()

    def test_readers_see_whole_objects(self, pool: Any, store: Any) -> None:
        store.put("big", b"\0" * 500_000)
        assert all(race(pool, _write_or_read, store, self.rounds * 2 // 5))

    def test_a_killed_writer_leaves_old_or_new(self, store: Any) -> None:
        store.put("big", b"a" * 4_000_000)
        for i in range(4):
            ready, child_end = SPAWN.Pipe(duplex=False)
            writer = SPAWN.Process(target=_write_for_ever, args=(store, child_end))
            writer.start()
            ready.recv()
            time.sleep(0.004 * i)
            writer.kill()
            writer.join()
            ready.close()
            child_end.close()
            data, etag = store.get_with_etag("big")
            assert data in (b"a" * 4_000_000, b"b" * 4_000_000)
            assert list(store.list()) == ["big"]
            assert store.replace_if_match("big", data, etag), "no lock outlives its holder"


def race(pool: Any, function: Callable[..., Any], store: Any, rounds: int) -> list[Any]:
    """Run function(store, worker, rounds) once in every worker at the same moment and return what each returned."""
    start = time.time() + 0.2
    arguments = [(function, store, worker, rounds, start) for worker in range(WORKERS)]
    answers: list[Any] = pool.starmap(_at, arguments, chunksize=1)
    return answers


def _at(function: Callable[..., Any], store: Any, worker: int, rounds: int, start: float) -> Any:
    store.exists("a")  # a connection is there
    while time.time() < start:
        pass
    return function(store, worker, rounds)


def _claim(store: Any, worker: int, rounds: int) -> list[bool]:
    return [store.put_if_absent(f"claims/{key}", str(worker).encode()) for key in range(rounds)]


def _count(store: Any, worker: int, rounds: int) -> int:
    """Add one so many times, by compare-and-swap; returns how often another worker came first."""
    added = lost = 0
    while added < rounds:
        data, etag = store.get_with_etag("counter")
        if store.replace_if_match("counter", str(int(data) + 1).encode(), etag):
            added += 1
        else:
            lost += 1
    return lost


def _write_or_read(store: Any, worker: int, rounds: int) -> bool:
    for i in range(rounds):
        if worker < 2:
            store.put("big", bytes([2 * i + worker]) * (500_000 + i))
        else:
            data = store.get("big")
            if len(set(data)) != 1 or len(data) != 500_000 + data[0] // 2:
                return False
    return True


def _write_for_ever(store: Any, ready: Any) -> None:
    ready.send(None)
    while True:
        store.put("big", b"b" * 4_000_000)
        store.put("big", b"a" * 4_000_000)
