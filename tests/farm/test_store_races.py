"""Several processes on one store, some of them killed."""

import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from farm.store import LocalStore

SPAWN = multiprocessing.get_context("spawn")
WORKERS = 4


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "store")


@pytest.fixture(scope="module")
def pool():
    with SPAWN.Pool(WORKERS) as pool:
        pool.map(abs, range(WORKERS))  # they have started and imported this module
        yield pool
        pool.close()
        pool.join()


def race(pool, function, store):
    """Run function(store, worker) once in every worker at the same moment and return what each returned."""
    start = time.time() + 0.2
    arguments = [(function, store, worker, start) for worker in range(WORKERS)]
    return pool.starmap(_at, arguments, chunksize=1)


def _at(function, store, worker, start):
    while time.time() < start:
        pass
    return function(store, worker)


def test_put_if_absent_has_one_winner(pool, store):
    results = race(pool, _claim, store)
    for key in range(100):
        winners = [worker for worker in range(WORKERS) if results[worker][key]]
        assert len(winners) == 1
        assert store.get(f"claims/{key}") == str(winners[0]).encode()


def _claim(store, worker):
    return [store.put_if_absent(f"claims/{key}", str(worker).encode()) for key in range(100)]


def test_replace_if_match_loses_no_update(pool, store):
    store.put("counter", b"0")
    lost = race(pool, _count, store)
    assert store.get("counter") == str(100 * WORKERS).encode()
    assert sum(lost) > 0, "the workers never met, so the race proved nothing"


def test_replace_if_match_loses_no_update_between_threads(store):
    store.put("counter", b"0")
    with ThreadPoolExecutor(WORKERS) as threads:
        list(threads.map(lambda worker: _count(store, worker), range(WORKERS)))
    assert store.get("counter") == str(100 * WORKERS).encode()


def _count(store, worker):
    """Add one a hundred times, by compare-and-swap; returns how often another worker came first."""
    added = lost = 0
    while added < 100:
        data, etag = store.get_with_etag("counter")
        if store.replace_if_match("counter", str(int(data) + 1).encode(), etag):
            added += 1
        else:
            lost += 1
    return lost


@pytest.mark.parametrize("call", [lambda store: store.put("x", b"put"), lambda store: store.delete("x")])
def test_nothing_slips_between_a_comparison_and_its_swap(tmp_path, call):
    class Interrupted(LocalStore):
        def get_with_etag(self, key):
            found = super().get_with_etag(key)
            others.append(thread.submit(call, LocalStore(self.root)))
            time.sleep(0.1)
            return found

    others = []
    store = LocalStore(tmp_path)
    store.put("x", b"old")
    with ThreadPoolExecutor() as thread:
        assert Interrupted(tmp_path).replace_if_match("x", b"swapped", store.get_with_etag("x")[1])
    others[0].result()
    assert not store.exists("x") or store.get("x") == b"put"  # it came after


def test_readers_see_whole_objects(pool, store):
    store.put("big", b"\0" * 500_000)
    assert all(race(pool, _write_or_read, store))


def _write_or_read(store, worker):
    for i in range(40):
        if worker < 2:
            store.put("big", bytes([2 * i + worker]) * (500_000 + i))
        else:
            data = store.get("big")
            if len(set(data)) != 1 or len(data) != 500_000 + data[0] // 2:
                return False
    return True


def test_a_killed_writer_leaves_old_or_new(store):
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
        assert store.replace_if_match("big", data, etag), "the lock went with its holder"


def _write_for_ever(store, ready):
    ready.send(None)
    while True:
        store.put("big", b"b" * 4_000_000)
        store.put("big", b"a" * 4_000_000)


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_writer_killed_just_before_its_rename_changes_nothing(store, moment):
    store.put("x", b"old")
    writer = SPAWN.Process(target=_write_and_die, args=(store, moment))
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    assert store.get("x") == b"old"
    assert list(store.list()) == ["x"]
    assert len(list((store.root / ".store/tmp").iterdir())) == 1, "it was killed with its temporary written"
    store.put("x", b"new")
    assert store.get("x") == b"new"


def _write_and_die(store, moment):
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, moment, die)
    store.put("x", b"half")
