import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from farm.artifacts import IntegrityError
from farm.queue import LeaseLostError, Queue
from farm.store import LocalStore, NotFoundError


class Clock:
    def __init__(self):
        self.time = 1_000_000.0

    def __call__(self):
        return self.time


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "store")


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def queue(store, clock):
    return Queue(store, "adapt", now=clock)


def keys(items):
    return [item.key for item in items]


def test_an_item_goes_through_the_queue(queue, store, clock):
    assert queue.enqueue("ink", {"concept": "ink", "rank": 4})
    assert list(store.list("queue/")) == ["queue/adapt/pending/ink.json"]
    lease = queue.lease("worker-1", 60)
    assert lease.item == queue.pending()[0]
    assert (lease.item.payload, lease.item.attempts) == ({"concept": "ink", "rank": 4}, 0)
    assert lease.item.enqueued_at == clock.time
    assert (lease.owner, lease.expires_at) == ("worker-1", clock.time + 60)
    assert queue.leased() == [lease]
    assert queue.lease("worker-2", 60) is None
    queue.ack(lease)
    assert queue.pending() == queue.leased() == queue.failed() == list(store.list("queue/")) == []


def test_order_is_priority_then_age_then_key(queue, clock):
    for key, priority in [("b", 0), ("a", 0), ("late", 0), ("urgent", 5), ("whenever", -1)]:
        clock.time += key == "late"
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


def test_an_expired_lease_is_taken_over_and_its_holder_told(queue, clock):
    queue.enqueue("ink", {})
    lost = queue.lease("w", 60)
    clock.time += 59
    assert queue.lease("w", 60) is None
    clock.time += 1
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


def test_a_renewed_lease_holds(queue, clock):
    queue.enqueue("ink", {})
    lease = queue.lease("w", 60)
    for _ in range(5):
        clock.time += 50
        queue.renew(lease)
        assert queue.lease("other", 60) is None
    assert queue.leased()[0].expires_at == clock.time + 60
    clock.time += 100
    queue.renew(lease)  # expired, but nobody came
    assert queue.lease("other", 60) is None
    queue.ack(lease)


def test_drop_forgets_an_item_in_any_state(queue, store):
    for key in ("waiting", "held", "broken"):
        queue.enqueue(key, {}, priority={"broken": 2, "held": 1}.get(key, 0))
    queue.fail(queue.lease("w", 60), "no", max_attempts=1)
    held = queue.lease("w", 60)
    for key in ("waiting", "held", "broken", "never there"):
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
    """The queue does what a list of items with plain fields would do."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.clock = Clock()
        self.queues = [Queue(LocalStore(self.folder), "q", now=self.clock) for _ in range(2)]
        self.model = {}  # key -> dict of fields
        self.leases = []

    def teardown(self):
        shutil.rmtree(self.folder)

    any_queue = st.integers(0, 1)
    key = st.sampled_from("abcd")

    @rule(q=any_queue, key=key, priority=st.integers(0, 2))
    def enqueue(self, q, key, priority):
        assert self.queues[q].enqueue(key, {}, priority) == (key not in self.model)
        fields = {
            "priority": priority,
            "since": self.clock.time,
            "attempts": 0,
            "failed": False,
            "held": None,
        }
        self.model.setdefault(key, fields | {"until": 0.0})

    @rule(seconds=st.sampled_from([1, 30, 100]))
    def wait(self, seconds):
        self.clock.time += seconds

    @rule(q=any_queue)
    def lease(self, q):
        free = [
            (-fields["priority"], fields["since"], key)
            for key, fields in self.model.items()
            if not fields["failed"] and (fields["held"] is None or fields["until"] <= self.clock.time)
        ]
        lease = self.queues[q].lease("w", 50)
        assert (lease and lease.item.key) == (min(free)[2] if free else None)
        if lease:
            fields = self.model[lease.item.key]
            assert lease.item.attempts == fields["attempts"]
            fields.update(held=lease.token, until=self.clock.time + 50)
            self.leases.append(lease)

    @precondition(lambda self: self.leases)
    @rule(q=any_queue, data=st.data(), how=st.sampled_from(["renew", "ack", "fail", "release"]))
    def settle(self, q, data, how):
        lease = data.draw(st.sampled_from(self.leases))
        key, queue = lease.item.key, self.queues[q]
        call = {"fail": lambda lease: queue.fail(lease, "no", 2)}.get(how) or getattr(queue, how)
        fields = self.model.get(key)
        if fields is None or fields["held"] != lease.token:
            with pytest.raises(LeaseLostError):
                call(lease)
            return
        call(lease)
        if how == "renew":
            fields["until"] = self.clock.time + 50
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
        queue = self.queues[0]
        assert set(keys(queue.pending())) == {key for key in self.model if not self.model[key]["failed"]}
        assert set(keys(queue.failed())) == {key for key in self.model if self.model[key]["failed"]}
        held = {f["held"] for f in self.model.values() if f["held"] and f["until"] > self.clock.time}
        assert {lease.token for lease in queue.leased()} == held


TestQueueAgainstModel = QueueAgainstModel.TestCase
TestQueueAgainstModel.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


def test_a_worker_takes_only_what_it_can_work_on(queue):
    queue.enqueue("first", {}, priority=9)
    queue.enqueue("second", {})
    assert queue.lease("worker", 60, among={"second"}).item.key == "second"
    assert queue.lease("worker", 60, among={"second"}) is None
    assert queue.lease("worker", 60).item.key == "first"


class CountingStore(LocalStore):
    """Counts the calls."""

    calls: ClassVar[Counter[str]] = Counter()

    def __getattribute__(self, name):
        if name in ("get", "get_with_etag", "exists", "put", "put_if_absent", "replace_if_match", "list", "delete"):
            self.calls[name] += 1
        return super().__getattribute__(name)


@pytest.mark.parametrize("drivers", [1, 3])
def test_leasing_everything_takes_a_few_store_calls_an_item(tmp_path, clock, drivers):
    """By several drivers in turn; those who find an item taken look at its lease once."""
    items = 260
    filler = Queue(LocalStore(tmp_path), "q", now=clock)
    for number in range(items):
        filler.enqueue(f"item-{number:03}", {}, priority=number % 7)
    order = keys(filler.pending())
    queues = [Queue(CountingStore(tmp_path), "q", now=clock, remember=60) for _ in range(drivers)]
    CountingStore.calls.clear()
    leased = [queues[number % drivers].lease(f"driver-{number % drivers}", 300).item.key for number in range(items)]
    assert all(queue.lease("late", 300) is None for queue in queues)
    assert leased == order
    calls = CountingStore.calls
    assert calls["put_if_absent"] == items and calls["list"] == items + drivers
    # Each item is read once by every driver to find its place, once under its lease; each lease once by the others.
    assert calls["get"] <= items * (1 + drivers + drivers - 1)
    assert calls.total() <= items * (3 + 2 * drivers)


def test_what_is_remembered_is_looked_at_again_in_time(store, clock):
    driver, other = Queue(store, "q", now=clock, remember=60), Queue(store, "q", now=clock)
    for key in ("a", "b", "c"):
        other.enqueue(key, {})
    driver.release(driver.lease("w", 300))
    other.drop("c")
    other.enqueue("c", {"new": True}, priority=9)
    other.enqueue("d", {}, priority=5)
    assert driver.lease("w", 300).item.key == "d", "what is new is seen at once"
    clock.time += 60
    lease = driver.lease("w", 300)
    assert (lease.item.key, lease.item.payload) == ("c", {"new": True})


def test_an_item_is_read_under_its_lease_whatever_is_remembered(store, clock):
    driver, other = Queue(store, "q", now=clock, remember=60), Queue(store, "q", now=clock)
    other.enqueue("ink", {})
    driver.release(driver.lease("w", 300))
    other.fail(other.lease("v", 300), "no luck", max_attempts=3)
    lease = driver.lease("w", 300)
    assert (lease.item.attempts, lease.item.error) == (1, "no luck")


def test_a_remembered_lease_that_was_renewed_is_not_taken(store, clock):
    driver, other = Queue(store, "q", now=clock, remember=1000), Queue(store, "q", now=clock)
    other.enqueue("ink", {})
    lease = other.lease("v", 300)
    assert driver.lease("w", 300) is None
    clock.time += 200
    other.renew(lease)
    clock.time += 200
    assert driver.lease("w", 300) is None
    other.release(lease)
    assert driver.lease("w", 300) is not None


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


def test_withdraw_takes_only_what_nobody_works_on(queue, store, clock):
    for key in ("held", "failed", "waits"):
        queue.enqueue(key, {})
    queue.fail(queue.lease("w", 60), "no", max_attempts=1)
    held = queue.lease("w", 60)
    assert [queue.withdraw(key, "me") for key in ("failed", held.item.key, "waits")] == [True, False, True]
    assert queue.leased() == [held]
    clock.time += 60
    assert queue.withdraw(held.item.key, "me")
    assert list(store.list()) == []
    with pytest.raises(LeaseLostError):
        queue.renew(held)
