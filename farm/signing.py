"""Detached signatures of what is published: Ed25519, by `cryptography`.

Publishing signs the manifests of an adapter and of its base, each in an object beside it,
`manifest.json.<key's id>.sig`, and the concept's record within itself. So whoever may write to the store but has no key
cannot have another adapter served: the manifest says what is in the files and for which concept, the record which
adapter is current. docs/storage.md says what this does not protect from.

A signature is over the name of what is signed and its bytes: moved to another place it does not hold.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from farm.errors import IntegrityError, UserError
from farm.objects import NotFoundError, Reader, Store, TooLargeError, where

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_SCHEME = b"e2gan-farm signature 1\n"  # nothing else that this key may sign begins so
_SIGNATURE_BYTES = 128  # of the object that holds one: 64 bytes in base64
_SIGN_AGAIN = "`farm keys sign` where the private key is"


@dataclass(frozen=True)
class Keys:
    """Whose signatures count, and the key to sign with.

    public: raw, 32 bytes each. With none, everything counts as signed. private: one of theirs, where there is one; it
    cannot be pickled, so it stays in the process that read it.
    """

    public: tuple[bytes, ...] = ()
    private: Ed25519PrivateKey | None = field(default=None, repr=False, compare=False)
    _newest: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def sign(self, store: Store, key: str, data: bytes) -> None:
        """Put a signature beside an object that holds `data`; nothing when signatures are not in use.

        Raises:
            IntegrityError: the object was signed with one of the keys, and changed since.
        """
        self.need_private()
        if self.private is None:
            return
        signed = dict(self._signed(store, key, data))
        if not all(signed.values()):
            raise IntegrityError(_changed(where(store, key)))
        own = _raw(self.private)
        if own not in signed:
            store.put_if_absent(_beside(key, own), self.signature(key, data).encode() + b"\n")

    def check(self, store: Reader, key: str, data: bytes) -> None:
        """IntegrityError unless one of the keys has signed this object, which holds `data`, or signatures are not in
        use. The one way in which an object of a store is found to be signed."""
        wrong = False
        for _, holds in self._signed(store, key, data):
            if holds:
                return
            wrong = True
        if self.public:
            raise IntegrityError(_changed(where(store, key)) if wrong else _unsigned(where(store, key)))

    def _signed(self, store: Reader, key: str, data: bytes) -> Iterator[tuple[bytes, bool]]:
        """The keys of which there is a signature beside an object, and whether it holds."""
        for public in self.public:
            try:
                signature = store.get(_beside(key, public), _SIGNATURE_BYTES)
            except NotFoundError:
                continue
            except TooLargeError:
                signature = b""
            yield public, _holds(public, key, data, signature)

    def signature(self, name: str, data: bytes) -> str:
        """This key's signature of what has this name and holds `data`, in base64; empty when there is no key."""
        if self.private is None:
            return ""
        return base64.b64encode(self.private.sign(_message(name, data))).decode()

    def check_record(self, store: Reader, key: str, data: bytes, signature: str, version: int) -> None:
        """IntegrityError unless one of the keys has made this signature of a concept's record, or signatures are not in
        use; or when the record is older than one that was checked before: then an old one was put back."""
        if not self.public:
            return
        if not any(_holds(public, key, data, signature.encode()) for public in self.public):
            address = where(store, key)
            raise IntegrityError(_changed(address) if signature else _unsigned(address))
        address = where(store, key)
        if version < (newest := self._newest.get(address, 0)):
            raise IntegrityError(
                f"{address} has gone back from version {newest} to {version}, which no command does: restore it, or "
                "start again if that was you."
            )
        self._newest[address] = version

    def need_private(self) -> None:
        """UserError when signatures are in use and there is no key to make them with."""
        if self.public and self.private is None:
            raise UserError(
                "signing.private_key: is missing, so what is published here would be served nowhere; give the file of "
                "the key, or publish where it is."
            )


NOBODY = Keys()
"""Signatures are not in use."""


def open_keys(private_key: str | None, public_keys: Sequence[str]) -> Keys:
    """The keys of the configuration's section `signing`.

    Raises:
        UserError: one of them cannot be read or is no Ed25519 key, or the private one is of none of the public ones. No
            sentence repeats a key.
    """
    public = tuple(_public(text, f"signing.public_keys.{place}") for place, text in enumerate(public_keys))
    if private_key is None:
        return Keys(public)
    private = _private(private_key, "signing.private_key")
    if _raw(private) not in public:
        raise UserError(
            f"signing.public_keys: holds no key of {private_key}, so nothing that it signs would count; add "
            f"{public_text(_raw(private))}."
        )
    return Keys(public, private)


def public_text(public: bytes) -> str:
    """A public key as the configuration takes it: base64."""
    return base64.b64encode(public).decode()


def read_public(path: Path) -> bytes:
    """The public half of the private key in a file. UserError when it holds none."""
    return _raw(_private(str(path), "farm keys show"))


def new_key(path: Path) -> bytes:
    """Write a new private key, PEM that only this user can read, to a file that is not there yet; its public half.

    Raises:
        UserError: there is a file, or it cannot be written.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    private = Ed25519PrivateKey.generate()
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError as error:
        raise UserError(f"{path}: is there already, and no key is ever overwritten; choose another name.") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place.") from error
    return _raw(private)


def _private(path: str, place: str) -> Ed25519PrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    if "-----" in path:
        raise UserError(
            f"{place}: is a key itself; write it to a file that only you can read and give the file's path."
        )
    try:
        key = load_pem_private_key(_file(path, place), None)
    except (TypeError, ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"{place}: {path} holds no Ed25519 key in PEM without a passphrase; `farm keys new` makes one.")
    return key


def _public(text: str, place: str) -> bytes:
    """A key in PEM or base64, or that of a file which holds one."""
    raw = _parsed(text)
    if raw is None and "-----" not in text:
        content = _file(text, place)
        text = content.decode("ascii", "replace")
        raw = _parsed(text)
    if "PRIVATE" in text:
        raise UserError(f"{place}: is a private key; give its public half, which `farm keys show FILE` prints.")
    if raw is None:
        raise UserError(f"{place}: is no Ed25519 public key; give what `farm keys show FILE` prints.")
    return raw


def _parsed(text: str) -> bytes | None:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        if "-----" not in text:
            raw = base64.b64decode(text.strip().encode(), validate=True)
            return raw if len(raw) == 32 else None
        key = load_pem_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm):
        return None
    return key.public_bytes_raw() if isinstance(key, Ed25519PublicKey) else None


def _file(path: str, place: str) -> bytes:
    try:
        with Path(path).expanduser().open("rb") as file:
            return file.read(1 << 16)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no path"
        raise UserError(f"{place}: {path} cannot be read ({reason}); `farm keys new FILE` makes a key.") from error


def _raw(private: Ed25519PrivateKey) -> bytes:
    return private.public_key().public_bytes_raw()


def _message(name: str, data: bytes) -> bytes:
    return _SCHEME + name.encode() + b"\n" + data


def _beside(key: str, public: bytes) -> str:
    """The key of the object that holds a signature of another object. Its name tells whose, so keys can change."""
    return f"{key}.{hashlib.sha256(public).hexdigest()[:16]}.sig"


def _holds(public: bytes, name: str, data: bytes, signature: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        raw = base64.b64decode(signature.strip(), validate=True)
        Ed25519PublicKey.from_public_bytes(public).verify(raw, _message(name, data))
    except (ValueError, InvalidSignature):
        return False
    return True


def _changed(address: str) -> str:
    return (
        f"{address} was changed after it was signed, or its signature was: restore both from another store, or delete "
        "both and make it again."
    )


def _unsigned(address: str) -> str:
    return f"{address} is not signed by any of signing.public_keys: if it is yours, run {_SIGN_AGAIN}."
