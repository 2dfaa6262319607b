"""Reading everything a store refers to again, and saying what is not as it was put there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from rich.filesize import decimal

from farm.artifacts import Artifact, find
from farm.errors import IntegrityError
from farm.graph import Graph, in_packs, in_runs, planned, published, read_graph
from farm.plan import Plan
from farm.registry import Entry, Registry
from farm.signing import NOBODY, Keys
from farm.store import Store, where
from farm.threads import MEMORY_BYTES, Allowance, in_threads


@dataclass
class Verified:
    """What was read, and what is wrong with it, a sentence each. size: bytes."""

    concepts: int = 0
    artifacts: int = 0
    files: int = 0
    size: int = 0
    problems: list[str] = field(default_factory=list)


def verify(
    store: Store, plans: Iterable[Plan], on_progress: Callable[[int, int, str], None], keys: Keys = NOBODY
) -> Verified:
    """Read every release's adapter and base, what runs, packs and the plans refer to, and what all that was made from.

    Of a plan only what is made already; of a run only the adapters that it made. keys: whose signatures records and
    what their releases name have to have (`farm.signing`).
    """
    graph, found = read_graph(store), Verified()
    records = _records(store, found, keys)
    try:
        runs = in_runs(store)
    except IntegrityError as error:
        found.problems.append(str(error))
        runs = set()
    reached = graph.reach(published(records).union(runs, in_packs(graph), *(planned(plan) for plan in plans)))
    found.concepts, found.artifacts = len(records), len(reached)
    found.problems += [graph.damaged[path] for path in sorted(reached & graph.damaged.keys())]
    for record in records:
        found.problems += _problems(record, graph, store.url)
    if keys.public:
        found.problems += filter(None, in_threads(partial(_unsigned, store, keys), sorted(published(records))))
    whole = sorted(reached & graph.manifests.keys())
    for path in whole:
        for name, digest in graph.manifests[path].inputs.items():
            if not graph.folders(digest):
                found.problems.append(
                    f"{where(store, path)} was made from {name} {digest}, which is not there any more."
                )
    memory = Allowance(MEMORY_BYTES)
    files = [(path, name) for path in whole for name in graph.manifests[path].files]

    def read(file: tuple[str, str]) -> str | None:
        path, name = file
        try:
            with memory.take(graph.manifests[path].files[name].size):
                Artifact(store, graph.manifests[path]).read(name)
        except IntegrityError as error:
            return str(error)
        return None

    for (path, name), problem in zip(files, in_threads(read, files), strict=True):
        found.files += 1
        found.size += graph.manifests[path].files[name].size
        on_progress(found.files, len(files), decimal(found.size))
        if problem:
            found.problems.append(problem)
    return found


def _unsigned(store: Store, keys: Keys, path: str) -> str | None:
    """Why the artifact does not count as signed; None where it does, and where it is not there."""
    try:
        find(store, path, keys)
    except IntegrityError as error:
        return str(error)
    return None


def _records(store: Store, found: Verified, keys: Keys) -> list[Entry]:
    """The registry's records that can be read; what is wrong with the others is noted."""
    registry, records = Registry(store, keys), []

    def read(concept: str) -> Entry | str | None:
        try:
            return registry.record(concept)
        except IntegrityError as error:
            return str(error)

    for record in in_threads(read, registry.concepts()):
        if isinstance(record, str):
            found.problems.append(record)
        elif record:
            records.append(record)
    return records


def _problems(record: Entry, graph: Graph, url: str) -> list[str]:
    """What is wrong with a concept's releases themselves, and which of them have no adapter or base."""
    entry = f"{url}/registry/{record.concept}.json"
    problems = []
    versions = [release.version for release in record.releases]
    if versions != list(range(1, len(versions) + 1)):
        problems.append(f"{entry} has the versions {', '.join(map(str, versions))}: restore it.")
    for release in record.releases:
        for path in (release.adapter, f"bases/{release.base}"):
            if path not in graph.manifests and path not in graph.damaged:
                problems.append(
                    f"{entry}: version {release.version} needs {path}, which is not there: copy it from another store "
                    "with `farm sync`, or make it again."
                )
        adapter = graph.manifests.get(release.adapter)
        if adapter and (adapter.digest, adapter.inputs.get("base")) != (release.digest, release.base):
            problems.append(f"{entry}: version {release.version} does not say what {release.adapter} is: restore it.")
    return problems
