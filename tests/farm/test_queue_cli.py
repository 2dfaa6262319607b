"""`farm queue`, and what a driver does while its queue is added to, paused and retried by hand; without Ray."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from stage_farm import CONCEPTS, plan_of, write_config
from terminal import Terminal

from farm.artifacts import commit, find
from farm.cluster import tasks
from farm.errors import UserError
from farm.events import Spent, State
from farm.plan import Plan
from farm.queue import Queue, owner_name
from farm.stop import Stop
from farm.store import LocalStore, Store


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(monkeypatch, capsys, "queue")


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def plan(store: LocalStore) -> Plan:
    return plan_of(store.root)


@pytest.fixture
def queue(store: LocalStore) -> Queue:
    return Queue(store, "adapters")


@pytest.fixture
def config(store: LocalStore, tmp_path: Path) -> Path:
    return write_config(tmp_path / "farm.yaml", store.root)


def edited(store: Store, plan: Plan, *concept_ids: str, quarantined: str | None = None) -> None:
    """As if the edits of the concepts were there."""
    for concept_id in concept_ids:
        commit(store, plan.quality(concept_id), {}, wall_seconds=0, summary={"quarantined": quarantined})


def trained(store: Store, plan: Plan, concept_id: str) -> None:
    commit(store, plan.adapter(concept_id), {}, wall_seconds=0, summary={})


def waiting(queue: Queue) -> list[str]:
    return [item.payload["concept"] for item in queue.pending()]


def test_add(terminal: Terminal, config: Path, store: LocalStore, plan: Plan, queue: Queue) -> None:
    edited(store, plan, "night", "charcoal")
    edited(store, plan, "cyanotype", quarantined="the edits are noise")
    assert terminal.good("add", "-c", config, "night", "sepia", "night", "--priority", "3").splitlines() == [
        "night: queued, priority 3; `farm run` has to make the base and the rank search first",
        "sepia: queued, priority 3; `farm run` has to make its edits and the base and the rank search first",
    ]
    assert [(item.key, item.priority) for item in queue.pending()] == [
        (plan.adapter_key(concept), 3) for concept in ("night", "sepia")
    ]
    for spec in (plan.base, plan.ranks):
        commit(store, spec, {}, wall_seconds=0)
    lease = queue.lease("w", 60)
    assert lease is not None and queue.fail(lease, "no", 1)
    assert terminal.good("add", "-c", config, "--all").splitlines() == [
        "charcoal: queued, priority 0",
        "cyanotype: not queued, quarantined: the edits are noise",
        "night: it failed; `farm queue retry night` queues it again",
        "sepia: queued already, priority 3",
    ]
    trained(store, plan, "charcoal")
    assert terminal.good("add", "-c", config, "charcoal") == "charcoal: its adapter is there already\n"
    assert waiting(queue) == ["sepia", "charcoal"]


def test_mistakes(terminal: Terminal, config: Path) -> None:
    assert terminal.mistake("add", "-c", config, "sepya").endswith("in its queue; did you mean sepia?")
    assert terminal.mistake("drop", "-c", config, "sepya").endswith("in its queue; did you mean sepia?")
    for arguments in (["add"], ["add", "--all", "sepia"], ["retry"], ["drop"]):
        told = terminal.mistake(*arguments, "-c", config)
        assert told == "farm queue: name the concepts or say --all, one of the two."


def test_list(terminal: Terminal, config: Path, plan: Plan, queue: Queue) -> None:
    assert terminal.good("list", "-c", config) == "the queue is empty\n"
    terminal.good("add", "-c", config, "night", "sepia", "--priority", "2")
    terminal.good("add", "-c", config, "charcoal")
    failing = queue.lease("w", 60)
    assert failing is not None
    queue.fail(failing, "Traceback\n  …\nValueError: [/oops] no luck\n", 1)
    held = queue.lease("elsewhere:1:1", 60)
    assert held is not None
    queue.enqueue("old-0f3a", {"concept": "old"})
    queue.pause()
    found = terminal.document("list", "-c", config)
    assert found["paused"]
    rows = found["items"]
    assert [(row["concept"], row["state"], row["priority"], row["current"]) for row in rows] == [
        ("sepia", "leased", 2, True),
        ("charcoal", "pending", 0, True),
        ("old", "pending", 0, False),
        ("night", "failed", 2, True),
    ]
    assert rows[0]["owner"] == "elsewhere:1:1" and 50 < rows[0]["expires_in"] <= 60
    assert rows[1]["owner"] is rows[1]["expires_in"] is None
    assert (rows[3]["attempts"], rows[3]["error"]) == (1, "ValueError: [/oops] no luck")
    text = terminal.good("list", "-c", config)
    assert text.startswith("paused: ") and "elsewhere:1:1" in text and "ValueError: [/oops] no luck" in text
    assert "old-0f3a (of another configuration)" in text


def test_retry(terminal: Terminal, config: Path, queue: Queue) -> None:
    assert terminal.good("retry", "-c", config, "--all") == "nothing has failed\n"
    terminal.good("add", "-c", config, "--all")
    for _ in range(3):
        lease = queue.lease("w", 60)
        assert lease is not None and queue.fail(lease, "no", 1)
    told = terminal.good("retry", "-c", config, "night", "sepia").splitlines()
    assert told == ["night: queued again", "sepia: it has not failed"]
    assert terminal.good("retry", "-c", config, "--all").splitlines() == [
        "charcoal: queued again",
        "cyanotype: queued again",
    ]
    assert sorted(waiting(queue)) == list(CONCEPTS) and queue.failed() == []


def test_drop(terminal: Terminal, config: Path, plan: Plan, queue: Queue) -> None:
    terminal.good("add", "-c", config, "night", "sepia")
    queue.enqueue("old-0f3a", {"concept": "old"})
    lease = queue.lease(owner_name(), 60, among={plan.adapter_key("night")})
    assert lease is not None
    status, out, _ = terminal.farm("drop", "-c", config, "sepia", "night", "charcoal", "old-0f3a")
    assert status == 1
    assert out.splitlines() == [
        "sepia: dropped",
        "night: not dropped, it is being trained (`farm queue list` says by whom)",
        "charcoal: it is not in the queue",
        "old-0f3a: dropped",
    ]
    queue.release(lease)
    assert queue.lease("elsewhere:1:1", 0) is not None
    assert terminal.good("drop", "-c", config, "night") == "night: dropped\n", "its lease had expired"
    assert waiting(queue) == [] and list(queue.store.list("queue/")) == []


def test_pause_and_resume(terminal: Terminal, config: Path, queue: Queue) -> None:
    assert terminal.good("pause", "-c", config) == "paused: what runs is finished, `farm queue resume` goes on\n"
    assert queue.paused()
    assert terminal.good("pause", "-c", config) == "paused already\n"
    assert terminal.good("resume", "-c", config) == "resumed: `farm run` trains what waits\n"
    assert not queue.paused()
    assert terminal.good("resume", "-c", config) == "the queue is not paused\n"


class Here:
    """What `train_adapters` asks of Ray, in this process: a task is done when it is waited for.

    slots: how many run at once. on_task: called with a concept before its training; what it raises fails it.
    """

    def __init__(self, slots: int, on_task: Callable[[str], None]) -> None:
        self.slots = slots
        self.on_task = on_task
        self.trained: list[str] = []
        self.outcomes: dict[object, Exception | None] = {}

    def remote(self, **options: Any) -> Any:
        return lambda function: type("Remote", (), {"remote": staticmethod(lambda *arguments: arguments)})

    def wait(self, running: Sequence[Any], timeout: float, num_returns: int = 1) -> tuple[list[Any], list[Any]]:
        _, concept_id, _ = running[0]
        store, plan = self.farm
        self.outcomes[running[0]] = None
        try:
            self.on_task(concept_id)
            trained(store, plan, concept_id)
            self.trained.append(concept_id)
        except Exception as error:
            self.outcomes[running[0]] = error
        return [running[0]], list(running[1:])

    def get(self, task: Any) -> Spent:
        if error := self.outcomes[task]:
            raise error
        return Spent(1.0)

    def publish(self, concept_id: str) -> None:
        self.done.append(concept_id)

    def train(self, monkeypatch: pytest.MonkeyPatch, store: Store, plan: Plan, *ids: str) -> tuple[list[str], Any]:
        """The concepts in the order they were done, and the failures."""

        @contextmanager
        def followed(show: Any, stop: Stop) -> Iterator[Any]:
            yield str

        self.farm = store, plan
        for name in ("remote", "wait", "get"):
            monkeypatch.setattr(ray, name, getattr(self, name))
        monkeypatch.setattr(ray, "put", lambda given: "given")
        monkeypatch.setattr(tasks, "followed", followed)
        monkeypatch.setattr(tasks, "slots", lambda worker, autoscaling: self.slots)
        monkeypatch.setattr(tasks, "POLL_SECONDS", 0.01)
        self.done: list[str] = []
        self.told: list[tuple[str, str, int | None]] = []

        def tell(state: State, **facts: Any) -> None:
            self.told.append((state, facts["concept"], facts.get("attempt")))

        failures = tasks.train_adapters(store, plan, ids, None, Stop(), self.publish, tell=tell)  # type: ignore[arg-type]
        return self.done, failures


@pytest.mark.parametrize("slots", [1, 4])
def test_a_driver_takes_up_what_is_added_meanwhile(
    store: LocalStore, plan: Plan, queue: Queue, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    edited(store, plan, "night", "sepia")

    def add(concept_id: str) -> None:
        if concept_id == "night":
            queue.enqueue(plan.adapter_key("sepia"), {"concept": "sepia"})
            queue.enqueue(plan.adapter_key("charcoal"), {"concept": "charcoal"})  # which has no edits
            queue.enqueue("sepia-of-another-plan", {"concept": "sepia"}, priority=9)

    here = Here(slots, add)
    assert here.train(monkeypatch, store, plan, "night") == (["night", "sepia"], {})
    assert here.trained == ["night", "sepia"]
    assert queue.waiting() == {plan.adapter_key("charcoal"), "sepia-of-another-plan"} and queue.leased() == []


def test_a_driver_stops_at_a_pause(
    store: LocalStore, plan: Plan, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited(store, plan, *CONCEPTS)
    here = Here(2, lambda concept_id: queue.pause() and None)
    with pytest.raises(tasks.PausedError) as paused:
        here.train(monkeypatch, store, plan, *CONCEPTS)
    assert here.done == here.trained == ["charcoal", "cyanotype"], "those that ran were finished"
    assert (paused.value.failures, paused.value.left) == ({}, 2)
    assert sorted(waiting(queue)) == ["night", "sepia"] and queue.leased() == queue.failed() == []
    queue.resume()
    assert here.train(monkeypatch, store, plan, "night", "sepia") == (["night", "sepia"], {})


def test_a_failure_retried_by_hand_while_the_driver_works(
    store: LocalStore, plan: Plan, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited(store, plan, *CONCEPTS)
    asked: list[str] = []

    def fail_once(concept_id: str) -> None:
        asked.append(concept_id)
        if asked.count("night") == 1 and concept_id == "night":
            raise UserError("night: the photo is missing.")
        if concept_id == "sepia":
            queue.retry(plan.adapter_key("night"))

    here = Here(1, fail_once)
    assert here.train(monkeypatch, store, plan, "night", "sepia") == (["sepia", "night"], {})
    assert asked == ["night", "sepia", "night"]
    states = [(state, concept) for concept, state in zip(asked, ("failed", "done", "done"), strict=True)]
    assert here.told == [(state, name, 1) for last, name in states for state in ("started", last)]


def test_every_attempt_is_told(store: LocalStore, plan: Plan, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug is tried twice (adapters.max_attempts), a user's mistake once."""
    edited(store, plan, "night", "sepia")

    def fail(concept_id: str) -> None:
        raise ValueError("a bug") if concept_id == "night" else UserError("sepia: the photo is missing.")

    here = Here(1, fail)
    done, failures = here.train(monkeypatch, store, plan, "night", "sepia")
    assert done == [] and {name: failure.message for name, failure in failures.items()} == {
        "night": "ValueError: a bug",
        "sepia": "sepia: the photo is missing.",
    }
    assert [row for row in here.told if row[1] == "night"] == [
        ("started", "night", 1),
        ("retried", "night", 1),
        ("started", "night", 2),
        ("failed", "night", 2),
    ]
    assert [row for row in here.told if row[1] == "sepia"] == [("started", "sepia", 1), ("failed", "sepia", 1)]


def test_priorities_and_what_another_driver_has_done(
    store: LocalStore, plan: Plan, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited(store, plan, *CONCEPTS)
    queue.enqueue(plan.adapter_key("sepia"), {"concept": "sepia"}, priority=1)
    trained(store, plan, "cyanotype")  # committed by another driver after this one had looked
    here = Here(1, lambda concept_id: None)
    done, failures = here.train(monkeypatch, store, plan, *CONCEPTS)
    assert (done, failures) == (["sepia", "charcoal", "cyanotype", "night"], {})
    assert here.trained == ["sepia", "charcoal", "night"], "no adapter is trained twice"
    assert ("done", "cyanotype", None) in here.told and ("started", "cyanotype", 1) not in here.told
    assert all(find(store, plan.adapter(concept).path) for concept in CONCEPTS)
    assert queue.waiting() == set()


def test_no_slot_waits_for_publishing(
    store: LocalStore, plan: Plan, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited(store, plan, "night", "sepia")
    begun = threading.Event()

    class Slow(Here):
        def publish(self, concept_id: str) -> None:
            assert begun.wait(60), "the second adapter waits for the publication of the first"
            super().publish(concept_id)

    slow = Slow(1, lambda concept_id: begun.set() if concept_id == "sepia" else None)
    assert slow.train(monkeypatch, store, plan, "night", "sepia") == (["night", "sepia"], {})


def test_what_publishing_raises_ends_the_run(
    store: LocalStore, plan: Plan, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited(store, plan, "night")

    class Refused(Here):
        def publish(self, concept_id: str) -> None:
            raise UserError("registry/night.json is damaged.")

    with pytest.raises(UserError, match="is damaged"):
        Refused(1, lambda concept_id: None).train(monkeypatch, store, plan, "night")
