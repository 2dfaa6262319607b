import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from clocks import Host, Time
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from farm.errors import IntegrityError
from farm.queue import LeaseLostError, Queue
from farm.store import LocalStore, NotFoundError


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "store")


@pytest.fixture
def host():
    return Host()


@pytest.fixture
def time(host):
    return host.time


@pytest.fixture
def queue(store, host):
    return Queue(store, "adapt", **host.clocks)


def keys(items):
    return [item.key for item in items]


def test_an_item_goes_through_the_queue(queue, store, time):
    assert queue.enqueue("ink", {"concept": "ink", "rank": 4})
    assert list(store.list("queue/")) == ["queue/adapt/pending/ink.json"]
    lease = queue.lease("worker-1", 60)
    assert lease.item == queue.pending()[0]
    assert (lease.item.payload, lease.item.attempts) == ({"concept": "ink", "rank": 4}, 0)
    assert lease.item.enqueued_at == time.seconds
    assert (lease.hold.owner, lease.hold.expires_at) == ("worker-1", time.seconds + 60)
    assert queue.leased() == [lease]
    assert queue.lease("worker-2", 60) is None
    queue.ack(lease)
    assert queue.pending() == queue.leased() == queue.failed() == list(store.list("queue/")) == []


def test_order_is_priority_then_age_then_key(queue, time):
    for key, priority in [("b", 0), ("a", 0), ("late", 0), ("urgent", 5), ("whenever", -1)]:
        time.pass_by(key == "late")
        queue.enqueue(key, {}, priority)
    order = ["urgent", "a", "b", "late", "whenever"]
    assert keys(queue.pending()) == order
    assert [queue.lease("w", 60).item.key for _ in order] == order


def test_enqueue_is_idempotent(queue):
    assert queue.enqueue("ink", {"rank": 4})
    assert not queue.enqueue("ink", {"rank": 8})
    lease = queue.lease("w", 60)
    assert not queue.enqueue("ink", {"rank": 8})
    queue.ack(lease)
    assert queue.enqueue("ink", {"rank": 8})


def test_two_queues_of_a_store_are_apart(store):
    one, other = Queue(store, "adapt"), Queue(store, "edit")
    one.enqueue("ink", {})
    assert other.lease("w", 60) is None
    assert other.enqueue("ink", {})


def test_failures_are_counted_up_to_the_dead_letter(queue):
    queue.enqueue("ink", {})
    for attempt in (1, 2):
        assert not queue.fail(queue.lease("w", 60), f"diverged {attempt}", max_attempts=3)
        assert [(item.attempts, item.error) for item in queue.pending()] == [(attempt, f"diverged {attempt}")]
    assert queue.fail(queue.lease("w", 60), "diverged 3", max_attempts=3)
    assert queue.pending() == []
    assert queue.lease("w", 60) is None
    assert not queue.enqueue("ink", {}), "a failed item waits for retry"
    assert [(item.key, item.attempts, item.error) for item in queue.failed()] == [("ink", 3, "diverged 3")]
    queue.retry("ink")
    assert queue.failed() == []
    assert queue.lease("w", 60).item.attempts == 0


def test_release_counts_no_attempt(queue):
    queue.enqueue("ink", {})
    queue.release(queue.lease("w", 60))
    assert queue.lease("w", 60).item.attempts == 0


def test_an_expired_lease_is_taken_over_and_its_holder_told(queue, time):
    queue.enqueue("ink", {})
    lost = queue.lease("w", 60)
    time.pass_by(59)
    assert queue.lease("w", 60) is None
    time.pass_by(1)
    assert queue.leased() == []
    taken = queue.lease("w", 60)
    assert taken.item.key == "ink"
    for call in (queue.renew, queue.ack, queue.release, lambda lease: queue.fail(lease, "late", 1)):
        with pytest.raises(LeaseLostError, match="ink"):
            call(lost)
    assert (keys(queue.pending()), queue.failed(), queue.leased()) == (["ink"], [], [taken])
    queue.ack(taken)
    with pytest.raises(LeaseLostError, match="ink"):
        queue.ack(lost)


def test_a_renewed_lease_holds(queue, time):
    queue.enqueue("ink", {})
    lease = queue.lease("w", 60)
    for _ in range(5):
        time.pass_by(50)
        queue.renew(lease)
        assert queue.lease("other", 60) is None
    assert queue.leased()[0].hold.expires_at == time.seconds + 60
    time.pass_by(100)
    queue.renew(lease)  # expired, but nobody came
    assert queue.lease("other", 60) is None
    queue.ack(lease)


def test_drop_forgets_an_item_in_any_state(queue, store):
    for key in ("waiting", "held", "broken"):
        queue.enqueue(key, {}, priority={"broken": 2, "held": 1}.get(key, 0))
    queue.fail(queue.lease("w", 60), "no", max_attempts=1)
    held = queue.lease("w", 60)
    for key in ("waiting", "held", "broken", "never-there"):
        queue.drop(key)
    assert list(store.list()) == []
    with pytest.raises(LeaseLostError, match="held"):
        queue.ack(held)


def test_retry_wants_a_failed_item(queue):
    queue.enqueue("ink", {})
    with pytest.raises(NotFoundError):
        queue.retry("ink")


def test_a_damaged_item_is_one_sentence(queue, store):
    store.put("queue/adapt/pending/ink.json", b'{"key": "ink"}')
    with pytest.raises(IntegrityError, match=r"queue/adapt/pending/ink\.json is damaged \(payload"):
        queue.lease("w", 60)


class QueueAgainstModel(RuleBasedStateMachine):
    """The queue does what a list of items with plain fields would do, on two hosts whose clocks are hours apart."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.time = Time()
        self.hosts = [Host(self.time, ahead=-5 * 3600, booted=999_000), Host(self.time, ahead=7 * 3600)]
        self.queues = [Queue(LocalStore(self.folder), "q", **host.clocks) for host in self.hosts]
        self.model = {}  # key -> dict of fields
        self.leases = []
        self.versions = 0  # of all leases' objects
        self.seen = [{}, {}]  # by queue: key -> the lease's version there last, and when it was first there

    def teardown(self):
        shutil.rmtree(self.folder)

    any_queue = st.integers(0, 1)
    key = st.sampled_from("abcd")

    def written(self, q, key):
        """The queue has taken or renewed the lease of the key."""
        self.versions += 1
        self.model[key].update(version=self.versions, until=self.hosts[q].now() + 50)
        self.seen[q][key] = (self.versions, self.time.seconds)

    def watched(self, q, key):
        """For how long the queue knows the lease of the key as it is, having looked at it now."""
        version = self.model[key]["version"]
        if self.seen[q].get(key, (None, 0))[0] != version:
            self.seen[q][key] = (version, self.time.seconds)
        return self.time.seconds - self.seen[q][key][1]

    @rule(q=any_queue, key=key, priority=st.integers(0, 2))
    def enqueue(self, q, key, priority):
        assert self.queues[q].enqueue(key, {}, priority) == (key not in self.model)
        fields = {
            "priority": priority,
            "since": self.hosts[q].now(),
            "attempts": 0,
            "failed": False,
            "held": None,
        }
        self.model.setdefault(key, fields)

    @rule(seconds=st.sampled_from([1, 30, 100]))
    def wait(self, seconds):
        self.time.pass_by(seconds)

    @rule(q=any_queue, hours=st.sampled_from([-9, 9]))
    def set_the_wall_clock(self, q, hours):
        self.hosts[q].ahead += hours * 3600

    @rule(q=any_queue)
    def lease(self, q):
        free = [
            (-fields["priority"], fields["since"], key)
            for key, fields in self.model.items()
            if not fields["failed"] and (fields["held"] is None or self.watched(q, key) >= 50)
        ]
        lease = self.queues[q].lease("w", 50)
        assert (lease and lease.item.key) == (min(free)[2] if free else None)
        if lease:
            fields = self.model[lease.item.key]
            assert lease.item.attempts == fields["attempts"]
            fields.update(held=lease.hold.token)
            self.written(q, lease.item.key)
            self.leases.append(lease)

    @precondition(lambda self: self.leases)
    @rule(q=any_queue, data=st.data(), how=st.sampled_from(["renew", "ack", "fail", "release"]))
    def settle(self, q, data, how):
        lease = data.draw(st.sampled_from(self.leases))
        key, queue = lease.item.key, self.queues[q]
        call = {"fail": lambda lease: queue.fail(lease, "no", 2)}.get(how) or getattr(queue, how)
        fields = self.model.get(key)
        if fields is None or fields["held"] != lease.hold.token:
            with pytest.raises(LeaseLostError):
                call(lease)
            if fields and fields["held"]:
                self.watched(q, key)  # it has seen who holds it now
            return
        call(lease)
        if how == "renew":
            self.written(q, key)
        elif how == "ack":
            del self.model[key]
        else:
            fields["attempts"] += how == "fail"
            fields.update(held=None, failed=fields["attempts"] == 2)

    @rule(q=any_queue, key=key)
    def drop(self, q, key):
        self.queues[q].drop(key)
        self.model.pop(key, None)

    @rule(q=any_queue, key=key)
    def retry(self, q, key):
        if key in self.model and self.model[key]["failed"]:
            self.queues[q].retry(key)
            self.model[key].update(failed=False, attempts=0)
        else:
            with pytest.raises(NotFoundError):
                self.queues[q].retry(key)

    @invariant()
    def the_lists_agree(self):
        onlooker = Queue(LocalStore(self.folder), "q", **self.hosts[0].clocks)
        assert set(keys(onlooker.pending())) == {key for key in self.model if not self.model[key]["failed"]}
        assert set(keys(onlooker.failed())) == {key for key in self.model if self.model[key]["failed"]}
        held = {f["held"] for f in self.model.values() if f["held"] and f["until"] > self.hosts[0].now()}
        assert {lease.hold.token for lease in onlooker.leased()} == held


TestQueueAgainstModel = QueueAgainstModel.TestCase
TestQueueAgainstModel.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


def test_a_worker_takes_only_what_it_can_work_on(queue):
    queue.enqueue("first", {}, priority=9)
    queue.enqueue("second", {})
    assert queue.lease("worker", 60, among={"second"}).item.key == "second"
    assert queue.lease("worker", 60, among={"second"}) is None
    assert queue.lease("worker", 60).item.key == "first"


class CountingStore:
    """Counts the calls of a store, but not those that it makes of itself."""

    def __init__(self, store):
        self.store = store
        self.calls = Counter()

    def __getattr__(self, name):
        self.calls[name] += 1
        return getattr(self.store, name)


@pytest.mark.parametrize("drivers", [1, 3])
def test_leasing_everything_takes_a_few_store_calls_an_item(tmp_path, host, drivers):
    """By several drivers in turn; those who find an item taken look at its lease once."""
    items = 260
    filler = Queue(LocalStore(tmp_path), "q", **host.clocks)
    for number in range(items):
        filler.enqueue(f"item-{number:03}", {}, priority=number % 7)
    order = keys(filler.pending())
    store = CountingStore(LocalStore(tmp_path))
    queues = [Queue(store, "q", **host.clocks, remember=60) for _ in range(drivers)]
    leased = [queues[number % drivers].lease(f"driver-{number % drivers}", 300).item.key for number in range(items)]
    assert all(queue.lease("late", 300) is None for queue in queues)
    assert leased == order
    calls = store.calls
    assert calls["put_if_absent"] == items and calls["list"] == items + drivers
    # Each item is read once by every driver to find its place, once under its lease; each lease once by the others.
    assert calls["get"] + calls["get_with_etag"] <= items * (1 + drivers + drivers - 1)
    assert calls.total() <= items * (3 + 2 * drivers)


def test_what_is_remembered_is_looked_at_again_in_time(store, host, time):
    driver, other = Queue(store, "q", **host.clocks, remember=60), Queue(store, "q", **host.clocks)
    for key in ("a", "b", "c"):
        other.enqueue(key, {})
    driver.release(driver.lease("w", 300))
    other.drop("c")
    other.enqueue("c", {"new": True}, priority=9)
    other.enqueue("d", {}, priority=5)
    assert driver.lease("w", 300).item.key == "d", "what is new is seen at once"
    time.pass_by(60)
    lease = driver.lease("w", 300)
    assert (lease.item.key, lease.item.payload) == ("c", {"new": True})


def test_an_item_is_read_under_its_lease_whatever_is_remembered(store, host):
    driver, other = Queue(store, "q", **host.clocks, remember=60), Queue(store, "q", **host.clocks)
    other.enqueue("ink", {})
    driver.release(driver.lease("w", 300))
    other.fail(other.lease("v", 300), "no luck", max_attempts=3)
    lease = driver.lease("w", 300)
    assert (lease.item.attempts, lease.item.error) == (1, "no luck")


def test_a_remembered_lease_that_was_renewed_is_not_taken(store, host, time):
    driver, other = Queue(store, "q", **host.clocks, remember=1000), Queue(store, "q", **host.clocks)
    other.enqueue("ink", {})
    lease = other.lease("v", 300)
    assert driver.lease("w", 300) is None
    time.pass_by(200)
    other.renew(lease)
    time.pass_by(200)
    assert driver.lease("w", 300) is None
    other.release(lease)
    assert driver.lease("w", 300) is not None


@pytest.mark.parametrize("ahead", [-5 * 3600, 5 * 3600])
def test_drivers_whose_clocks_are_hours_apart(tmp_path, time, ahead):
    """One waits while the other renews for an hour, at one read of each lease a minute, and takes over when it dies."""
    store = CountingStore(LocalStore(tmp_path))
    one = Queue(LocalStore(tmp_path), "q", **Host(time).clocks)
    other = Queue(store, "q", **Host(time, ahead=ahead, booted=999_999).clocks, remember=60)
    for key in "abcd":
        one.enqueue(key, {})
    leases = [one.lease("one", 300) for _ in "abcd"]
    for second in range(3600):
        if second % 100 == 0:
            for lease in leases:
                one.renew(lease)
        assert other.lease("other", 300) is None
        time.pass_by(1)
    assert store.calls["get_with_etag"] <= 60 * len(leases)
    silent_since = time.seconds
    while (lease := other.lease("other", 300)) is None:
        time.pass_by(1)
    assert 200 <= time.seconds - silent_since <= 300 + 60
    assert [lease.item.key] + [other.lease("other", 300).item.key for _ in "bcd"] == list("abcd")


def test_a_paused_queue_gives_nothing_out(queue, store):
    queue.enqueue("ink", {})
    queue.enqueue("oil", {})
    running = queue.lease("w", 60)
    assert queue.pause() and not Queue(store, "adapt").pause()
    assert queue.paused() and not Queue(store, "edit").paused()
    assert queue.lease("w", 60) is None
    queue.renew(running)
    queue.ack(running)
    assert queue.waiting() == {"oil"} and queue.enqueue("tar", {})
    assert queue.resume() and not queue.resume()
    assert queue.lease("w", 60).item.key == "oil"


def test_withdraw_takes_only_what_nobody_works_on(queue, store, time):
    for key in ("held", "failed", "waits"):
        queue.enqueue(key, {})
    queue.fail(queue.lease("w", 60), "no", max_attempts=1)
    held = queue.lease("w", 60)
    assert [queue.withdraw(key, "me") for key in ("failed", held.item.key, "waits")] == [True, False, True]
    assert queue.leased() == [held]
    time.pass_by(60)
    assert queue.withdraw(held.item.key, "me")
    assert list(store.list()) == []
    with pytest.raises(LeaseLostError):
        queue.renew(held)
