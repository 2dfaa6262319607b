"""The store in S3 over a wire that loses requests and answers, cuts objects short and changes their bytes."""

from types import SimpleNamespace

import botocore.endpoint
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import fresh
from wire import ANSWER_LOST, BUSY, CARRIED, CHANGED, CUT, LOST, wire_to

from farm import patient, s3_client
from farm.objects import DamagedError, NotFoundError, StoreUnreachableError
from farm.patient import PatientStore
from farm.s3 import S3Store

pytestmark = pytest.mark.server
ATTEMPTS = s3_client.ATTEMPTS


@pytest.fixture(autouse=True)
def _hasty(monkeypatch):
    monkeypatch.setattr(botocore.endpoint, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(s3_client, "FIRST_WAIT_SECONDS", 0.0005)
    monkeypatch.setattr(patient, "FIRST_WAIT_SECONDS", 0.0005)
    monkeypatch.setattr(patient, "LONGEST_WAIT_SECONDS", 0.002)


@pytest.fixture(scope="module")
def wire(moto_bucket):
    with wire_to(S3Store.parse(moto_bucket).endpoint_url) as wire:
        yield wire


@pytest.fixture
def store(wire):
    wire.fates.clear()
    store = fresh(f"s3://farm?endpoint_url={wire.endpoint}")
    wire.carried.clear()
    return store


@pytest.mark.parametrize("fate", [LOST, BUSY, ANSWER_LOST, CUT, CHANGED])
def test_a_read_that_went_wrong_is_read_again(store, wire, tmp_path, fate):
    store.put("a", b"abc" * 1000)
    for read in (store.get, lambda key: store.get_with_etag(key)[0]):
        wire.fates[:] = [fate] * (ATTEMPTS - 1)
        assert read("a") == b"abc" * 1000
        assert not wire.fates
    wire.fates[:] = [fate] * (ATTEMPTS - 1)
    store.download("a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"abc" * 1000
    if fate != CHANGED:
        wire.fates[:] = [fate] * (ATTEMPTS - 1)
        assert store.get_range("a", 1, 100) == (b"abc" * 1000)[1:101]


@pytest.mark.parametrize(
    ("fate", "error"),
    [
        (LOST, StoreUnreachableError),
        (BUSY, StoreUnreachableError),
        (CUT, StoreUnreachableError),
        (CHANGED, DamagedError),
    ],
)
def test_a_read_that_goes_wrong_for_ever_gives_nothing(store, wire, tmp_path, fate, error):
    store.put("a", b"abc" * 1000)
    for read in (store.get, lambda key: store.download(key, tmp_path / "a")):
        wire.fates[:] = [fate] * ATTEMPTS
        with pytest.raises(error):
            read("a")
        assert not wire.fates
    assert not list(tmp_path.iterdir())


def test_a_write_whose_answer_is_lost_has_won(store, wire):
    """The client sends it again, and is refused because of itself."""
    wire.fates[:] = [ANSWER_LOST]
    assert store.put_if_absent("a", b"one")
    assert wire.carried == ["PUT", "PUT", "HEAD"]
    etag = store.get_with_etag("a")[1]
    wire.fates[:] = [ANSWER_LOST]
    assert store.replace_if_match("a", b"two", etag)
    assert store.get("a") == b"two"


def test_a_write_that_lost_has_lost_whatever_is_lost(store, wire):
    """Even when the winner wrote the very same bytes."""
    store.put_if_absent("a", b"one")
    etag = store.get_with_etag("a")[1]
    assert store.replace_if_match("a", b"two", etag)
    for fates in ([], [LOST], [ANSWER_LOST], [LOST, ANSWER_LOST, BUSY], [CARRIED, LOST]):
        wire.fates[:] = fates
        assert not store.put_if_absent("a", b"two")
        wire.fates[:] = fates
        assert not store.replace_if_match("a", b"two", etag)


FATES = st.lists(st.sampled_from([LOST, ANSWER_LOST, BUSY, CUT, CARRIED]), max_size=12)
KEYS = st.sampled_from(["a", "b/c", "b/d"])
METHODS = st.sampled_from(["put", "put_if_absent", "replace_if_match", "replace another", "delete", "get", "list"])


@settings(max_examples=15, deadline=None, suppress_health_check=[*HealthCheck])
@given(st.lists(st.tuples(METHODS, KEYS, FATES), max_size=8))
def test_waited_for_it_does_what_a_dict_would_whatever_is_lost(wire, steps):
    wire.fates.clear()
    store, model = PatientStore(fresh(f"s3://farm?endpoint_url={wire.endpoint}"), 60), {}
    for number, (method, key, fates) in enumerate(steps):
        data = str(number).encode()
        etag = store.get_with_etag(key)[1] if key in model else "none"
        wire.fates[:] = fates
        if method == "put":
            store.put(key, data)
            model[key] = data
        elif method == "put_if_absent":
            assert store.put_if_absent(key, data) == (key not in model)
            model.setdefault(key, data)
        elif method == "replace_if_match":
            assert store.replace_if_match(key, data, etag) == (key in model)
            model |= {key: data} if key in model else {}
        elif method == "replace another":
            assert not store.replace_if_match(key, data, "none")
        elif method == "delete":
            store.delete(key)
            model.pop(key, None)
        elif method == "list":
            assert list(store.list()) == sorted(model)
        else:
            assert store.exists(key) == (key in model)
            if key in model:
                assert store.get(key) == store.get_with_etag(key)[0] == store.get_range(key, 0, 9) == model[key]
            else:
                with pytest.raises(NotFoundError):
                    store.get(key)
        wire.fates.clear()
    assert {name: store.get(name) for name in store.list()} == model
