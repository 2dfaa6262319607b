import errno
import os
import time
import unicodedata
import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant
from stores import BAD_KEYS, StoreAgainstDict, StoreContract

from farm.errors import UserError
from farm.store import LocalStore, check_key, open_store


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "store")


def files_below(folder):
    return [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]


class FolderAgainstDict(StoreAgainstDict):
    @invariant()
    def the_objects_are_files_and_nothing_else_is_there(self):
        assert {key: self.store.path(key).read_bytes() for key in self.model} == self.model
        assert len(files_below(self.store.root)) == len(self.model)


class TestLocalStore(StoreContract):
    machine = FolderAgainstDict

    @pytest.fixture
    def new_store(self, tmp_path):
        return lambda: LocalStore(tmp_path / uuid.uuid4().hex)


@pytest.mark.parametrize("key", BAD_KEYS)
def test_no_path_leads_out_of_the_store(store, key):
    with pytest.raises(ValueError, match="is not a key"):
        store.path(key)


@settings(max_examples=60, deadline=None)
@given(st.text() | st.text(alphabet="./\\a", max_size=8))
def test_no_key_leads_out_of_the_store(key):
    root = Path("/srv/store")
    try:
        check_key(key)
    except ValueError:
        return
    assert key.isascii() and key.isprintable() and unicodedata.normalize("NFKC", key) == key
    path = Path(os.path.normpath(root / key))
    assert path.is_relative_to(root)
    assert path.relative_to(root).as_posix() == key
    assert not path.is_relative_to(root / ".store")


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
