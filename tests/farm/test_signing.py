"""Signatures: whatever is changed, moved, or made without the key, is neither served nor published again."""

from __future__ import annotations

import base64
import json
import os
import pickle
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from sound_adapters import BASE, Dying, killed, put_adapter
from tampered import edit_json

from farm.artifacts import find, verify
from farm.errors import IntegrityError, UserError
from farm.garbage import collect, find_garbage
from farm.registry import Registry
from farm.signing import Keys, new_key, open_keys, public_text, read_public
from farm.store import LocalStore
from farm.sync import sync
from farm.verify import verify as verify_store

UNSIGNED = (
    r"is not signed by any of signing\.public_keys: if it is yours, run `farm keys sign` where the private key is\.$"
)
CHANGED = r"was changed after it was signed, or its signature was: restore both .*\.$"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return made(tmp_path_factory.mktemp("keys") / "key.pem")


def made(path: Path) -> Keys:
    return open_keys(str(path), [public_text(new_key(path))])


def readers(*keys: Keys) -> Keys:
    """What has the public halves alone."""
    return Keys(tuple(public for key in keys for public in key.public))


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def registry(store: LocalStore, keys: Keys) -> Registry:
    """Ink has two versions, fog one, all signed."""
    registry = Registry(store, keys)
    for concept, name in (("ink", "old"), ("fog", "one"), ("ink", "new")):
        registry.publish(concept, **put_adapter(store, concept, name))
    return registry


def served(store: LocalStore, keys: Keys, concept: str = "ink") -> int:
    """As the server's bank does it: the record, then the manifests of what it names. The version."""
    entry = Registry(store, keys).get(concept)
    assert entry is not None
    for path in (entry.adapter, f"bases/{entry.base}"):
        assert find(store, path, keys)
    return entry.version


def flipped(data: bytes, place: int, change: int = 1) -> bytes:
    return data[:place] + bytes([data[place] ^ change]) + data[place + 1 :]


def signatures(store: LocalStore) -> list[str]:
    return [key for key in store.list() if key.endswith(".sig")]


def test_what_was_published_with_the_key_is_served(registry: Registry, keys: Keys) -> None:
    store, trusted = registry.store, readers(keys)
    assert isinstance(store, LocalStore)
    assert served(store, trusted) == 2 and served(store, trusted, "fog") == 1
    # Anyone can check it: Ed25519 over a line, the object's key, and its bytes.
    public = ed25519.Ed25519PublicKey.from_public_bytes(keys.public[0])
    for key in signatures(store):
        signed = key.rpartition(".sig")[0].rpartition(".")[0]
        public.verify(
            base64.b64decode(store.get(key)), b"e2gan-farm signature 1\n%b\n%b" % (signed.encode(), store.get(signed))
        )
    assert len(signatures(store)) == 4, "three adapters and their base"
    assert registry.rollback("ink").version == 3 and served(store, trusted) == 3
    registry.unpublish("ink")
    assert Registry(store, trusted).get("ink") is None
    registry.rollback("ink", 2)
    assert served(store, trusted) == 5
    assert verify_store(store, [], lambda *_: None, trusted).problems == []


def test_without_keys_nothing_changes(store: LocalStore) -> None:
    registry = Registry(store)
    registry.publish("ink", **put_adapter(store, "ink", "one"))
    assert signatures(store) == [] and json.loads(store.get("registry/ink.json"))["signature"] == ""
    assert served(store, Keys()) == 1


def test_signing_twice_leaves_the_same_bytes(registry: Registry, tmp_path: Path, keys: Keys) -> None:
    other = LocalStore(tmp_path / "other")
    before = {key: registry.store.get(key) for key in signatures(registry.store)}
    for key in registry.store.list():
        if key.startswith(("adapters/", "bases/")) and not key.endswith(".sig"):
            other.put(key, registry.store.get(key))
    for concept, name in (("ink", "old"), ("fog", "one"), ("ink", "new"), ("ink", "old")):
        Registry(other, keys).publish(concept, **put_adapter(other, concept, name))
    assert {key: other.get(key) for key in signatures(other)} == before


def test_any_flipped_byte_of_a_manifest_or_a_signature_is_refused(registry: Registry, keys: Keys) -> None:
    store, trusted = registry.store, readers(keys)
    entry = registry.get("ink")
    assert entry is not None and isinstance(store, LocalStore)
    for path in (entry.adapter, f"bases/{entry.base}"):
        for key in [key for key in store.list(path) if key.startswith(f"{path}/manifest.json")]:
            sound = store.get(key)
            for place in range(0, len(sound), 3 if key.endswith(".sig") else 29):
                store.put(key, flipped(sound, place))
                if key.endswith(".sig") and sound[place : place + 1] == b"\n":
                    continue  # only the end of its line
                with pytest.raises(IntegrityError, match=rf"{path}/manifest\.json {CHANGED}"):
                    find(store, path, trusted)
            store.put(key, sound)
    assert served(store, trusted) == 2


RECORD = st.tuples(st.integers(0, 10**6), st.integers(1, 255))


def test_any_flipped_byte_of_a_record_is_refused_or_says_the_same(registry: Registry, keys: Keys) -> None:
    store, trusted = registry.store, readers(keys)
    key = "registry/ink.json"
    sound, record = store.get(key), registry.record("ink")
    for place in range(0, len(sound), 11):
        store.put(key, flipped(sound, place))
        try:
            assert Registry(store, trusted).record("ink") == record
        except IntegrityError as error:
            assert f"{store.url}/{key} " in str(error) and str(error).endswith(".")


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record | {"version": 3},
        lambda record: record["history"][0] | {"concept": "ink", "history": [], "signature": record["signature"]},
        lambda record: record | {"version": 3, **{k: record["history"][0][k] for k in ("adapter", "digest")}},
        lambda record: record | {"action": "unpublished"},
        lambda record: record | {"metrics": {"l1": 0}},
        lambda record: record | {"forced": "it is good enough"},
        lambda record: record | {"history": []},
        lambda record: record | {"signature": ""},
        lambda record: record | {"signature": "AAAA"},
        lambda record: record | {"signature": base64.b64encode(bytes(64)).decode()},
    ],
)  # fmt: skip
def test_a_record_edited_without_the_key_is_refused(registry: Registry, keys: Keys, change: Any) -> None:
    edit_json(registry.store, "registry/ink.json", change)
    for trusted in (keys, readers(keys)):
        reader = Registry(registry.store, trusted)
        changing = (reader.rollback, reader.unpublish) if trusted.private else ()
        for call in (reader.get, reader.etag, *changing):
            with pytest.raises(IntegrityError, match=rf"registry/ink\.json ({UNSIGNED}|{CHANGED})"):
                call("ink")
    [problem, *_] = verify_store(registry.store, [], lambda *_: None, readers(keys)).problems
    assert "registry/ink.json" in problem


def test_another_concepts_record_and_adapter_are_refused(registry: Registry, keys: Keys) -> None:
    """Signed or not: a record is that of its name, and an adapter that of its folder."""
    store = registry.store
    fog, ink = store.get("registry/fog.json"), registry.get("ink")
    store.put("registry/ink.json", fog)
    for trusted in (Keys(), readers(keys)):
        with pytest.raises(IntegrityError, match=r"registry/ink\.json is the record of fog: restore its own\.$"):
            Registry(store, trusted).get("ink")
        store.put("registry/ink.json", json.dumps(json.loads(fog) | {"concept": "ink"}).encode())
        with pytest.raises(IntegrityError, match=r"registry/ink\.json is damaged .*names 'adapters/fog/"):
            Registry(store, trusted).get("ink")
        store.put("registry/ink.json", fog)
    # An adapter's folder copied over another's, signature and all, and under its own name.
    assert ink is not None
    entry = Registry(store, keys).get("fog")
    assert entry is not None
    for key in [*store.list(f"{entry.adapter}/")]:
        store.put(key.replace(entry.adapter, ink.adapter), store.get(key))
    with pytest.raises(IntegrityError, match=CHANGED):
        find(store, ink.adapter, readers(keys))


def test_a_signature_of_another_artifact_is_refused(registry: Registry, keys: Keys) -> None:
    store = registry.store
    assert isinstance(store, LocalStore)
    entry = registry.get("ink")
    assert entry is not None
    (own,) = (key for key in signatures(store) if key.startswith(entry.adapter))
    for other in signatures(store):
        store.put(own, store.get(other))
        if other != own:
            with pytest.raises(IntegrityError, match=CHANGED):
                served(store, readers(keys))
        store.put(
            own, keys.signature(f"{entry.adapter}/manifest.json", store.get(f"{entry.adapter}/manifest.json")).encode()
        )
    store.put(own, bytes(10**6))
    with pytest.raises(IntegrityError, match=CHANGED):
        served(store, readers(keys))
    store.delete(own)
    with pytest.raises(IntegrityError, match=rf"{entry.adapter}/manifest\.json {UNSIGNED}"):
        served(store, readers(keys))


def test_a_process_does_not_go_back_to_an_older_record(registry: Registry, keys: Keys) -> None:
    """Which was signed once. One that has just started cannot know."""
    old = registry.store.get("registry/ink.json")
    server = readers(keys)
    registry.unpublish("ink")
    assert Registry(registry.store, server).record("ink").version == 3
    registry.store.put("registry/ink.json", old)
    with pytest.raises(
        IntegrityError, match=r"registry/ink\.json has gone back from version 3 to 2, which no command does"
    ):
        Registry(registry.store, server).get("ink")
    assert served(registry.store, readers(keys)) == 2


def test_nobody_publishes_without_the_key(registry: Registry, keys: Keys, tmp_path: Path) -> None:
    """Nor with another one, nor is anything that was written without one gone on from."""
    store, before = registry.store, {key: registry.store.get(key) for key in registry.store.list()}
    reader = Registry(store, readers(keys))
    release = put_adapter(store, "ink", "old")
    for call in (
        lambda: reader.publish("ink", **release),
        lambda: reader.rollback("ink"),
        lambda: reader.unpublish("ink"),
    ):
        with pytest.raises(UserError, match=r"^signing\.private_key: is missing, .*\.$"):
            call()
    stranger = made(tmp_path / "stranger.pem")
    with pytest.raises(IntegrityError, match=CHANGED):
        Registry(store, stranger).publish("ink", **release)
    assert {key: store.get(key) for key in store.list()} == before
    Registry(store).publish("ink", **release)  # a farm that knows of no signatures
    for trusted in (keys, readers(keys)):
        with pytest.raises(IntegrityError, match=rf"registry/ink\.json {UNSIGNED}"):
            Registry(store, trusted).get("ink")


def test_what_was_changed_after_it_was_signed_is_not_signed_again(registry: Registry, keys: Keys) -> None:
    entry = registry.get("ink")
    assert entry is not None
    edit_json(registry.store, f"{entry.adapter}/manifest.json", lambda manifest: manifest | {"wall_seconds": 7.0})
    release = entry.model_dump(include={"adapter", "digest", "base", "metrics"})
    registry.rollback("ink")
    with pytest.raises(IntegrityError, match=CHANGED):
        registry.publish("ink", **release)
    with pytest.raises(UserError, match=rf"^ink is not rolled back to version 2: .*{CHANGED}"):
        registry.rollback("ink", 2)
    assert registry.record("ink").version == 3


def test_keys_are_rotated(store: LocalStore, keys: Keys, tmp_path: Path) -> None:
    """Readers get the new key first; when all is signed with it, they let go of the old one."""
    Registry(store, keys).publish("ink", **put_adapter(store, "ink", "one"))
    made(tmp_path / "new.pem")
    new, both = read_public(tmp_path / "new.pem"), (*keys.public, read_public(tmp_path / "new.pem"))
    rotated = open_keys(str(tmp_path / "new.pem"), [public_text(public) for public in both])
    assert served(store, Keys(both)) == 1
    with pytest.raises(IntegrityError):
        served(store, Keys((new,)))
    manifest = f"bases/{BASE.digest}/manifest.json"
    sound = store.get(manifest)
    edit_json(store, manifest, lambda changed: changed | {"wall_seconds": 7.0})
    with pytest.raises(
        IntegrityError, match=CHANGED
    ):  # it was signed with the old key, and is not blessed by the new one
        Registry(store, rotated).sign("ink")
    store.put(manifest, sound)
    assert Registry(store, rotated).sign("ink") and not Registry(store, rotated).sign("ink")
    assert served(store, Keys((new,))) == served(store, Keys(both)) == 1
    with pytest.raises(IntegrityError, match=CHANGED):  # the record has one signature, the new one
        served(store, readers(keys))
    Registry(store, rotated).publish("ink", **put_adapter(store, "ink", "two"))
    assert Registry(store, rotated).rollback("ink").version == 3 and served(store, Keys((new,))) == 3


def test_what_was_published_before_is_signed_as_it_is(store: LocalStore, keys: Keys) -> None:
    old = Registry(store)
    for name in ("one", "two"):
        old.publish("ink", **put_adapter(store, "ink", name))
    with pytest.raises(IntegrityError, match=UNSIGNED):
        served(store, readers(keys))
    assert Registry(store, keys).sign("ink")
    assert served(store, readers(keys)) == 2
    assert Registry(store, keys).rollback("ink").version == 3
    assert not Registry(store, keys).sign("fog"), "never published"
    with pytest.raises(UserError, match=r"^signing\.private_key: is missing"):
        Registry(store, readers(keys)).sign("ink")


def test_a_copy_takes_signatures_along_and_only_what_is_signed(registry: Registry, keys: Keys, tmp_path: Path) -> None:
    here, there = registry.store, LocalStore(tmp_path / "there")
    assert isinstance(here, LocalStore)

    def copy() -> list[str]:
        return sync(here, there, lambda *_: None, readers(keys)).problems

    assert copy() == [] and served(there, readers(keys)) == 2
    assert {key: there.get(key) for key in there.list()} == {key: here.get(key) for key in here.list()}
    # A signature that was made since is brought up, though its artifact is there.
    key = signatures(there)[0]
    there.delete(key)
    assert copy() == [] and there.get(key) == here.get(key)
    # What was changed here does not go there.
    fresh = put_adapter(here, "ink", "newest")
    registry.publish("ink", **fresh)
    edit_json(here, f"{fresh['adapter']}/manifest.json", lambda manifest: manifest | {"wall_seconds": 7.0})
    edit_json(here, "registry/fog.json", lambda record: record | {"version": 9})
    before = {key: there.get(key) for key in there.list()}
    assert sorted(problem.partition(" was changed")[0] for problem in copy()) == sorted([
        f"{here.url}/{fresh['adapter']}/manifest.json",
        f"{here.url}/registry/fog.json",
        f"{there.url} did not get version 3 of ink: {fresh['adapter']} is not the same there.",
    ])  # fmt: skip
    assert {key: there.get(key) for key in there.list()} == before


def test_a_collection_takes_signatures_along(registry: Registry, keys: Keys) -> None:
    store = registry.store
    left = put_adapter(store, "ink", "never published")["adapter"]
    keys.sign(store, f"{left}/manifest.json", store.get(f"{left}/manifest.json"))
    before = [*store.list()]
    garbage = find_garbage(store, [], before=datetime.now(UTC) + timedelta(days=1))
    assert list(garbage.artifacts) == [left] and collect(store, garbage, lambda *_: None) == []
    assert [*store.list()] == [key for key in before if not key.startswith(left)]
    assert len(signatures(store)) == 4 and served(store, readers(keys)) == 2


@pytest.mark.parametrize("calls", range(0, 12, 2))
def test_a_publisher_that_is_killed_leaves_what_is_served(store: LocalStore, keys: Keys, calls: int) -> None:
    registry = Registry(store, keys)
    registry.publish("ink", **put_adapter(store, "ink", "old"))
    release = put_adapter(store, "ink", "new")
    dying = Registry(Dying(store, calls), keys)
    died = killed(lambda: dying.publish("ink", **release))
    assert served(store, readers(keys)) in ((1, 2) if died else (2,))
    registry.publish("ink", **release)
    assert served(store, readers(keys)) == 2 and verify(store, release["adapter"], readers(keys)) == []


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20), st.binary(max_size=60), st.integers(0, 63), st.integers(1, 255))
def test_a_signature_is_of_one_name_and_its_bytes(name: str, data: bytes, place: int, change: int) -> None:
    private = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    keys = Keys((private.public_key().public_bytes_raw(),), private)
    signature = keys.signature("registry/ink.json", data)
    store = LocalStore.__new__(LocalStore)
    object.__setattr__(store, "root", Path("/"))

    def holds(key: str, content: bytes, signature: str) -> bool:
        try:
            readers(keys).check_record(store, key, content, signature, 1)
        except IntegrityError:
            return False
        return True

    assert holds("registry/ink.json", data, signature) and signature == keys.signature("registry/ink.json", data)
    raw = base64.b64decode(signature)
    assert not holds("registry/ink.json", data, base64.b64encode(flipped(raw, place, change)).decode())
    assert not holds("registry/ink.json", data + b"x", signature)
    assert not holds("registry/fog.json", data, signature)
    assert not holds("registry/ink.json\n", data, signature)
    assert not holds("registry/ink.json", data, name)


# The keys themselves.


def test_a_new_key_is_private_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    before = os.umask(0)
    try:
        public = new_key(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    key = load_pem_private_key(path.read_bytes(), None)
    assert isinstance(key, ed25519.Ed25519PrivateKey)
    assert key.public_key().public_bytes_raw() == public == read_public(path)
    pem = path.read_bytes()
    for taken in (path, tmp_path):
        with pytest.raises(UserError, match=r"is there already, and no key is ever overwritten"):
            new_key(taken)
    with pytest.raises(UserError, match=r"cannot be written"):
        new_key(tmp_path / "nowhere" / "key.pem")
    (tmp_path / "link.pem").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is there already"):
        new_key(tmp_path / "link.pem")
    assert path.read_bytes() == pem and len({new_key(tmp_path / f"{n}.pem") for n in range(3)}) == 3


def test_public_keys_in_every_form(tmp_path: Path, keys: Keys) -> None:
    pem = ed25519.Ed25519PublicKey.from_public_bytes(keys.public[0]).public_bytes(
        Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
    )
    text = public_text(keys.public[0])
    (tmp_path / "pem").write_bytes(pem)
    (tmp_path / "text").write_text(f"{text}\n")
    for given_ in (pem.decode(), text, f" {text}\n", str(tmp_path / "pem"), str(tmp_path / "text")):
        assert open_keys(None, [given_]) == Keys(keys.public)
    assert open_keys(None, ()) == Keys()
    assert pickle.loads(pickle.dumps(readers(keys))) == readers(keys)
    with pytest.raises(TypeError):
        pickle.dumps(keys)
    assert "rivate" not in repr(keys)


def secrets_of(tmp_path: Path) -> dict[str, str]:
    """Private keys of all kinds, each as text."""
    ours, rsas = ed25519.Ed25519PrivateKey.generate(), rsa.generate_private_key(65537, 2048)
    locked = ours.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")).decode()
    plain = [key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode() for key in (ours, rsas)]
    return {"ours": plain[0], "rsa": plain[1], "locked": locked}


def test_mistakes_with_keys_are_told_without_repeating_one(tmp_path: Path, keys: Keys) -> None:
    private = secrets_of(tmp_path)
    files = {name: tmp_path / name for name in private}
    for name, file in files.items():
        file.write_text(private[name])
    public = public_text(keys.public[0])
    missing = str(tmp_path / "missing")
    wrong: list[tuple[str | None, list[str], str]] = [
        (
            missing,
            [public],
            rf"^signing\.private_key: {missing} cannot be read \(No such file or directory\); `farm keys",
        ),
        (str(tmp_path), [public], r"^signing\.private_key: .* cannot be read \(Is a directory\)"),
        (private["ours"], [public], r"^signing\.private_key: is a key itself; write it to a file"),
        (str(files["rsa"]), [public], r"^signing\.private_key: .*rsa holds no Ed25519 key in PEM without a passphrase"),
        (str(files["locked"]), [public], r"^signing\.private_key: .*locked holds no Ed25519 key"),
        (
            str(files["ours"]),
            [public],
            r"^signing\.public_keys: holds no key of .*ours, so nothing that it signs would",
        ),
        (None, [public, missing], rf"^signing\.public_keys\.1: {missing} cannot be read"),
        (None, [str(files["ours"])], r"^signing\.public_keys\.0: is a private key; give its public half"),
        (None, [private["ours"]], r"^signing\.public_keys\.0: is a private key; give its public half"),
        (None, [private["rsa"]], r"^signing\.public_keys\.0: is a private key"),
        (None, ["-----BEGIN PUBLIC KEY-----"], r"^signing\.public_keys\.0: is no Ed25519 public key"),
        (None, [public[:-4] + "\0"], r"^signing\.public_keys\.0: .*cannot be read"),
        (None, [__file__], r"^signing\.public_keys\.0: is no Ed25519 public key"),
    ]
    for path, publics, told in wrong:
        with pytest.raises(UserError, match=told) as caught:
            open_keys(path, publics)
        sentence = str(caught.value)
        assert sentence[-1] == "." and "\n" not in sentence
        for secret in private.values():
            assert not any(line in sentence for line in secret.splitlines()[1:-1])
