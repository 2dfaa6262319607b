"""What a store's artifacts were made from, and what still refers to them.

A manifest names its inputs by digest, so the manifests of a store together say what everything was made from, back to
the photographs.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from graphlib import TopologicalSorter

from pydantic import TypeAdapter, ValidationError

from farm.artifacts import DOCUMENT_BYTES, MANIFEST, Manifest, find
from farm.errors import IntegrityError
from farm.plan import Plan
from farm.registry import Entry
from farm.store import Store, where
from farm.threads import in_threads

NO_ARTIFACTS = ("queue/", "registry/", "runs/", "live/", "scratch/", "glance/", "probe/", "costs/")
"""Where the store keeps other things than artifacts."""
_PATHS = TypeAdapter(list[str])
_FOLDER = re.compile(r"((?:[^/]+/)+[0-9a-f]{32})/.+")


@dataclass(frozen=True)
class Graph:
    """The artifacts of a store, by folder, as one listing found them.

    keys: all objects below the folder of an artifact, also of one that is not finished and so has no manifest.
    manifests: of all artifacts. damaged: why a manifest cannot be read.
    """

    keys: Mapping[str, tuple[str, ...]]
    manifests: Mapping[str, Manifest]
    damaged: Mapping[str, str]

    @cached_property
    def _folders(self) -> dict[str, list[str]]:
        """The folders of the artifacts of a digest: the same thing made for two concepts has two."""
        folders = defaultdict(list)
        for path in sorted({*self.manifests, *self.damaged}):
            folders[path.rpartition("/")[2]].append(path)
        return folders

    def folders(self, digest: str) -> list[str]:
        """Where the artifact of this digest is; none where it is not in the store."""
        return self._folders.get(digest, [])

    def input_folder(self, name: str, digest: str) -> str | None:
        """Where an input is, by its name and digest: that of its own concept where several have the same digest."""
        folders = self.folders(digest)
        return next((path for path in folders if path.startswith(f"{name}/")), folders[0] if folders else None)

    def made_from(self, path: str) -> set[str]:
        """The folders of the artifact's inputs, as far as they are there."""
        manifest = self.manifests.get(path)
        digests = manifest.inputs.values() if manifest else ()
        return {folder for digest in digests for folder in self.folders(digest)}

    def reach(self, paths: Iterable[str]) -> set[str]:
        """Those of the folders that hold artifacts, with everything they were made from."""
        reached: set[str] = set()
        waiting = [path for path in paths if path in self.manifests or path in self.damaged]
        while waiting:
            path = waiting.pop()
            if path not in reached:
                reached.add(path)
                waiting += self.made_from(path)
        return reached

    def ordered(self, paths: Iterable[str]) -> list[str]:
        """The folders, each after those it was made from."""
        paths = set(paths)
        return list(TopologicalSorter({path: self.made_from(path) & paths for path in sorted(paths)}).static_order())


def read_graph(store: Store) -> Graph:
    """List the store once and read all its manifests."""
    keys = defaultdict(list)
    for key in store.list():
        if not key.startswith(NO_ARTIFACTS) and (match := _FOLDER.fullmatch(key)):
            keys[match[1]].append(key)
    manifests: dict[str, Manifest] = {}
    damaged: dict[str, str] = {}

    def read(path: str) -> Manifest | IntegrityError | None:
        try:
            return find(store, path)
        except IntegrityError as error:
            return error

    finished = [path for path, found in keys.items() if f"{path}/{MANIFEST}" in found]
    for path, manifest in zip(finished, in_threads(read, finished), strict=True):
        if isinstance(manifest, IntegrityError):
            damaged[path] = str(manifest)
        elif manifest is not None:
            manifests[path] = manifest
    return Graph({path: tuple(found) for path, found in keys.items()}, manifests, damaged)


def published(records: Iterable[Entry]) -> set[str]:
    """The folders that releases name, also earlier ones and those taken out of service."""
    releases = [release for record in records for release in record.releases]
    return {path for release in releases for path in (release.adapter, f"bases/{release.base}")}


def in_runs(store: Store) -> set[str]:
    """The adapters that finished runs ended with. IntegrityError where a run's list of them is damaged."""

    def read(key: str) -> list[str]:
        try:
            return _PATHS.validate_json(store.get(key, DOCUMENT_BYTES))
        except ValidationError as error:
            run, why = key.rpartition("/")[0], error.errors(include_input=False)[0]["msg"]
            raise IntegrityError(f"{where(store, key)} is damaged ({why}): delete the folder {run}.") from error

    plans = [key for key in store.list("runs/") if key.endswith("/plan.json")]
    return {path for paths in in_threads(read, plans) for path in paths}


def in_packs(graph: Graph) -> set[str]:
    """The packs."""
    return {path for path in graph.manifests.keys() | graph.damaged.keys() if path.startswith("packs/")}


def planned(plan: Plan) -> set[str]:
    """The folders of all that a farm makes, made or not."""
    specs = [plan.sources, plan.selection, plan.base, plan.ranks]
    if plan.config.base.representatives is not None:
        specs.append(plan.representatives)
    for concept in plan.config.catalogue:
        specs += [plan.edits(concept.id), plan.quality(concept.id), plan.adapter(concept.id)]
        if plan.compared(concept.id):
            specs.append(plan.comparison(concept.id))
    return {spec.path for spec in specs}
