"""Requests over many concepts while somebody publishes, rolls back, unpublishes and evicts at random.

FARM_FIRE=10000 makes it as many requests, over 260 concepts (docs/serving.md); otherwise it is a smaller fire.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import threading
import time
from collections import defaultdict
from dataclasses import dataclass

import httpx
import numpy as np
from in_process import Service, encoded, pixels, service_of
from tiny_farm import TinyFarm

from e2gan.pairs import Image
from farm.registry import Entry, Release
from farm.serve.bank import Bank
from farm.serve.engines import Merging
from farm.serve.published import Published

REQUESTS = int(os.environ.get("FARM_FIRE", "200"))
CONCEPTS = 260 if REQUESTS >= 5000 else 16
CLIENTS = 5
PHOTO = np.random.default_rng(5).integers(0, 256, (16, 24, 3), dtype=np.uint8)


@dataclass(frozen=True)
class Change:
    """A release. began, ended: when it was asked for and when it was there, so that it became current in between."""

    release: Release
    began: float
    ended: float


class Publisher(threading.Thread):
    """Changes what is published, and writes down when."""

    def __init__(self, farm: TinyFarm, service: Service, changes: dict[str, list[Change]]) -> None:
        super().__init__()
        self.farm, self.service, self.changes = farm, service, changes
        self.done = threading.Event()

    def run(self) -> None:
        dice = random.Random(0)
        seeds = itertools.count(1000)
        while not self.done.wait(0.02):
            concept = dice.choice([*self.changes])
            began = time.monotonic()
            match dice.randrange(8):
                case 0:
                    entry: Entry = self.farm.registry.unpublish(concept)
                case 1 | 2:
                    entry = self.farm.publish(concept, seed=next(seeds))
                case 3 | 4 | 5:
                    dates = [c.release.version for c in self.changes[concept] if c.release.action != "unpublished"]
                    entry = self.farm.registry.rollback(concept, to=dice.choice(dates))
                case _:
                    self.service.editor.evict(concept)
                    continue
            if entry.version != self.changes[concept][-1].release.version:
                self.changes[concept].append(Change(entry, began, time.monotonic()))


class Watcher(threading.Thread):
    """Does what an editing replica's threads do every two seconds, more often, and writes down when it began to."""

    def __init__(self, service: Service) -> None:
        super().__init__()
        self.service = service
        self.done = threading.Event()
        self.looks: list[tuple[float, float]] = [(time.monotonic(), time.monotonic())]

    def run(self) -> None:
        while not self.done.wait(0.02):
            began = time.monotonic()
            self.service.editor.published.refresh()
            self.service.editor.bank.renew()
            self.looks.append((began, time.monotonic()))


@dataclass(frozen=True)
class Answer:
    concept: str
    began: float
    ended: float
    response: httpx.Response


async def ask_all(service: Service, concepts: list[str]) -> list[Answer]:
    body = encoded(PHOTO)
    waiting = iter(concepts)
    answers = []
    async with httpx.AsyncClient(transport=service.transport, base_url="http://farm") as client:

        async def keep_asking() -> None:
            for concept in waiting:
                began = time.monotonic()
                response = await client.post(f"/v1/edit/{concept}", content=body)
                answers.append(Answer(concept, began, time.monotonic(), response))

        await asyncio.gather(*(keep_asking() for _ in range(CLIENTS)))
    return answers


def test_every_answer_is_one_version_that_was_current(tmp_path, one_thread):
    farm = TinyFarm(tmp_path / "store")
    concepts = [f"concept-{number}" for number in range(CONCEPTS)]
    changes: dict[str, list[Change]] = defaultdict(list)
    for number, concept in enumerate(concepts):
        began = time.monotonic()
        changes[concept].append(Change(farm.publish(concept, seed=number), began, time.monotonic()))
    service = service_of(farm, cache_mb=3)  # less than a third of the adapters
    publisher, watcher = Publisher(farm, service, changes), Watcher(service)
    publisher.start()
    watcher.start()
    dice = np.random.default_rng(0)
    answers = asyncio.run(ask_all(service, dice.choice(concepts, REQUESTS).tolist()))
    publisher.done.set()
    publisher.join()
    watcher.done.set()
    watcher.join()
    service.close()

    expected = Expected(farm)
    statuses = defaultdict(int)
    versions = set()
    for answer in answers:
        statuses[answer.response.status_code] += 1
        # What the service knew is at least what was there when its last look before the request began.
        known = max(began for began, ended in watcher.looks if ended <= answer.began)
        current = current_between(changes[answer.concept], known, answer.ended)
        if answer.response.status_code == 404:
            assert any(change.action == "unpublished" for change in current), answer
            continue
        assert answer.response.status_code == 200, answer.response.text
        headers = answer.response.headers
        (release,) = [r for r in current if r.version == int(headers["x-adapter-version"])]
        assert release.action != "unpublished"
        assert headers["x-adapter-digest"] == release.digest
        versions.add((answer.concept, release.version))
        np.testing.assert_array_equal(pixels(answer.response), expected.of(answer.concept, release))
    assert statuses[200] > 0.7 * REQUESTS
    assert service.editor.report()["evictions"] > REQUESTS / 10
    assert len(versions) > 1.2 * CONCEPTS
    seen = {edited.tobytes() for edited in expected.edits.values()}
    assert len(seen) == len(expected.edits)  # each is recognised by what it does


def current_between(changes: list[Change], began: float, ended: float) -> list[Release]:
    """The releases that were current at some moment between."""
    nexts = [change.ended for change in changes[1:]] + [float("inf")]
    return [
        change.release for change, gone in zip(changes, nexts, strict=True) if change.began <= ended and gone >= began
    ]


class Expected:
    """What each adapter makes of the photo, by a bank that nothing disturbs."""

    def __init__(self, farm: TinyFarm) -> None:
        self._bank = Bank(Published(farm.store), Merging, byte_budget=1)
        self.edits: dict[str, Image] = {}

    def of(self, concept: str, release: Release) -> Image:
        if release.adapter not in self.edits:
            slot = self._bank._slot(concept, release, 1.0)
            self.edits[release.adapter] = slot.engine.edit([(slot.ready, PHOTO)])[0]
        return self.edits[release.adapter]
