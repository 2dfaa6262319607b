"""Garbage: artifacts that no release, run, pack or configuration refers to, and that are old.

Deleting them is safe while a farm runs. What a configuration given here makes is kept, made or not. What belongs to
another one is kept while it is younger than the grace period, together with what it was made from. And should a release
come to name an artifact while it is being deleted, either the collector sees it, since it reads the registry again
between the manifests and the files, and puts the manifest back, or the publisher does, since it looks for the manifest
again after publishing. What is left is a farm whose configuration was not given and that makes an artifact again in the
very moment in which it is deleted as old: a reader then finds files missing, says so, and the next run makes them.

A collection that is killed leaves manifests under another name: the next one puts them back where no file is gone yet,
and goes on deleting where one is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from farm.artifacts import DOCUMENT_BYTES, MANIFEST, Manifest, parse, read
from farm.errors import IntegrityError, UserError
from farm.graph import NO_ARTIFACTS, Graph, in_packs, in_runs, planned, published, read_graph
from farm.leases import Leases
from farm.plan import Plan
from farm.registry import Registry
from farm.store import Store
from farm.threads import in_threads

TOMBSTONE = "deleted.json"
"""What an artifact's manifest is called while its files are deleted."""
TURN = "collection"
"""The turn that collections and copies into a store take: what was copied is referred to only at the end."""


@dataclass(frozen=True)
class Garbage:
    """What may go.

    artifacts: manifests by folder, each before those it was made from. begun: of these, the folders that an earlier
    collection left half deleted. young: how many others are kept for their age alone. unfinished: folders without a
    manifest, and of checkpoints, that belong to no configuration given; nothing says how old they are. keys: the
    objects below every one of these folders. damaged: folders whose manifest cannot be read, which are left alone.
    """

    graph: Graph
    artifacts: dict[str, Manifest]
    begun: frozenset[str]
    young: int
    unfinished: tuple[str, ...]
    keys: dict[str, tuple[str, ...]]
    damaged: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of the artifacts' files."""
        return sum(size_of(manifest) for manifest in self.artifacts.values())


def size_of(manifest: Manifest) -> int:
    """Bytes of an artifact's files."""
    return sum(file.size for file in manifest.files.values())


def find_garbage(store: Store, plans: Iterable[Plan], *, before: datetime) -> Garbage:
    """Look for what was made before that moment and that nothing refers to.

    Raises:
        IntegrityError: something that says what is referred to cannot be read.
    """
    graph = read_graph(store)
    plans = list(plans)
    wanted = _referenced(store, graph).union(*(planned(plan) for plan in plans))
    kept = graph.reach(wanted)
    for path in sorted(kept & graph.damaged.keys()):
        raise IntegrityError(f"What {path} was made from is not known, so nothing is deleted: {graph.damaged[path]}")
    old = {path for path in graph.manifests.keys() - kept if _made(graph.manifests[path]) < before}
    kept_with_young = graph.reach(graph.manifests.keys() - old)
    left = {path: graph.manifests[path] for path in reversed(graph.ordered(old - kept_with_young))}
    bare = {path for path in graph.keys if f"{path}/{MANIFEST}" not in graph.keys[path]}
    begun = {path for path in bare - wanted if f"{path}/{TOMBSTONE}" in graph.keys[path]}
    for path in sorted(begun):
        key = f"{path}/{TOMBSTONE}"
        left[path], _ = read(Manifest, store=store, key=key, fix=f"delete the folder {path}")
    unfinished = {path: graph.keys[path] for path in sorted(bare - wanted - begun)} | _checkpoints(store, plans)
    return Garbage(
        graph=graph,
        artifacts=left,
        begun=frozenset(begun),
        young=len(graph.manifests.keys() - kept - left.keys()),
        unfinished=tuple(unfinished),
        keys=unfinished | {path: graph.keys[path] for path in left},
        damaged=tuple(sorted(graph.damaged)),
    )


def put_back(store: Store) -> None:
    """Undo what a killed collection only began: the manifests it put aside, where all files are still there."""
    keys = set(store.list())
    for tombstone in sorted(key for key in keys if key.endswith(f"/{TOMBSTONE}") and not key.startswith(NO_ARTIFACTS)):
        path = tombstone.rpartition("/")[0]
        data = store.get(tombstone, DOCUMENT_BYTES)
        manifest = parse(Manifest, data, store=store, key=tombstone, fix=f"delete the folder {path}")
        if keys.issuperset(f"{path}/{name}" for name in manifest.files):
            store.put_if_absent(f"{path}/{MANIFEST}", data)
            store.delete(tombstone)


def collect(store: Store, garbage: Garbage, on_progress: Callable[[int, int], None]) -> list[str]:
    """Delete the artifacts; return the folders of those that were published meanwhile and are kept.

    First every manifest is put aside, adapters before their base, so that no artifact is seen in part; then the
    registry is read again; then the files go.
    """
    for path in garbage.artifacts:
        if path not in garbage.begun:
            store.put(f"{path}/{TOMBSTONE}", store.get(f"{path}/{MANIFEST}", DOCUMENT_BYTES))
            store.delete(f"{path}/{MANIFEST}")
    wanted = garbage.graph.reach(_referenced(store, garbage.graph))
    rescued = [path for path in garbage.artifacts if path in wanted]
    for path in reversed(rescued):
        store.put_if_absent(f"{path}/{MANIFEST}", store.get(f"{path}/{TOMBSTONE}", DOCUMENT_BYTES))
        store.delete(f"{path}/{TOMBSTONE}")
    doomed = [path for path in garbage.artifacts if path not in rescued]
    for done, _ in enumerate(in_threads(lambda path: _delete(store, path, garbage.keys[path]), doomed), 1):
        on_progress(done, len(doomed))
    return rescued


def delete_unfinished(store: Store, garbage: Garbage) -> None:
    """Delete the folders without a manifest, and the checkpoints.

    Raises:
        UserError: somebody is at work in this store, and could be making one of them.
    """
    for folder in ("queue/turns/", "queue/adapters/leases/"):
        leases = Leases(store, folder)
        for key in store.list(folder):
            name = key.removeprefix(folder).removesuffix(".json")
            if name != TURN and (hold := leases.look(name)):
                raise UserError(
                    f"{hold.owner} is at work on {name} in {store.url}: delete unfinished work when it is done."
                )
    for _ in in_threads(lambda path: _delete(store, path, garbage.keys[path]), garbage.unfinished):
        pass


def _delete(store: Store, path: str, keys: Sequence[str]) -> None:
    """Delete a folder, receipts first (without its receipt a unit is made again) and the tombstone last."""
    if store.exists(f"{path}/{MANIFEST}"):  # made again meanwhile
        store.delete(f"{path}/{TOMBSTONE}")
        return
    others = [key for key in keys if key not in (f"{path}/{MANIFEST}", f"{path}/{TOMBSTONE}")]
    for key in sorted(others, key=lambda key: not key.startswith(f"{path}/receipts/")):
        store.delete(key)
    store.delete(f"{path}/{TOMBSTONE}")


def _referenced(store: Store, graph: Graph) -> set[str]:
    return published(Registry(store).records().values()) | in_runs(store) | in_packs(graph)


def _checkpoints(store: Store, plans: Sequence[Plan]) -> dict[str, tuple[str, ...]]:
    """The objects below each folder of `scratch/` and `live/` that is of no plan's base, ranks or adapters."""
    digests = {path.rpartition("/")[2] for plan in plans for path in planned(plan)}
    found: dict[str, tuple[str, ...]] = {}
    for key in (*store.list("live/"), *store.list("scratch/")):
        folder = "/".join(key.split("/")[:2])
        if folder.rpartition("-")[2] not in digests:
            found[folder] = (*found.get(folder, ()), key)
    return found


def _made(manifest: Manifest) -> datetime:
    return datetime.fromisoformat(manifest.created_at)
