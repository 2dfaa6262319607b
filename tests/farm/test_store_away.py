"""A store that goes away and comes back: unmounted, unplugged, or full for a while."""

import builtins
import errno
import fcntl
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from farm.errors import UserError
from farm.store import LocalStore, NotFoundError, StoreUnreachableError, open_store

OBJECTS = {"a/b/c": b"old", "a/d": b"other"}


@pytest.fixture
def store(tmp_path):
    return filled(tmp_path / "store")


def filled(root):
    store = LocalStore(root)
    for key, data in OBJECTS.items():
        store.path(key).parent.mkdir(parents=True, exist_ok=True)
        store.path(key).write_bytes(data)
    return store


def get(store, key):
    """The object's bytes, None when there is none."""
    try:
        return store.get(key)
    except NotFoundError:
        return None


CALLS = {
    "get": (lambda store: store.get("a/b/c"), b"old", OBJECTS),
    "get_with_etag": (lambda store: store.get_with_etag("a/b/c")[0], b"old", OBJECTS),
    "get what is missing": (lambda store: get(store, "a/x"), None, OBJECTS),
    "exists": (lambda store: store.exists("a/b/c"), True, OBJECTS),
    "exists not": (lambda store: store.exists("a/x"), False, OBJECTS),
    "list": (lambda store: [*store.list()], [*OBJECTS], OBJECTS),
    "list a prefix": (lambda store: [*store.list("a/b/")], ["a/b/c"], OBJECTS),
    "marks": (lambda store: [*store.marks("a/")], [*OBJECTS], OBJECTS),
    "list nothing": (lambda store: [*store.list("x/")], [], OBJECTS),
    "put": (lambda store: store.put("a/b/c", b"new"), None, OBJECTS | {"a/b/c": b"new"}),
    "put in a new folder": (lambda store: store.put("x/y/z", b"new"), None, OBJECTS | {"x/y/z": b"new"}),
    "put_if_absent": (lambda store: store.put_if_absent("x/y", b"new"), True, OBJECTS | {"x/y": b"new"}),
    "put_if_absent of what is there": (lambda store: store.put_if_absent("a/d", b"new"), False, OBJECTS),
    "replace_if_match": (
        lambda store: store.replace_if_match("a/d", b"new", hashlib.sha256(b"other").hexdigest()),
        True,
        OBJECTS | {"a/d": b"new"},
    ),
    "replace_if_match of another": (lambda store: store.replace_if_match("a/d", b"new", "x"), False, OBJECTS),
    "replace_if_match of nothing": (lambda store: store.replace_if_match("x", b"new", "x"), False, OBJECTS),
    "delete": (lambda store: store.delete("a/d"), None, {"a/b/c": b"old"}),
    "delete nothing": (lambda store: store.delete("x"), None, OBJECTS),
}
"""Every method: a call, its answer and what the store then holds."""

each_call = pytest.mark.parametrize("name", CALLS)


def contents(store):
    return {key: store.get(key) for key in store.list()}


class Mount:
    """A store's folder, which can be taken away. bare: an empty folder stays in its place, as a mount point does."""

    def __init__(self, root, bare):
        self.root, self.elsewhere, self.bare = root, root.with_name("elsewhere"), bare

    def take_away(self):
        self.root.rename(self.elsewhere)
        if self.bare:
            self.root.mkdir()

    def bring_back(self):
        if self.bare:
            shutil.rmtree(self.root)
        assert not self.root.exists(), "somebody made the store's folder anew"
        self.elsewhere.rename(self.root)


@each_call
@pytest.mark.parametrize("bare", [False, True])
def test_a_store_that_is_away_is_not_an_empty_one(store, name, bare):
    call, answer, after = CALLS[name]
    mount = Mount(store.root, bare)
    mount.take_away()
    for handle in (store, pickle.loads(pickle.dumps(store))):
        with pytest.raises(StoreUnreachableError, match=f"the store {store.url} does not answer"):
            call(handle)
    assert not bare or not list(store.root.iterdir())
    mount.bring_back()
    assert contents(store) == OBJECTS
    assert call(store) == answer
    assert contents(store) == after


@each_call
def test_a_new_store_in_its_place_is_another_store(store, name):
    mount = Mount(store.root, bare=True)
    mount.take_away()
    new = LocalStore(store.root)
    assert new == store
    if name != "put_if_absent of what is there":  # which would be there
        with pytest.raises(StoreUnreachableError):
            CALLS[name][0](store)
    assert list(new.list()) == []
    mount.bring_back()
    assert contents(pickle.loads(pickle.dumps(store))) == OBJECTS


SYSTEM_CALLS = [
    *((os, name) for name in ("stat", "open", "fsync", "scandir", "mkdir", "replace", "link", "unlink")),
    (fcntl, "flock"),
    (builtins, "open"),
]


@each_call
@pytest.mark.parametrize("bare", [False, True])
def test_whenever_it_goes_and_comes_back(tmp_path, monkeypatch, name, bare):
    """It goes before one system call and comes back before another: the answer is right, or that it is away."""
    call, answer, after = CALLS[name]

    def attempt(goes, comes):
        """Call with the store away from its `goes`th system call to its `comes`th; how many there were."""
        store, seen, away = filled(tmp_path / f"{goes}-{comes}" / "store"), 0, False
        mount = Mount(store.root, bare)

        def watched(function):
            def watch(*args, **options):
                nonlocal seen, away
                seen += 1
                if seen in (goes, comes):
                    patch.undo()
                    mount.bring_back() if away else mount.take_away()
                    away = not away
                    set_watches()
                return function(*args, **options)

            return watch

        def set_watches():
            for module, function in SYSTEM_CALLS:
                patch.setattr(module, function, watched(getattr(module, function)))
            patch.setattr("io.open", builtins.open)

        with monkeypatch.context() as patch:
            set_watches()
            try:
                result = call(store)
            except StoreUnreachableError:
                result = StoreUnreachableError
            finally:
                patch.undo()
        if away:
            mount.bring_back()
        assert result in (answer, StoreUnreachableError)
        now = contents(store)
        assert now == after if result == answer else now in (OBJECTS, after)
        return seen

    most = attempt(0, 0)
    assert most > 0
    for goes in range(1, most + 1):
        for comes in (0, *range(goes + 1, goes + 6)):
            attempt(goes, comes)


@each_call
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN])
def test_what_a_lost_device_says(store, monkeypatch, name, code):
    call, _, _ = CALLS[name]

    def fail(*args, **options):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        for module, function in SYSTEM_CALLS:
            patch.setattr(module, function, fail)
        patch.setattr("io.open", fail)
        with pytest.raises(StoreUnreachableError) as caught:
            call(store)
    assert caught.value.__cause__.errno == code
    assert contents(store) == OBJECTS


def test_the_error_pickles(store):
    again = pickle.loads(pickle.dumps(StoreUnreachableError(store.url)))
    assert isinstance(again, OSError)
    assert str(again) == f"the store {store.url} does not answer"


def test_only_opening_makes_a_store(tmp_path):
    root = tmp_path / "not" / "there" / "yet"
    store = LocalStore(root)
    shutil.rmtree(tmp_path / "not")
    with pytest.raises(StoreUnreachableError):
        store.put("a", b"")
    with pytest.raises(StoreUnreachableError):
        pickle.loads(pickle.dumps(store)).exists("a")
    assert not (tmp_path / "not").exists()
    open_store(store.url).put("a", b"")
    assert store.root.is_dir()


FILL = """
import sys
from pathlib import Path
from farm.errors import UserError
from farm.store import LocalStore

store = LocalStore(Path(sys.argv[1]))
store.put("old", b"old")
etag = store.get_with_etag("old")[1]
for key in ("old", "new", "folder/new"):
    for call in (store.put, store.put_if_absent, lambda *new: store.replace_if_match(*new, etag)):
        try:
            call(key, bytes(2_000_000))
        except UserError as error:
            print(error)
assert store.get("old") == b"old"
assert [*store.list()] == ["old"]
assert not [*(store.root / ".store/tmp").iterdir()]
store.put("new", b"small")
"""


@pytest.mark.parametrize("limit", ["disk", "file"])
def test_a_full_disk_leaves_the_old_object_and_nothing_else(tmp_path, limit):
    """On a file system of 1 MB, and where a process may write no file larger than that."""
    fill = [sys.executable, "-c", FILL, str(tmp_path / "store")]
    if limit == "disk":
        mount = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs "$0"; exec "$@"']
        fill = [*mount, str(tmp_path), *fill]
        if subprocess.run([*mount, str(tmp_path), "mountpoint", "-q", str(tmp_path)], capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
    else:
        fill = ["prlimit", f"--fsize={1 << 20}", *fill]
    done = subprocess.run(fill, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    why = "No space left on device" if limit == "disk" else "File too large"
    told = f"The store {tmp_path / 'store'} is full ({why}): free space on its disk or raise its limits."
    assert done.stdout.splitlines() == [told] * 6  # of put, and the others where they have something to write


def test_a_folder_of_somebody_elses(store, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(UserError, match=r"cannot be used \(Permission denied\): check who owns it\."):
            store.put("a/d", b"new")
    assert contents(store) == OBJECTS
