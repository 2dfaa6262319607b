"""A store that is waited for."""

import logging
import pickle
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farm import patient
from farm.config import ClusterConfig
from farm.errors import UserError
from farm.patient import PatientStore
from farm.store import LocalStore, NotFoundError, StoreUnreachableError, open_store


@pytest.fixture(autouse=True)
def _hasty(monkeypatch):
    monkeypatch.setattr(patient, "FIRST_WAIT_SECONDS", 0.0005)
    monkeypatch.setattr(patient, "LONGEST_WAIT_SECONDS", 0.002)


@pytest.fixture
def away(tmp_path):
    """A store whose folder is not where it was, and a call that brings it back."""
    store = LocalStore(tmp_path / "store")
    store.put("a", b"old")
    store.root.rename(tmp_path / "elsewhere")
    return store, lambda: (tmp_path / "elsewhere").rename(store.root)


def losing(method):
    def call(self, *args):
        fate = self.fates.pop(0) if self.fates else "answered"
        if fate == "lost":
            raise StoreUnreachableError(self.url)
        result = method(self, *args)
        if fate == "answer lost":
            raise StoreUnreachableError(self.url)
        return result

    return call


@dataclass(frozen=True)
class Flaky(LocalStore):
    """Loses calls before they reach the folder, or their answers. fates: of the calls to come."""

    fates: list[str] = field(default_factory=list, compare=False)

    get = losing(LocalStore.get)
    exists = losing(LocalStore.exists)
    put = losing(LocalStore.put)
    put_if_absent = losing(LocalStore.put_if_absent)
    replace_if_match = losing(LocalStore.replace_if_match)
    list = losing(LocalStore.list)
    marks = losing(LocalStore.marks)
    delete = losing(LocalStore.delete)
    get_range = losing(LocalStore.get_range)
    download = losing(LocalStore.download)
    upload = losing(LocalStore.upload)
    presigned_url = losing(LocalStore.presigned_url)


FATES = st.lists(st.sampled_from(["lost", "answer lost", "answered"]), max_size=5)
KEYS = st.sampled_from(["a", "b/c", "b/d"])
METHODS = st.sampled_from(
    ["put", "put_if_absent", "replace_if_match", "replace another", "delete", "get", "list", "upload", "download"]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(METHODS, KEYS, FATES), max_size=8))
def test_it_does_what_a_dict_would_whatever_is_lost(steps):
    with tempfile.TemporaryDirectory() as folder:
        flaky, file = Flaky(Path(folder) / "store"), Path(folder) / "file"
        store, model = PatientStore(flaky, 60), {}
        for number, (method, key, fates) in enumerate(steps):
            data = str(number).encode()
            etag = flaky.get_with_etag(key)[1] if key in model else "none"
            flaky.fates[:] = fates
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
            elif method == "upload":
                file.write_bytes(data)
                store.upload(key, file)
                model[key] = data
            elif method == "download" and key in model:
                store.download(key, file)
                assert file.read_bytes() == store.get_range(key, 0, 9) == model[key]
                assert store.presigned_url(key, 60).endswith(key)
            else:
                assert store.exists(key) == (key in model)
                if key in model:
                    assert store.get(key) == store.get_with_etag(key)[0] == model[key]
                else:
                    with pytest.raises(NotFoundError):
                        store.get(key)
            flaky.fates.clear()
            assert {name: flaky.get(name) for name in flaky.list()} == model


def test_an_outage_is_outlasted(away):
    store, bring_back = away
    timer = threading.Timer(0.3, bring_back)
    timer.start()
    assert PatientStore(store, 60).get("a") == b"old"
    timer.join()


def test_patience_ends_with_one_sentence(away):
    store, _ = away
    patient_store = PatientStore(store, 0.02)
    calls = [
        lambda: patient_store.get("a"),
        lambda: patient_store.put_if_absent("b", b""),
        lambda: patient_store.list("a"),
    ]
    for call in calls:
        with pytest.raises(UserError) as caught:
            call()
        told = f"The store {store.url} does not answer since 0 s: the same command goes on when it is back."
        assert str(caught.value) == told
    assert not store.root.exists()


def test_an_outage_is_told_once_and_its_end_once(away, caplog):
    store, bring_back = away
    attempts = Counter()

    class Counted(LocalStore):
        def get(self, key, at_most=None):
            attempts[threading.get_ident()] += 1
            return super().get(key, at_most)

    bring_back()
    patient_store = PatientStore(Counted(store.root), 60)
    store.root.rename(store.root.with_name("elsewhere"))
    with caplog.at_level(logging.WARNING, "farm.patient"), ThreadPoolExecutor(4) as threads:
        reads = [threads.submit(patient_store.get, "a") for _ in range(4)]
        while len(attempts) < 4 or min(attempts.values()) < 2:
            pass
        bring_back()
        assert [read.result() for read in reads] == [b"old"] * 4
        assert patient_store.exists("a")
    begun, ended = caplog.messages
    assert begun.startswith(f"the store {store.url} does not answer ([Errno 2] No such file")
    assert begun.endswith(": waiting for it for up to 60 s")
    assert ended == f"the store {store.url} answers again after 0 s"
    caplog.clear()
    store.root.rename(store.root.with_name("elsewhere"))
    with pytest.raises(UserError):
        PatientStore(store, 0.01).exists("a")
    assert len(caplog.messages) == 1, "a second outage is another one"


def test_an_error_that_is_no_outage_is_not_waited_for(tmp_path):
    store = PatientStore(LocalStore(tmp_path / "store"), 1e9)
    with pytest.raises(NotFoundError):
        store.get("a")
    with pytest.raises(ValueError, match="is not a key"):
        store.put("../a", b"")
    store.put("a", b"")
    with pytest.raises(ValueError, match="both an object and a folder"):
        store.put("a/b", b"")


def test_opened_with_patience(tmp_path):
    assert open_store(str(tmp_path), 0) == LocalStore(tmp_path)
    store = open_store(str(tmp_path), ClusterConfig().store_patience_seconds)
    assert store == PatientStore(LocalStore(tmp_path), 600) == pickle.loads(pickle.dumps(store))
    assert len({store, pickle.loads(pickle.dumps(store))}) == 1
    assert store.url == LocalStore(tmp_path).url
    assert open_store(store.url, 600) == store


def test_unpickled_on_a_bare_mount_point_it_waits(away):
    store, bring_back = away
    elsewhere = pickle.loads(pickle.dumps(PatientStore(store, 0.01)))
    with pytest.raises(UserError, match="does not answer"):
        elsewhere.put("b", b"")
    assert not store.root.exists()
    bring_back()
    elsewhere.put("b", b"")
    assert list(store.list()) == ["a", "b"]
