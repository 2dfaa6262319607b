"""Leases between hosts whose clocks disagree. Clocks are the tests' own; see `clocks`."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from clocks import Host, Time
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from farm.errors import IntegrityError
from farm.leases import LeaseLostError, Leases, owner_name
from farm.store import LocalStore

HOUR = 3600
SKEWS = [-5 * HOUR, 0, 5 * HOUR]


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "store")


@pytest.fixture
def holder(store, time):
    return Leases(store, "leases/", **Host(time).clocks)


@pytest.fixture(params=SKEWS, ids=lambda ahead: f"{ahead // HOUR:+} h")
def watcher(request, store, time):
    """On another host, whose clock may be hours ahead or behind."""
    return Leases(store, "leases/", **Host(time, ahead=request.param, booted=123_456).clocks)


def test_a_lease_goes_from_hand_to_hand(store, holder, watcher):
    hold = holder.take("ink", "one", 60)
    assert list(store.list()) == ["leases/ink.json"]
    assert watcher.take("ink", "two", 60) is None
    assert watcher.watch("ink") == hold and watcher.watch("oil") is None
    holder.release("ink", hold)
    assert list(store.list()) == [] and watcher.watch("ink") is None
    assert watcher.take("ink", "two", 60).owner == "two"
    with pytest.raises(LeaseLostError, match=r"two has taken leases/ink\.json from one"):
        holder.renew("ink", hold)
    watcher.drop("ink")
    with pytest.raises(LeaseLostError, match="is gone"):
        holder.release("ink", hold)


def test_a_live_lease_is_never_stolen(time, holder, watcher):
    hold = holder.take("ink", "one", HOUR)
    for _ in range(24):
        assert watcher.take("ink", "two", HOUR) is None
        time.pass_by(HOUR - 1)
        holder.renew("ink", hold)


def test_a_silent_lease_is_taken_over_after_its_seconds(time, holder, watcher):
    hold = holder.take("ink", "one", 60)
    time.pass_by(10 * HOUR)  # which nobody watched
    assert watcher.watch("ink") == hold
    time.pass_by(59)
    assert watcher.take("ink", "two", 5) is None
    time.pass_by(1)
    assert watcher.watch("ink") is None
    assert watcher.take("ink", "two", 5)
    with pytest.raises(LeaseLostError):
        holder.renew("ink", hold)


def test_a_wall_clock_that_jumps_changes_nothing(store, time, holder):
    host = Host(time)
    watcher = Leases(store, "leases/", **host.clocks)
    holder.take("ink", "one", 60)
    assert watcher.take("ink", "two", 60) is None
    for jump in (9 * HOUR, -20 * HOUR, 11 * HOUR):
        host.ahead += jump
        time.pass_by(19)
        assert watcher.take("ink", "two", 60) is None
    host.ahead = -9 * HOUR
    time.pass_by(3)
    assert watcher.take("ink", "two", 60)


def test_one_look_goes_by_the_clock(time, holder, watcher):
    hold = holder.take("ink", "one", 60)
    ahead = watcher.now() - time.seconds
    assert watcher.look("ink") == (None if ahead > 0 else hold)
    time.pass_by(60)
    assert watcher.look("ink") == (hold if ahead < 0 else None)
    assert bool(watcher.take("ink", "two", 60, by_clock=True)) == (ahead >= 0)


def test_what_is_remembered_is_not_read_again(store, time, watcher, holder):
    hold = holder.take("ink", "one", 60)
    assert watcher.watch("ink", remember=30) == hold
    holder.drop("ink")
    assert watcher.watch("ink", remember=30) == hold
    time.pass_by(30)
    assert watcher.watch("ink", remember=30) is None


def test_a_damaged_lease_is_one_sentence(store, holder):
    store.put("leases/ink.json", b"{}")
    with pytest.raises(IntegrityError, match=r"leases/ink\.json is damaged \(owner: .*\): delete it and run again"):
        holder.watch("ink")


def test_an_owner_of_this_host_is_gone_at_once(holder, watcher):
    host, pid, started = owner_name().split(":")
    holder.take("ink", f"{host}:{pid}:{int(started) - 1}", HOUR)
    holder.take("oil", owner_name(), HOUR)
    holder.take("tar", f"elsewhere/1:{pid}:{int(started) - 1}", HOUR)
    assert [bool(watcher.take(key, "two", 60)) for key in ("ink", "oil", "tar")] == [True, False, False]


class InterruptedStore(LocalStore):
    """Calls `before` and `after` around every read, and `before_swap` before every swap."""

    before: Callable[[], None] = staticmethod(lambda: None)
    after: Callable[[], None] = staticmethod(lambda: None)
    before_swap: Callable[[], None] = staticmethod(lambda: None)

    def get_with_etag(self, key, at_most=None):
        type(self).before()
        found = super().get_with_etag(key, at_most)
        type(self).after()
        return found

    def replace_if_match(self, key, data, etag):
        type(self).before_swap()
        return super().replace_if_match(key, data, etag)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_slow_answer_is_no_watching(tmp_path, time, holder, monkeypatch, when):
    """A store that takes 100 s for a read, before it looks or after, tells of one moment only."""
    watcher = Leases(InterruptedStore(tmp_path / "store"), "leases/", **Host(time).clocks)
    hold = holder.take("ink", "one", 60)

    def hang():
        time.pass_by(50)
        holder.renew("ink", hold)
        time.pass_by(50)

    def hang_again():
        time.pass_by(100)

    monkeypatch.setattr(InterruptedStore, when, staticmethod(hang))
    assert watcher.watch("ink")
    monkeypatch.setattr(InterruptedStore, when, staticmethod(hang_again))
    assert watcher.take("ink", "two", 60) is None


def test_a_renewal_between_the_last_look_and_the_swap_keeps_the_lease(tmp_path, time, holder, monkeypatch):
    watcher = Leases(InterruptedStore(tmp_path / "store"), "leases/", **Host(time).clocks)
    hold = holder.take("ink", "one", 60)
    assert watcher.watch("ink")
    time.pass_by(60)
    monkeypatch.setattr(InterruptedStore, "before_swap", staticmethod(lambda: holder.renew("ink", hold)))
    assert watcher.take("ink", "two", 60) is None
    holder.renew("ink", hold)


class LeasesOnManyHosts(RuleBasedStateMachine):
    """No interleaving takes a lease from an owner that was heard of within its seconds of true time, and whoever
    watches a silent one for so long gets it."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.time = Time()
        skews = [(0, 0), (-8 * HOUR, 999_999), (8 * HOUR, 500_000)]
        self.hosts = [Host(self.time, ahead, booted) for ahead, booted in skews]
        self.leases = [Leases(LocalStore(self.folder), "leases/", **host.clocks) for host in self.hosts]
        self.holds = [None, None, None]  # what each host believes to hold, with its seconds
        self.owner = None  # who holds the lease, and since when it has been silent
        self.silent_since = 0.0
        self.watched_since = [None, None, None]  # since when each host has known the lease as it is

    def teardown(self):
        shutil.rmtree(self.folder)

    any_host = st.integers(0, 2)

    def heard(self, owner):
        self.owner, self.silent_since = owner, self.time.seconds
        self.watched_since = [None, None, None]
        if owner is not None:
            self.watched_since[owner] = self.time.seconds

    def watched(self, number):
        if self.watched_since[number] is None:
            self.watched_since[number] = self.time.seconds
        return self.time.seconds - self.watched_since[number]

    @rule(seconds=st.sampled_from([1, 20, 40, 100]))
    def wait(self, seconds):
        self.time.pass_by(seconds)

    @rule(number=any_host, hours=st.integers(-30, 30))
    def set_the_wall_clock(self, number, hours):
        self.hosts[number].ahead += hours * HOUR

    @rule(number=any_host, seconds=st.sampled_from([30, 60]))
    def take(self, number, seconds):
        before, silent = self.owner, self.time.seconds - self.silent_since
        hold = self.leases[number].take("key", f"host-{number}", seconds)
        if before is None:
            assert hold
        else:
            lasts = self.holds[before].seconds
            assert bool(hold) == (self.watched(number) >= lasts)
            assert not hold or silent >= lasts
        if hold:
            self.holds[number] = hold
            self.heard(number)

    @rule(number=any_host)
    def watch(self, number):
        free = self.owner is None or self.watched(number) >= self.holds[self.owner].seconds
        assert (self.leases[number].watch("key") is None) == free

    @rule(number=any_host, give_back=st.booleans())
    def renew_or_release(self, number, give_back):
        hold, leases = self.holds[number], self.leases[number]
        if hold is None:
            return
        call = leases.release if give_back else leases.renew
        if self.owner == number:
            call("key", hold)
            self.heard(None if give_back else number)
            return
        with pytest.raises(LeaseLostError):
            call("key", hold)
        if self.owner is not None:
            self.watched(number)


TestLeasesOnManyHosts = LeasesOnManyHosts.TestCase
TestLeasesOnManyHosts.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
