"""Several processes on one store, some of them killed."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from stores import SPAWN, StoreRaces

from farm.store import LocalStore


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "store")


class TestLocalStore(StoreRaces):
    pass


@pytest.mark.parametrize("call", [lambda store: store.put("x", b"put"), lambda store: store.delete("x")])
def test_nothing_slips_between_a_comparison_and_its_swap(tmp_path, call):
    class Interrupted(LocalStore):
        def get_with_etag(self, key, at_most=None):
            found = super().get_with_etag(key, at_most)
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
