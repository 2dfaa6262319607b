"""The queue under workers that are killed, at any moment, and workers that race."""

import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from clocks import Host

from farm.queue import LeaseLostError, Queue, owner_name
from farm.store import LocalStore

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "store")


@pytest.fixture
def host():
    return Host()


@pytest.fixture
def queue(store, host):
    return Queue(store, "adapt", **host.clocks)


def keys(items):
    return [item.key for item in items]


class DyingStore(LocalStore):
    """Dies before its write number `lives`, as a killed process would."""

    lives = 0

    def put(self, key, data):
        self.live()
        super().put(key, data)

    def put_if_absent(self, key, data):
        self.live()
        return super().put_if_absent(key, data)

    def replace_if_match(self, key, data, etag):
        self.live()
        return super().replace_if_match(key, data, etag)

    def delete(self, key):
        self.live()
        super().delete(key)

    @classmethod
    def live(cls):
        cls.lives -= 1
        if cls.lives < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("lives", range(5))
@pytest.mark.parametrize("how", ["lease", "ack", "fail", "give up", "release", "retry"])
def test_a_death_between_two_writes_loses_no_item(tmp_path, host, how, lives):
    sound = Queue(LocalStore(tmp_path), "q", **host.clocks)
    mortal = Queue(DyingStore(tmp_path), "q", **host.clocks)
    sound.enqueue("ink", {})
    if how == "retry":
        sound.fail(sound.lease("w", 60), "no", max_attempts=1)
    lease = None if how in ("lease", "retry") else sound.lease("w", 60)
    DyingStore.lives = lives
    finished = True
    try:
        match how:
            case "lease":
                mortal.lease("w", 60)
            case "fail":
                mortal.fail(lease, "no", max_attempts=2)
            case "give up":
                mortal.fail(lease, "no", max_attempts=1)
            case "retry":
                mortal.retry("ink")
            case _:
                getattr(mortal, how)(lease)
    except KeyboardInterrupt:
        finished = False
    if how == "ack":
        assert sound.pending() == [] or not finished
    else:
        assert keys(sound.pending()) + keys(sound.failed()) == ["ink"]

    def lease_at_last():
        """A dead worker's lease is seen at first, and then seen to be silent."""
        first = sound.lease("w", 60)
        host.time.pass_by(60)
        return first or sound.lease("w", 60)

    again = lease_at_last()
    if again:
        assert again.item.attempts <= 1
        sound.ack(again)
        assert sound.pending() == sound.failed() == sound.leased() == []
    assert sound.enqueue("ink", {}) == (sound.failed() == [])
    assert (lease_at_last() is None) == (sound.failed() != [])


def test_an_owner_is_host_pid_and_start():
    host, pid, started = owner_name().split(":")
    assert host.startswith(os.uname().nodename)
    assert int(pid) == os.getpid()
    assert started == Path("/proc/self/stat").read_text().split()[21]


def test_a_live_process_keeps_its_lease(store):
    queue = Queue(store, "q")
    queue.enqueue("ink", {})
    queue.lease(owner_name(), 60)
    assert Queue(store, "q").lease("other", 60) is None


@pytest.mark.parametrize("reaped", [True, False])
def test_the_lease_of_a_killed_process_is_free_at_once(store, reaped):
    queue = Queue(store, "q")
    queue.enqueue("ink", {})
    received, child_end = SPAWN.Pipe(duplex=False)
    worker = SPAWN.Process(target=_lease_and_hang, args=(queue, child_end))
    worker.start()
    lost = received.recv()
    assert queue.lease(owner_name(), 3600) is None
    os.kill(worker.pid, signal.SIGKILL)
    if reaped:
        worker.join()
    else:
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    taken = queue.lease(owner_name(), 3600)
    assert taken.item.key == "ink"
    with pytest.raises(LeaseLostError, match="ink"):
        queue.renew(lost)
    worker.join()
    received.close()
    child_end.close()


def _lease_and_hang(queue, connection):
    connection.send(queue.lease(owner_name(), 3600))
    time.sleep(60)


def test_a_recycled_pid_is_not_mistaken_for_the_owner(queue):
    host, pid, started = owner_name().split(":")
    queue.enqueue("ink", {})
    queue.lease(f"{host}:{pid}:{int(started) - 1}", 60)
    assert queue.lease(owner_name(), 60) is not None


def test_the_owner_on_another_host_is_trusted_while_it_is_heard_of(store, queue, host):
    _, pid, started = owner_name().split(":")
    queue.enqueue("ink", {})
    lease = queue.lease(f"elsewhere/1:{pid}:{int(started) - 1}", 60)
    watcher = Queue(store, "adapt", **host.clocks)
    assert watcher.lease(owner_name(), 60) is None
    host.time.pass_by(60)
    queue.renew(lease)
    assert watcher.lease(owner_name(), 60) is None
    host.time.pass_by(60)
    assert watcher.lease(owner_name(), 60) is not None


def test_workers_share_the_work_and_never_hold_one_item_together(store, tmp_path):
    queue = Queue(store, "q")
    for i in range(40):
        queue.enqueue(f"item-{i:02}", {}, priority=i % 3)
    held, done = tmp_path / "held", tmp_path / "done"
    held.mkdir()
    done.mkdir()
    workers = [SPAWN.Process(target=_drain, args=(queue, held, done)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    finished = [path.name.partition("@")[0] for path in done.iterdir()]
    assert sorted(finished) == [f"item-{i:02}" for i in range(40)]
    assert list(store.list("queue/")) == []


def _drain(queue, held, done):
    while queue.pending():
        lease = queue.lease(owner_name(), 60)
        if lease is None:
            continue
        mine = held / lease.item.key
        mine.touch(exist_ok=False)  # FileExistsError when another worker holds the item too
        first = lease.item.attempts == 0
        if not first:
            (done / f"{lease.item.key}@{os.getpid()}").touch(exist_ok=False)
        mine.unlink()
        if first:
            queue.fail(lease, "the first attempt always fails", max_attempts=3)
        else:
            queue.ack(lease)


def test_many_takers_of_one_broken_lease(store, host):
    queue = Queue(store, "q", **host.clocks)
    with ThreadPoolExecutor(8) as threads:
        for i in range(20):
            queue.enqueue(f"item-{i}", {})
            assert queue.lease("dead", 60)
            takers = [Queue(store, "q", **host.clocks) for _ in range(8)]
            assert not any(taker.lease("w", 1000) for taker in takers)
            host.time.pass_by(60)
            leases = list(threads.map(lambda taker: taker.lease("w", 1000), takers))
            winners = [lease for lease in leases if lease]
            assert len(winners) == 1
            queue.ack(winners[0])
