"""Artifacts: folders of the store that exist if and only if their `manifest.json` does.

A stage describes what it will make in a `Spec`, before making it; the digest of that description names the
folder. So the same command twice finds its work done, and a changed prompt rebuilds that concept and nothing
else. The files are put first and the manifest last, by put-if-absent: a stage killed in between has made
nothing, and runs again. The manifest holds every file's size and sha256, and readers check both.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, cached_property
from importlib import metadata
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_json

from farm.errors import IntegrityError
from farm.objects import TooLargeError
from farm.signing import NOBODY, Keys
from farm.store import NotFoundError, Reader, Store, check_key, where
from farm.threads import beside

MANIFEST = "manifest.json"
DOCUMENT_BYTES = 32 << 20
"""No manifest, record or lease is larger: a manifest of FFHQ's 70,000 photographs has a quarter of it."""
PACKAGES = (
    "e2gan-farm",
    "numpy",
    "peft",
    "pillow",
    "ray",
    "scikit-learn",
    "torch",
)  # those that shape results

Document = TypeVar("Document", bound=BaseModel)


def canonical_json(value: object) -> str:
    """The one JSON text of a value: keys sorted, no spaces, no escapes. ValueError for NaN and infinities.

    Numbers keep their type: 1 and 1.0 are different texts.
    """
    plain = json.loads(json.dumps(value, allow_nan=False))  # keys become strings before they are sorted
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def dump(document: BaseModel) -> bytes:
    """The bytes of a document that people may read in the store. ValueError for NaN and infinities."""
    plain = document.model_dump()
    json.dumps(plain, allow_nan=False)  # the one below would write NaN; this one is slow only where it indents
    return to_json(plain, indent=2) + b"\n"


def parse(kind: type[Document], data: bytes, *, store: Reader, key: str, fix: str) -> Document:
    """Read a document back; IntegrityError, whose sentence ends with `fix`, when it is not a valid one."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        place = ascii(".".join(str(part) for part in first["loc"]))[1:80].rstrip("'") or "the document"
        raise IntegrityError(
            f"{where(store, key)} is damaged ({place}: {first['msg']}): {fix} and run again."
        ) from error


def read(kind: type[Document], *, store: Store, key: str, fix: str) -> tuple[Document, str]:
    """Read a document of the store, and its etag. NotFoundError, TooLargeError, and IntegrityError as `parse`."""
    data, etag = store.get_with_etag(key, DOCUMENT_BYTES)
    return parse(kind, data, store=store, key=key, fix=fix), etag


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What an artifact will be, known before it exists.

    `version` is the stage's own: bump it to rebuild on purpose. `config` is the resolved configuration, as
    JSON takes it; `inputs` maps names to the digests of the artifacts read. The folder is no part of the
    digest.
    """

    stage: str
    version: int
    folder: str
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0

    @cached_property
    def digest(self) -> str:
        """The first 128 bits, in hex, of the sha256 of everything that decides the content."""
        identity = {
            "stage": self.stage,
            "version": self.version,
            "config": dict(self.config),
            "inputs": dict(self.inputs),
            "seed": self.seed,
        }
        return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:32]

    @property
    def path(self) -> str:
        """The artifact's folder in the store."""
        return f"{self.folder}/{self.digest}"


def _key(text: str) -> str:
    check_key(text)
    return text


def _file_name(text: str) -> str:
    if text == MANIFEST:
        raise ValueError(f"{MANIFEST} is no file of an artifact")
    return _key(text)


Key = Annotated[str, AfterValidator(_key)]
"""A key of the store."""
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
"""A Spec's."""


class FileEntry(BaseModel):
    """A file of an artifact: its size in bytes and its sha256 in hex."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @classmethod
    def of(cls, data: bytes) -> "FileEntry":
        return cls(size=len(data), sha256=hashlib.sha256(data).hexdigest())


class Manifest(BaseModel):
    """What `manifest.json` says: the Spec it was made from, the files, what they cost, and a few facts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: str
    version: int
    path: Key
    digest: Digest
    config: dict[str, Any]
    inputs: dict[str, str]
    seed: int
    files: dict[Annotated[str, AfterValidator(_file_name)], FileEntry]
    packages: dict[str, str]
    wall_seconds: float
    device_seconds: float
    created_at: str
    summary: dict[str, Any]

    @property
    def spec(self) -> Spec:
        """The Spec again; its path differs from the manifest's when somebody edited or moved the manifest."""
        return Spec(
            stage=self.stage,
            version=self.version,
            folder=self.path.rpartition("/")[0],
            config=self.config,
            inputs=self.inputs,
            seed=self.seed,
        )


def find(store: Reader, path: str, keys: Keys = NOBODY) -> Manifest | None:
    """The manifest of the artifact at `path`, None when there is no such artifact.

    IntegrityError when the manifest is damaged, was edited, belongs to another folder, or none of the keys signed it.
    """
    key = f"{path}/{MANIFEST}"
    try:
        data = store.get(key, DOCUMENT_BYTES)
    except NotFoundError:
        return None
    keys.check(store, key, data)
    manifest = parse(Manifest, data, store=store, key=key, fix=f"delete the folder {path}")
    if manifest.path != path or manifest.spec.path != path or manifest.spec.digest != manifest.digest:
        raise IntegrityError(
            f"{where(store, key)} does not describe its folder: delete the folder {path} and run again."
        )
    return manifest


def commit(
    store: Store,
    spec: Spec,
    files: Mapping[str, bytes | FileEntry],
    *,
    wall_seconds: float,
    device_seconds: float = 0.0,
    summary: Mapping[str, Any] | None = None,
) -> Manifest:
    """Put the files, side by side, then the manifest that makes them an artifact.

    A FileEntry stands for a file that a worker has put under that name and hashed: it is not read again;
    NotFoundError when it is not there. When another process committed the same artifact first, its manifest is
    returned. Two processes that made different bytes of one Spec at the same moment can leave files of both; the
    later one then raises IntegrityError rather than vouch for them.
    """
    if MANIFEST in files:
        raise ValueError(f"{MANIFEST} is written by commit, it cannot be one of the files")
    if winner := find(store, spec.path):
        return winner
    by_workers = {f"{spec.path}/{name}" for name, data in files.items() if isinstance(data, FileEntry)}
    if by_workers and (missing := by_workers.difference(store.list(f"{spec.path}/"))):
        raise NotFoundError(min(missing), store.url)

    def put(name: str) -> FileEntry:
        data = files[name]
        if isinstance(data, FileEntry):
            return data
        store.put(f"{spec.path}/{name}", data)
        return FileEntry.of(data)

    names = sorted(files)
    entries = dict(zip(names, beside(put, names, store.at_once), strict=True))
    manifest = Manifest(
        stage=spec.stage,
        version=spec.version,
        path=spec.path,
        digest=spec.digest,
        config=dict(spec.config),
        inputs=dict(spec.inputs),
        seed=spec.seed,
        files=entries,
        packages=_packages(),
        wall_seconds=wall_seconds,
        device_seconds=device_seconds,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        summary=dict(summary or {}),
    )
    if store.put_if_absent(f"{spec.path}/{MANIFEST}", dump(manifest)):
        return manifest
    artifact = open_artifact(store, spec.path)
    if artifact.manifest.files != entries:
        for name in artifact.manifest.files:
            artifact.read(name)
    return artifact.manifest


@dataclass(frozen=True)
class Artifact:
    """A committed artifact, opened to read."""

    store: Store
    manifest: Manifest

    def read(self, name: str, at_most: int | None = None) -> bytes:
        """A file's bytes, checked against the manifest; no more of them are read than it lists.

        at_most: bytes that such a file can have; one that lists more is refused unread.

        KeyError for a name the manifest does not list; IntegrityError when the file is missing, changed or too large.
        """
        expected = self.manifest.files[name]
        path = self.manifest.path
        key = f"{path}/{name}"
        if at_most is not None and expected.size > at_most:
            raise IntegrityError(
                f"{where(self.store, key)} has {expected.size:,} bytes, where {at_most:,} would be many: delete the "
                f"folder {path} and run again."
            )
        try:
            data = self.store.get(key, expected.size)
        except NotFoundError:
            problem = "is missing"
        except TooLargeError:
            problem = f"is not the file that was put there (more than the {expected.size} bytes expected)"
        else:
            found = FileEntry.of(data)
            if found == expected:
                return data
            sizes = f"{found.size} bytes, {expected.size} expected"
            other = "its sha256 is another" if found.size == expected.size else sizes
            problem = f"is not the file that was put there ({other})"
        raise IntegrityError(f"{where(self.store, key)} {problem}: delete the folder {path} and run again.")


def open_artifact(store: Store, path: str, keys: Keys = NOBODY) -> Artifact:
    """Open the artifact at `path`; NotFoundError when there is none, IntegrityError as in `find`."""
    manifest = find(store, path, keys)
    if manifest is None:
        raise NotFoundError(f"{path}/{MANIFEST}", store.url)
    return Artifact(store, manifest)


def need_artifact(store: Store, path: str, keys: Keys = NOBODY) -> Artifact:
    """As `open_artifact`, for what has been there: IntegrityError also when there is none."""
    try:
        return open_artifact(store, path, keys)
    except NotFoundError as error:
        raise IntegrityError(
            f"{where(store, error.key)} is missing: copy {path} from another store with `farm sync`, or make it again "
            "with `farm run`."
        ) from error


def verify(store: Store, path: str, keys: Keys = NOBODY) -> list[str]:
    """Read every file the manifest lists and return what is wrong, a sentence each; empty when sound."""
    try:
        artifact = need_artifact(store, path, keys)
    except IntegrityError as error:
        return [str(error)]
    problems = []
    for name in artifact.manifest.files:
        try:
            artifact.read(name)
        except IntegrityError as error:
            problems.append(str(error))
    return problems


@cache
def _packages() -> dict[str, str]:
    """The versions of PACKAGES, less those not installed, as the farm itself in a folder Ray shipped."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
