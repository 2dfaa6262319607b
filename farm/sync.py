"""Copying what one store has finished into another: artifacts, runs and the registry.

An artifact's files go first, each checked against its manifest on the way, and the manifest goes last; the registry
comes at the very end. So a copy that is cut off leaves nothing half visible, and the next one goes on: what is there
already and has the right hash is not copied again. The queue, checkpoints and unfinished work stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from rich.filesize import decimal

from farm.artifacts import DOCUMENT_BYTES, MANIFEST, Artifact, FileEntry, Manifest, dump, find
from farm.errors import IntegrityError
from farm.graph import Graph, published, read_graph
from farm.objects import TooLargeError
from farm.registry import Entry, Registry
from farm.signing import NOBODY, Keys
from farm.store import NotFoundError, Store, where
from farm.threads import MEMORY_BYTES, THREADS, Allowance, in_threads


@dataclass
class Copied:
    """What was copied, what was there already, and what was not copied, a sentence each. size: bytes copied."""

    artifacts: int = 0
    concepts: int = 0
    files: int = 0
    size: int = 0
    there: int = 0
    problems: list[str] = field(default_factory=list)


def sync(source: Store, target: Store, on_progress: Callable[[int, int, str], None], keys: Keys = NOBODY) -> Copied:
    """Copy into the target what it lacks. Nothing that is whole there is changed, and no version is lowered.

    A conflict is a problem and stays as it is in the target: an artifact of the same digest with other bytes, or a
    concept to which both stores have published on their own. keys: records of the source, and the adapters and bases
    they name, are not copied unless one of these signed them (`farm.signing`).
    """
    graph, copied = read_graph(source), Copied()
    refused = {**graph.damaged, **_unsigned(source, keys)}
    copied.problems += [refused[path] for path in sorted(refused)]
    there = frozenset(target.list())
    pool = ThreadPoolExecutor(THREADS)
    try:
        trusted = graph.ordered(graph.manifests.keys() - refused.keys())
        _artifacts(source, target, graph, trusted, there, copied, pool, on_progress)
        _runs(source, target, there, copied)
        _registry(source, target, graph, copied, keys)
    finally:
        pool.shutdown(cancel_futures=True)
    return copied


def _unsigned(source: Store, keys: Keys) -> dict[str, str]:
    """The adapters and bases of signed records that are not signed themselves, each with a sentence."""
    registry, refused = Registry(source, keys), {}
    for concept in registry.concepts() if keys.public else ():
        with suppress(IntegrityError):  # told when the record is not copied
            record = registry.record(concept)
            for path in sorted(published([record] if record else [])):
                try:
                    find(source, path, keys)
                except IntegrityError as error:
                    refused[path] = str(error)
    return refused


def _artifacts(
    source: Store,
    target: Store,
    graph: Graph,
    trusted: Sequence[str],
    there: frozenset[str],
    copied: Copied,
    pool: ThreadPoolExecutor,
    on_progress: Callable[[int, int, str], None],
) -> None:
    """Copy those trusted, in the order they were made in, each one's manifest as soon as its files are there."""
    waiting: list[tuple[Manifest, list[Future[int]]]] = []
    memory = Allowance(MEMORY_BYTES)

    def copy(artifact: Artifact, name: str, key: str) -> int:
        with memory.take(artifact.manifest.files[name].size):
            return _copy_file(artifact, name, target, key in there)

    for path in trusted:
        manifest = graph.manifests[path]
        artifact = Artifact(source, manifest)
        try:
            other = find(target, path) if f"{path}/{MANIFEST}" in there else None
        except IntegrityError as error:
            copied.problems.append(str(error))
            continue
        if other and other.files != manifest.files:
            copied.problems.append(f"{where(target, path)} has other files than {source.url} has: it is left as it is.")
            continue
        lacking = [name for name in manifest.files if f"{path}/{name}" not in there]
        listed = {f"{path}/{name}" for name in (*manifest.files, MANIFEST)}
        beside = [key for key in graph.keys[path] if key not in listed and key not in there]  # receipts, signatures
        if other and not lacking and not beside:
            copied.there += 1
            continue
        names = lacking if other else manifest.files
        futures = [pool.submit(copy, artifact, name, f"{path}/{name}") for name in names]
        futures += [pool.submit(_copy_object, source, target, key) for key in beside]
        waiting.append((manifest, futures))
    total = sum(len(futures) for _, futures in waiting)
    for manifest, futures in waiting:
        problems = []
        for future in futures:
            try:
                copied.size += future.result()
            except (IntegrityError, NotFoundError) as error:  # damaged, or deleted meanwhile
                problems.append(str(error))
            copied.files += 1
            on_progress(copied.files, total, decimal(copied.size))
        copied.problems += problems
        if not problems:
            target.put_if_absent(f"{manifest.path}/{MANIFEST}", dump(manifest))
            copied.artifacts += 1


def _copy_file(artifact: Artifact, name: str, target: Store, there: bool) -> int:
    """Copy a file of an artifact unless the target has it, whole; how many bytes. IntegrityError as `Artifact.read`."""
    key = f"{artifact.manifest.path}/{name}"
    expected = artifact.manifest.files[name]
    with suppress(TooLargeError):
        if there and FileEntry.of(target.get(key, expected.size)) == expected:
            return 0
    data = artifact.read(name)
    target.put(key, data)
    return len(data)


def _copy_object(source: Store, target: Store, key: str) -> int:
    """Copy an object that no manifest lists, such as a receipt; how many bytes."""
    data = source.get(key)
    target.put(key, data)
    return len(data)


def _runs(source: Store, target: Store, there: frozenset[str], copied: Copied) -> None:
    """Copy what runs left. A run belongs to one process, so what the source has is never older."""

    def copy(key: str) -> int:
        data = source.get(key)
        if key in there and target.get(key) == data:
            return 0
        target.put(key, data)
        return len(data)

    copied.size += sum(in_threads(copy, [*source.list("runs/")]))


def _registry(source: Store, target: Store, graph: Graph, copied: Copied, keys: Keys) -> None:
    """Bring the target's records up to the source's."""
    registry = Registry(source, keys)
    for concept in registry.concepts():
        key = f"registry/{concept}.json"
        try:
            data = source.get(key, DOCUMENT_BYTES)
            record = registry.parse(concept, data)
            _check(target, graph, record)
            copied.concepts += _advance(target, key, data, record)
        except (IntegrityError, _ConflictError) as error:
            copied.problems.append(str(error))


class _ConflictError(Exception):
    """Why a record is not copied."""


def _check(target: Store, graph: Graph, record: Entry) -> None:
    """_ConflictError unless the target has the adapter and the base of the latest release, and the same ones."""
    for path in (record.adapter, f"bases/{record.base}"):
        there, here = find(target, path), graph.manifests.get(path)
        if there is None or (here and here.files != there.files):
            raise _ConflictError(
                f"{target.url} did not get version {record.version} of {record.concept}: {path} is not the same there."
            )


def _advance(target: Store, key: str, data: bytes, record: Entry) -> bool:
    """Replace the target's record by a later state of it; whether it was earlier.

    _ConflictError when neither continues the other.
    """
    while True:
        try:
            old, etag = target.get_with_etag(key, DOCUMENT_BYTES)
        except NotFoundError:
            if target.put_if_absent(key, data):
                return True
            continue
        ours, theirs = record.releases, Registry(target).parse(record.concept, old).releases
        shared = min(len(ours), len(theirs))
        if ours[:shared] != theirs[:shared]:
            versions = f"version {theirs[-1].version} there, {ours[-1].version} here"
            raise _ConflictError(f"{where(target, key)} was published to on its own ({versions}): it is left as it is.")
        if len(theirs) >= len(ours):
            return False
        if target.replace_if_match(key, data, etag):
            return True
