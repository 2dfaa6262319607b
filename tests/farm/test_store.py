import errno
import os
import pickle
import shutil
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from farm.errors import UserError
from farm.store import LocalStore, NotFoundError, check_key, open_store


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "store")


def files_below(folder):
    return [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]


KEYS = st.sampled_from(["a/b", "a/bc", "a/b-c/d", "a-b/c", "b", "é/ünï", "queue/x/pending/k.json", "~/ %41"])
PREFIXES = st.sampled_from(["", "a", "a/", "a/b", "a/b-c/", "b", "é", "queue/x/", "nothing/", "b/"])
DATA = st.sampled_from([b"", b"one", b"two", bytes(range(256)) * 20])


class StoreAgainstDict(RuleBasedStateMachine):
    """The store does what a dict from keys to bytes would do."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store = LocalStore(self.folder / "s")
        self.model = {}

    def teardown(self):
        shutil.rmtree(self.folder)

    @rule(key=KEYS, data=DATA)
    def put(self, key, data):
        self.store.put(key, data)
        self.model[key] = data

    @rule(key=KEYS, data=DATA)
    def put_if_absent(self, key, data):
        assert self.store.put_if_absent(key, data) == (key not in self.model)
        self.model.setdefault(key, data)

    @rule(key=KEYS, other=KEYS, data=DATA)
    def replace_if_match(self, key, other, data):
        etag = self.store.get_with_etag(other)[1] if other in self.model else "none"
        matches = key in self.model and other in self.model and self.model[key] == self.model[other]
        assert self.store.replace_if_match(key, data, etag) == matches
        if matches:
            self.model[key] = data

    @rule(key=KEYS)
    def delete(self, key):
        self.store.delete(key)
        self.model.pop(key, None)

    @rule(key=KEYS)
    def read(self, key):
        assert self.store.exists(key) == (key in self.model)
        if key in self.model:
            assert self.store.get(key) == self.model[key] == self.store.path(key).read_bytes()
        else:
            with pytest.raises(NotFoundError):
                self.store.get(key)

    @rule()
    def reopen(self):
        self.store = pickle.loads(pickle.dumps(open_store(self.store.url)))

    @rule(prefix=PREFIXES)
    def list_below(self, prefix):
        assert list(self.store.list(prefix)) == sorted(key for key in self.model if key.startswith(prefix))

    @invariant()
    def nothing_else_in_the_folder(self):
        assert len(files_below(self.folder)) == len(self.model)


TestStoreAgainstDict = StoreAgainstDict.TestCase
TestStoreAgainstDict.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        "/etc/passwd",
        "a//b",
        "a/",
        "..",
        "a/../../b",
        "./a",
        "a/.hidden",
        ".store/tmp/x",
        "a\\b",
        "a\nb",
        "a\x00",
        "x" * 256,
        "é" * 128,
    ],
)
def test_refuses_keys(store, key):
    for call in (store.get, store.exists, store.delete, store.path, lambda key: store.put(key, b"")):
        with pytest.raises(ValueError, match="is not a key"):
            call(key)


@settings(max_examples=60, deadline=None)
@given(st.text() | st.text(alphabet="./\\a", max_size=8))
def test_no_key_leads_out_of_the_store(key):
    root = Path("/srv/store")
    try:
        check_key(key)
    except ValueError:
        return
    path = Path(os.path.normpath(root / key))
    assert path.is_relative_to(root)
    assert path.relative_to(root).as_posix() == key
    assert not path.is_relative_to(root / ".store")


@pytest.mark.parametrize("prefix", ["../", "/", "a//", ".store", ".store/"])
def test_refuses_prefixes(store, prefix):
    with pytest.raises(ValueError, match="is not a key"):
        store.list(prefix)


@pytest.mark.parametrize("write", [LocalStore.put, LocalStore.put_if_absent])
def test_a_key_is_no_folder_of_another(store, write):
    store.put("a/b", b"")
    for key in ("a", "a/b/c", "a/b/c/d"):
        with pytest.raises(ValueError, match="both an object and a folder"):
            write(store, key, b"")
        assert not store.exists(key)
        assert not store.replace_if_match(key, b"", "")
        store.delete(key)
    assert list(store.list()) == ["a/b"]
    assert len(files_below(store.root)) == 1


def test_not_found_names_the_key_and_pickles(store):
    with pytest.raises(NotFoundError) as caught:
        store.get("edits/charcoal")
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == f"the store {store.url} holds no edits/charcoal"


def test_open_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_store("out/farm") == LocalStore(tmp_path / "out" / "farm")
    assert open_store("~/farm") == LocalStore(tmp_path / "home" / "farm")
    assert open_store(f"file://{tmp_path}/with%20space") == LocalStore(tmp_path / "with space")
    for url in ("out/farm", "with space", "100%25 é"):
        opened = open_store(url)
        assert open_store(opened.url) == opened


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("s3://bucket/farm", "not built yet"),
        ("gs://bucket", "file:///absolute/path"),
        ("file://relative/path", "file:///absolute/path"),
        ("file:///", "file:///absolute/path"),
        ("/proc/farm", "cannot be used"),
        ("/dev/null", "cannot be used"),
        ("/dev/null/farm", "cannot be used"),
    ],
)
def test_refuses_stores(url, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        open_store(url)
    assert url in str(caught.value)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [(errno.ENOSPC, "is full"), (errno.EDQUOT, "is full"), (errno.EROFS, "cannot be used")],
)
def test_a_failing_disk_leaves_the_old_object_and_nothing_else(store, monkeypatch, code, sentence):
    store.put("a/old", b"old")

    def fail(descriptor):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        for key in ("a/old", "a/new"):
            with pytest.raises(UserError, match=f"The store {store.root} {sentence}"):
                store.put(key, b"new")
    assert store.get("a/old") == b"old"
    assert files_below(store.root) == [store.path("a/old")]
    store.delete("a/old")


def test_opening_sweeps_what_killed_writers_left_long_ago(store):
    old, recent = store.root / ".store/tmp/1-old", store.root / ".store/tmp/2-recent"
    for path in (old, recent):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 90_000,) * 2)
    assert list(LocalStore(store.root).list()) == []
    assert not old.exists()
    assert recent.exists()
