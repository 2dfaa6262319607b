"""The store in S3 against Ceph's gateway: the contract, races, refusals, and a server that is killed."""

import os
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import rgw
from stores import StoreContract, StoreRaces, fresh
from wire import TORN, wire_to

from farm import patient, s3_client
from farm.errors import StoreError, UserError
from farm.objects import StoreUnreachableError
from farm.patient import PatientStore
from farm.s3 import S3Store
from farm.store import open_store

pytestmark = pytest.mark.server


@pytest.fixture
def store(rgw_bucket):
    return fresh(rgw_bucket)


class TestGateway(StoreContract, StoreRaces):
    examples, rounds = 6, 25

    @pytest.fixture
    def new_store(self, rgw_bucket):
        return lambda: fresh(rgw_bucket)


@pytest.fixture
def other_keys(store, monkeypatch):
    """A call that gives this process other credentials until the test ends."""

    def change(access_key, secret_key):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", access_key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret_key)
        s3_client.forget_client(store.endpoint_url, store.region)

    yield change
    s3_client.forget_client(store.endpoint_url, store.region)


@pytest.mark.parametrize(
    ("access_key", "secret_key", "code"),
    [
        ("NOBODYSACCESSKEY0000", rgw.SECRET_KEY, "InvalidAccessKeyId"),
        (rgw.ACCESS_KEY, "another", "SignatureDoesNotMatch"),
    ],
)
def test_wrong_keys(store, other_keys, access_key, secret_key, code):
    store.put("a", b"")
    other_keys(access_key, secret_key)
    for call in (lambda: open_store(store.url), lambda: store.put("a", b""), lambda: store.get("a")):
        with pytest.raises(StoreError) as caught:
            call()
        assert str(caught.value) == (
            f"The store {store.url} refuses the credentials ({code}): correct AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or the profile in ~/.aws/credentials."
        )
    other_keys(rgw.ACCESS_KEY, rgw.SECRET_KEY)
    assert open_store(store.url).get("a") == b""


def test_the_keys_of_somebody_else(ceph, store, other_keys):
    keys = "SOMEBODYELSESKEY0000", "another"
    name = ["--uid", "else", "--display-name", "else", "--access-key", keys[0], "--secret", keys[1]]
    ceph.run("radosgw-admin", "user", "create", *name)
    other_keys(*keys)
    with pytest.raises(
        StoreError, match=r"may not be read with these credentials \(AccessDenied\): have that granted\.$"
    ):
        open_store(store.url)
    with pytest.raises(StoreError, match=r"may not be written with these credentials \(AccessDenied for a\)"):
        store.put("a", b"")


def test_a_missing_bucket(store):
    with pytest.raises(UserError, match="has no bucket missing: make it, or correct the address"):
        open_store(f"s3://missing?endpoint_url={store.endpoint_url}")


def test_a_full_quota(ceph, store):
    ceph.run("radosgw-admin", "quota", "set", "--uid=farm", "--quota-scope=user", "--max-size=1")
    ceph.run("radosgw-admin", "quota", "enable", "--uid=farm", "--quota-scope=user")
    try:
        with pytest.raises(StoreError, match=r"is full \(QuotaExceeded\): free space there or raise its limits"):
            store.put("a", bytes(100_000))
    finally:
        ceph.run("radosgw-admin", "quota", "disable", "--uid=farm", "--quota-scope=user")


def test_a_presigned_address_ends_in_time(store):
    store.put("a", b"abc")
    url, soon = store.presigned_url("a", 600), store.presigned_url("a", 1)
    with urllib.request.urlopen(url) as answer:
        assert answer.read() == b"abc"
    time.sleep(2.1)
    for refused in (soon, url.replace("X-Amz-Expires=600", "X-Amz-Expires=900"), url.partition("?")[0]):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(refused)
        assert caught.value.code == 403
        caught.value.close()


def test_bytes_that_change_on_the_way_to_the_server_are_not_stored(store, monkeypatch, tmp_path):
    monkeypatch.setattr(s3_client, "FIRST_WAIT_SECONDS", 0.001)
    (tmp_path / "file").write_bytes(b"abd" * 1000)
    with wire_to(store.endpoint_url) as wire:
        torn = S3Store(store.bucket, store.prefix, wire.endpoint)
        for write in (lambda: torn.put("a", b"abc" * 1000), lambda: torn.upload("a", tmp_path / "file")):
            wire.fates[:] = [TORN] * s3_client.ATTEMPTS
            with pytest.raises(StoreUnreachableError):
                write()
            assert not store.exists("a")
        wire.fates[:] = [TORN]
        assert torn.put_if_absent("a", b"abc" * 1000)
    assert store.get("a") == b"abc" * 1000


@pytest.fixture
def gateway(ceph, rgw_bucket, monkeypatch):
    """A gateway to the same bucket, to be killed."""
    monkeypatch.setattr(s3_client, "ATTEMPTS", 2)
    monkeypatch.setattr(patient, "LONGEST_WAIT_SECONDS", 0.5)
    gateway = rgw.Gateway(ceph).start()
    yield gateway
    gateway.kill()


def test_a_killed_server_is_waited_for(gateway, store):
    store = S3Store(store.bucket, store.prefix, gateway.endpoint)
    store.put("a", b"before")
    gateway.kill()
    for call in (lambda: store.get("a"), lambda: store.exists("b"), lambda: store.list(), lambda: store.put("c", b"")):
        with pytest.raises(StoreUnreachableError):
            call()
    with pytest.raises(UserError, match="does not answer"):
        open_store(store.url)
    with ThreadPoolExecutor(1) as thread:
        read = thread.submit(PatientStore(store, 120).get, "a")
        time.sleep(1)
        gateway.start()
        assert read.result() == b"before"


def test_nothing_acknowledged_is_lost_when_the_server_is_killed(gateway, store):
    """Writers go on through kills, and each claims keys that others want too."""
    claims, own, writers, keys = {}, {}, 4, 50
    patient_store = PatientStore(S3Store(store.bucket, store.prefix, gateway.endpoint), 120)

    def write(writer):
        for key in range(keys):
            data = f"{writer} {os.urandom(8).hex()}".encode()
            if patient_store.put_if_absent(f"claims/{key}", data):
                claims.setdefault(key, []).append(data)
            patient_store.put(f"own/{writer}/{key}", data * 1000)
            own[f"own/{writer}/{key}"] = data * 1000

    with ThreadPoolExecutor(writers) as threads:
        done = [threads.submit(write, writer) for writer in range(writers)]
        for seen in (keys, 2 * keys):
            while len(own) < seen and not any(writer.done() for writer in done):
                time.sleep(0.01)
            gateway.kill()
            time.sleep(0.2)
            gateway.start()
        for writer in done:
            writer.result()
    assert {key: len(winners) for key, winners in claims.items()} == dict.fromkeys(range(keys), 1)
    assert all(store.get(f"claims/{key}") == winners[0] for key, winners in claims.items())
    assert {key: store.get(key) for key in store.list("own/")} == own
