"""Small farms in a bucket whose wire fails at one call in ten: nothing is lost, and nothing half visible."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import botocore.endpoint
import pytest
import rgw
from sound_adapters import BASE, adapter_spec, put_adapter
from stores import fresh
from wire import ANSWER_LOST, BUSY, CARRIED, CUT, LOST, Wire, wire_to

from farm import patient, s3_client
from farm.artifacts import MANIFEST, find, verify
from farm.patient import PatientStore
from farm.queue import LeaseLostError, Queue
from farm.registry import Registry
from farm.s3 import S3Store
from farm.threads import in_threads

pytestmark = pytest.mark.server

FAULTS = (LOST, ANSWER_LOST, BUSY, CUT)
SHARE = 0.1
SEEDS = 8
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


@pytest.fixture(scope="module")
def bucket(request: pytest.FixtureRequest) -> str:
    """Of Ceph's gateway where it is installed; the other server does not settle races."""
    return str(request.getfixturevalue("rgw_bucket" if not rgw.missing() else "moto_bucket"))


@pytest.fixture(scope="module")
def wire(bucket: str) -> Iterator[Wire]:
    endpoint = S3Store.parse(bucket).endpoint_url
    assert endpoint is not None
    with wire_to(endpoint) as wire:
        yield wire


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(botocore.endpoint, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(s3_client, "FIRST_WAIT_SECONDS", 0.0005)
    monkeypatch.setattr(patient, "FIRST_WAIT_SECONDS", 0.0005)
    monkeypatch.setattr(patient, "LONGEST_WAIT_SECONDS", 0.002)


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


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_farm_over_a_wire_that_fails(bucket: str, wire: Wire, seed: int) -> None:
    calm = fresh(bucket)
    stormy = PatientStore(replace(calm, endpoint_url=wire.endpoint), 60)
    queue = Queue(stormy, "adapters")
    weather = wire.fates = Weather(seed)
    for concept in CONCEPTS:
        queue.enqueue(f"{concept}-0", {"concept": concept})
    found = while_read(calm, lambda: [*in_threads(lambda n: drive(stormy, f"driver-{n}"), range(DRIVERS))])
    assert weather.faults > 10
    assert found == [] and half_visible(calm) == []
    entries = Registry(calm).list()
    assert {name: (entry.version, len(entry.history)) for name, entry in entries.items()} == dict.fromkeys(
        CONCEPTS, (1, 0)
    )
    assert all(find(calm, adapter_spec(concept, "first").path) for concept in CONCEPTS) and find(calm, BASE.path)
    assert not [
        *calm.list("queue/adapters/pending/"),
        *calm.list("queue/adapters/leases/"),
        *calm.list("queue/adapters/failed/"),
    ]


@pytest.mark.parametrize("seed", range(SEEDS))
def test_publishers_that_race_over_a_wire_that_fails(bucket: str, wire: Wire, seed: int) -> None:
    """Each publishes three adapters of one concept in turn: every publication is one version, and none is lost."""
    if rgw.missing():
        pytest.skip("the server in Python does not settle races")
    calm = fresh(bucket)
    stormy = PatientStore(replace(calm, endpoint_url=wire.endpoint), 60)
    names = [[f"{racer}-{number}" for number in range(3)] for racer in range(4)]
    told = {name: put_adapter(calm, "sepia", name) for mine in names for name in mine}
    weather = wire.fates = Weather(seed)
    found = while_read(
        calm,
        lambda: [*in_threads(lambda mine: [Registry(stormy).publish("sepia", **told[name]) for name in mine], names)],
    )
    assert weather.faults > 5 and found == []
    record = Registry(calm).record("sepia")
    assert record is not None
    releases = record.releases
    assert [release.version for release in releases] == [*range(1, len(told) + 1)]
    assert sorted(release.digest for release in releases) == sorted(made["digest"] for made in told.values())
    for mine in names:  # in the order in which their publisher made them
        places = [[release.digest for release in releases].index(told[name]["digest"]) for name in mine]
        assert places == sorted(places)
