"""Turns between real processes."""

import logging
import multiprocessing
import os
import signal
import threading
import time
from contextlib import contextmanager

import pytest

from farm.artifacts import dump
from farm.leases import Hold, Leases, owner_name
from farm.store import LocalStore, StoreUnreachableError
from farm.turn import turn

SPAWN = multiprocessing.get_context("spawn")
LONG = 3600.0


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "store")


@pytest.fixture
def leases(store):
    return Leases(store, "queue/turns/")


def nobody(owner):
    raise AssertionError(f"{owner} has the turn")


@contextmanager
def process(target, *arguments):
    """A process and our end of a pipe to it."""
    ours, theirs = SPAWN.Pipe()
    worker = SPAWN.Process(target=target, args=(*arguments, theirs))
    worker.start()
    theirs.close()
    try:
        yield worker, ours
    finally:
        worker.kill()
        worker.join()
        worker.close()
        ours.close()


def _hold(store, connection):
    with turn(store, "base", seconds=LONG, on_wait=nobody):
        connection.send(owner_name())
        connection.recv()
    connection.send("given back")


def _wait(store, connection):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background inherits that it is ignored
    try:
        with turn(store, "base", seconds=LONG, on_wait=connection.send):
            connection.send("my turn")
    except KeyboardInterrupt:
        connection.send("interrupted")


def test_a_turn_is_given_back_however_it_ends(store, leases):
    with turn(store, "base", seconds=LONG, on_wait=nobody):
        assert leases.watch("base").owner == owner_name()
        with turn(store, "ranks", seconds=LONG, on_wait=nobody):
            assert list(store.list("queue/")) == ["queue/turns/base.json", "queue/turns/ranks.json"]
    assert not list(store.list("queue/"))
    for end in (ValueError, KeyboardInterrupt):
        with pytest.raises(end), turn(store, "base", seconds=LONG, on_wait=nobody):
            raise end
        assert not list(store.list("queue/"))


def test_the_second_waits_for_the_end_of_the_first(store):
    with process(_hold, store) as (_, first):
        owner = first.recv()
        with process(_wait, store) as (_, second):
            assert second.recv() == owner, "it is told who has the turn"
            assert not second.poll(2), "and waits"
            first.send("end")
            assert first.recv() == "given back"
            assert second.recv() == "my turn"


def test_the_second_goes_on_at_once_when_the_first_is_killed(store):
    with process(_hold, store) as (worker, first):
        owner = first.recv()
        with process(_wait, store) as (_, second):
            assert second.recv() == owner
            os.kill(worker.pid, signal.SIGKILL)
            assert second.recv() == "my turn", "an hour before the lease would end"


def test_the_wait_can_be_interrupted(store):
    with process(_hold, store) as (_, first):
        owner = first.recv()
        with process(_wait, store) as (worker, second):
            assert second.recv() == owner
            os.kill(worker.pid, signal.SIGINT)
            assert second.recv() == "interrupted"


def test_another_hosts_turn_is_waited_for_until_it_was_silent_for_its_seconds(store, leases):
    leases.take("base", "elsewhere/1:1:1", 2)
    told, started = [], time.monotonic()
    with turn(store, "base", seconds=LONG, on_wait=told.append):
        assert time.monotonic() - started >= 2
        assert leases.watch("base").owner == owner_name()
    assert told == ["elsewhere/1:1:1"], "once, however long"


def _count(store, folder, connection):
    for _ in range(3):
        with turn(store, "base", seconds=LONG, on_wait=lambda owner: None):
            mine = folder / "mine"
            mine.touch(exist_ok=False)  # FileExistsError when another has the turn too
            time.sleep(0.05)
            mine.unlink()
    connection.send("done")


def test_one_process_at_a_time(store, tmp_path):
    with process(_count, store, tmp_path) as (_, one), process(_count, store, tmp_path) as (_, other):
        assert (one.recv(), other.recv()) == ("done", "done")


def held(store, renewals=0):
    """The hold of the turn once it has been renewed so often."""
    deadline = time.monotonic() + 60
    while True:
        hold = Hold.model_validate_json(store.get("queue/turns/base.json"))
        if hold.renewals >= renewals:
            return hold
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_turn_is_renewed_while_it_lasts(store):
    with turn(store, "base", seconds=0.3, on_wait=nobody):
        assert held(store, renewals=3).token == held(store).token


class AwayStore(LocalStore):
    """Answers no swap for the first few times."""

    away = 0

    def replace_if_match(self, key, data, etag):
        if type(self).away:
            type(self).away -= 1
            raise StoreUnreachableError(self.url)
        return super().replace_if_match(key, data, etag)


def test_a_renewal_that_fails_is_told_and_tried_again(tmp_path, monkeypatch, caplog):
    store = AwayStore(tmp_path / "store")
    monkeypatch.setattr(AwayStore, "away", 2)
    with turn(store, "base", seconds=3, on_wait=nobody):
        held(store, renewals=1)
    assert not list(store.list("queue/"))
    assert [record.message for record in caplog.records] == [
        f"the turn base could not be renewed, trying again: the store {store.url} does not answer"
    ] * 2


def test_a_turn_that_cannot_be_given_back_is_told(tmp_path, monkeypatch, caplog):
    with turn(AwayStore(tmp_path / "store"), "base", seconds=LONG, on_wait=nobody):
        monkeypatch.setattr(AwayStore, "away", 1)
    (record,) = caplog.records
    assert "base could not be given back" in record.message and record.levelno == logging.WARNING


@pytest.mark.parametrize("seconds", [0.3, LONG], ids=["seen by a renewal", "seen at the end"])
def test_a_lost_turn_is_one_warning(store, caplog, seconds):
    with turn(store, "base", seconds=seconds, on_wait=nobody):
        other = Hold(owner="elsewhere/1:1:1", token="theirs", seconds=LONG, expires_at=0)
        store.put("queue/turns/base.json", dump(other))
        for thread in threading.enumerate():
            if thread.name == "turn base" and seconds < LONG:
                thread.join()
    (record,) = caplog.records
    assert record.message == (
        "this run goes on without the turn base, which may do work twice: "
        f"elsewhere/1:1:1 has taken queue/turns/base.json from {owner_name()}"
    )
    assert held(store) == other, "which keeps it"
