"""Small farms in a bucket whose wire fails at one call in ten: what is then not as it should be."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import botocore.endpoint
from sound_adapters import BASE, adapter_spec, put_adapter
from wire import ANSWER_LOST, BUSY, CARRIED, CUT, LOST, Wire

from farm import patient, s3_client
from farm.artifacts import MANIFEST, find, verify
from farm.patient import PatientStore
from farm.queue import LeaseLostError, Queue
from farm.registry import Registry
from farm.s3 import S3Store
from farm.threads import in_threads

FAULTS = (LOST, ANSWER_LOST, BUSY, CUT)
SHARE = 0.1
CONCEPTS = [f"concept-{number}" for number in range(6)]
DRIVERS = 3


class Weather(list[str]):
    """Fates without end: one in ten is a fault."""

    def __init__(self, seed: int) -> None:
        super().__init__([CARRIED])
        self.chance, self.lock, self.faults = random.Random(seed), threading.Lock(), 0

    def pop(self, _: object = None) -> str:
        with self.lock:
            if self.chance.random() >= SHARE:
                return CARRIED
            self.faults += 1
            return self.chance.choice(FAULTS)


@contextmanager
def hasty() -> Iterator[None]:
    """What waits before it tries again waits hardly at all."""
    with (
        patch.object(botocore.endpoint, "time", SimpleNamespace(sleep=lambda seconds: None)),
        patch.object(s3_client, "FIRST_WAIT_SECONDS", 0.0005),
        patch.object(patient, "FIRST_WAIT_SECONDS", 0.0005),
        patch.object(patient, "LONGEST_WAIT_SECONDS", 0.002),
    ):
        yield


def half_visible(store: S3Store) -> list[str]:
    """What a reader finds that is not whole: artifacts with a manifest, and adapters that are published."""
    manifests = [key.removesuffix(f"/{MANIFEST}") for key in store.list() if key.endswith(f"/{MANIFEST}")]
    served = [entry.adapter for entry in Registry(store).list().values()]
    return [problem for path in [*manifests, *served] for problem in verify(store, path)]


def while_read(store: S3Store, work: Callable[[], object]) -> list[str]:
    """Do the work while another reads the store again and again; what it found to be half visible."""
    found: list[str] = []
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            found.extend(half_visible(store))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        work()
    finally:
        over.set()
        reader.join()
    return found


def drive(store: PatientStore, owner: str) -> None:
    """What a driver does with a queue: commit, publish, acknowledge; until it is empty."""
    queue, registry = Queue(store, "adapters"), Registry(store)
    while queue.waiting():
        if lease := queue.lease(owner, 60):
            concept = lease.item.payload["concept"]
            registry.publish(concept, **put_adapter(store, concept, "first"))
            with suppress(LeaseLostError):
                queue.ack(lease)


def farm(calm: S3Store, wire: Wire, seed: int) -> dict[str, Any]:
    """Three drivers make six adapters: how many faults there were, and what is wrong in the end or was meanwhile.

    calm: a store, empty, on the server at the other end of the wire.
    """
    stormy = PatientStore(replace(calm, endpoint_url=wire.endpoint), 60)
    queue = Queue(stormy, "adapters")
    weather = wire.fates = Weather(seed)
    for concept in CONCEPTS:
        queue.enqueue(f"{concept}-0", {"concept": concept})
    problems = while_read(calm, lambda: [*in_threads(lambda n: drive(stormy, f"driver-{n}"), range(DRIVERS))])
    problems += half_visible(calm)
    versions = {name: (entry.version, len(entry.history)) for name, entry in Registry(calm).list().items()}
    if versions != dict.fromkeys(CONCEPTS, (1, 0)):
        problems.append(f"not every concept was published once: {versions}")
    paths = [BASE.path, *(adapter_spec(concept, "first").path for concept in CONCEPTS)]
    problems += [f"{path} is lost" for path in paths if find(calm, path) is None]
    problems += [f"{key} is left over" for key in calm.list("queue/")]
    return {"seed": seed, "faults": weather.faults, "problems": problems}


def race(calm: S3Store, wire: Wire, seed: int) -> dict[str, Any]:
    """Four publish three adapters each of one concept, in turn: every publication is one version, and none is lost."""
    stormy = PatientStore(replace(calm, endpoint_url=wire.endpoint), 60)
    names = [[f"{racer}-{number}" for number in range(3)] for racer in range(4)]
    told = {name: put_adapter(calm, "sepia", name) for mine in names for name in mine}
    weather = wire.fates = Weather(seed)
    problems = while_read(
        calm,
        lambda: [*in_threads(lambda mine: [Registry(stormy).publish("sepia", **told[name]) for name in mine], names)],
    )
    record = Registry(calm).record("sepia")
    releases = record.releases if record else []
    if (versions := [release.version for release in releases]) != [*range(1, len(told) + 1)]:
        problems.append(f"the versions are {versions}")
    digests = [release.digest for release in releases]
    if sorted(digests) != sorted(made["digest"] for made in told.values()):
        problems.append("not every adapter was published once")
    for mine in names:  # in the order in which their publisher made them
        places = [digests.index(told[name]["digest"]) for name in mine if told[name]["digest"] in digests]
        if places != sorted(places):
            problems.append(f"what {mine} published is out of order")
    return {"seed": seed, "faults": weather.faults, "problems": problems}
