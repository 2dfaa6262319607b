"""Where an artifact comes from: its manifests, walked back to the prompt, the teacher and the photographs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.tree import Tree

from farm.artifacts import Artifact, Manifest
from farm.errors import UserError
from farm.graph import Graph, read_graph
from farm.registry import Registry, Release
from farm.spelling import near
from farm.store import Store

FEWEST_DIGITS = 6
SHOWN_IDS = 3
"""Source ids in the tree; all of them are in the JSON."""


@dataclass(frozen=True)
class Lineage:
    """An artifact and everything it was made from.

    release: that of a published concept. ids: of the source images edited, by folder of the selection and split.
    """

    graph: Graph
    path: str
    release: Release | None
    ids: Mapping[str, Mapping[str, list[str]]]

    def document(self) -> dict[str, Any]:
        """`{"path", "release", "artifacts": {folder: {…, "inputs": {name: folder or None}}}}`, inputs first.

        An input that is not in the store any more is None. What each artifact says beside its manifest: a selection
        its `source_ids` by split, and edits their `teacher`, as it was fingerprinted.
        """
        release = self.release.model_dump() if self.release else None
        artifacts = {path: self._facts(path) for path in self.graph.ordered(self.graph.reach([self.path]))}
        return {"path": self.path, "release": release, "artifacts": artifacts}

    def tree(self) -> Tree:
        """The same for people. What was said above, seed and packages too, is not said again."""
        root = Tree(self._label(self.path))
        if self.release:
            release = self.release
            said = f"version {release.version}, {release.action} {release.published_at} by {release.published_by}"
            forced = f", forced: {release.forced}" if release.forced else ""
            root.add(escape(said + forced))
        self._grow(root, self.path, set())
        return root

    def _grow(self, node: Tree, path: str, shown: set[str]) -> None:
        shown.add(path)
        manifest = self.graph.manifests.get(path)
        if manifest is None:
            node.add(escape(self.graph.damaged[path]))
            return
        for line in (*self._code(manifest), *self._lines(manifest)):
            node.add(escape(line))
        for name, digest in manifest.inputs.items():
            folder = self.graph.input_folder(name, digest)
            if folder is None:
                node.add(escape(f"{name} {digest}, which is not in the store any more"))
            elif folder in shown:
                node.add(escape(f"{folder} (above)"))
            else:
                self._grow(node.add(self._label(folder)), folder, shown)

    def _label(self, path: str) -> str:
        manifest = self.graph.manifests.get(path)
        made = f"{manifest.created_at} (stage's version {manifest.version})" if manifest else "damaged"
        return f"[bold]{escape(path)}[/]  {made}"

    def _code(self, manifest: Manifest) -> list[str]:
        """The seed and the packages, where they are not those of the whole."""
        whole = self.graph.manifests[self.path]
        lines = [] if manifest is not whole and manifest.seed == whole.seed else [f"seed: {manifest.seed}"]
        if manifest is whole or manifest.packages != whole.packages:
            lines.append("packages: " + ", ".join(f"{name} {version}" for name, version in manifest.packages.items()))
        return lines

    def _lines(self, manifest: Manifest) -> list[str]:
        lines, config, summary = [], manifest.config, manifest.summary
        if "prompt" in config:
            lines.append(f"prompt: {config['prompt']}")
        if teacher := self._teacher(manifest):
            facts = (f"{key} {short(value)}" for key, value in teacher["fingerprint"].items())
            lines.append(f"teacher {teacher['name']}: {', '.join(facts)}")
        if "concepts" in config:
            lines.append(f"concepts: {', '.join(config['concepts']) or 'chosen among those below'}")
        if "good" in summary:
            lines.append(f"{summary['good']} of {summary['images']} edits are good")
        if manifest.path in self.ids:
            for split, ids in self.ids[manifest.path].items():
                lines.append(
                    f"{split}: {len(ids)} images: {', '.join(ids[:SHOWN_IDS])}{', …' * (len(ids) > SHOWN_IDS)}"
                )
        if "photos" in summary:
            lines.append(f"{summary['photos']} photographs, {summary['images']} images")
        return lines

    def _facts(self, path: str) -> dict[str, Any]:
        manifest = self.graph.manifests.get(path)
        if manifest is None:
            return {"damaged": self.graph.damaged[path]}
        facts = manifest.model_dump(exclude={"path", "inputs"})
        facts["inputs"] = {name: self.graph.input_folder(name, digest) for name, digest in manifest.inputs.items()}
        if path in self.ids:
            facts["source_ids"] = self.ids[path]
        if teacher := self._teacher(manifest):
            facts["teacher"] = teacher
        return facts

    def _teacher(self, edits: Manifest) -> dict[str, Any] | None:
        """Who made the edits, `{"name", "fingerprint"}`; None for another artifact, or where the comparison is gone."""
        name = edits.summary.get("teacher")
        if edits.stage != "edits" or name is None:
            return None
        fingerprint = edits.config.get("editor")
        if fingerprint is None:
            folder = self.graph.input_folder("comparison", edits.inputs["comparison"])
            comparison = self.graph.manifests.get(folder or "")
            if comparison is None:
                return None
            fingerprint = comparison.config["teachers"][name]
        return {"name": name, "fingerprint": fingerprint}


def trace(store: Store, name: str) -> Lineage:
    """The lineage of a concept's latest release, or else of its newest adapter, or of the artifact with a digest.

    name: a concept's id, an artifact's folder, or the first digits of a digest, at least FEWEST_DIGITS.

    Raises:
        UserError: there is no such thing, or there are several.
    """
    graph, registry = read_graph(store), Registry(store)
    known = registry.concepts()
    record = registry.record(name) if name in known else None
    path = record.adapter if record else _find(graph, name, known, store.url)
    release = record.releases[-1] if record else None
    if path not in graph.manifests and path not in graph.damaged:
        raise UserError(
            f"{store.url} holds no {path}, which {name} was published as: `farm verify` says what else is gone."
        )
    ids = {
        folder: json.loads(Artifact(store, graph.manifests[folder]).read("selection.json"))
        for folder in graph.reach([path])
        if folder in graph.manifests and graph.manifests[folder].stage == "selection"
    }
    return Lineage(graph, path, release, ids)


def _find(graph: Graph, name: str, concepts: tuple[str, ...], url: str) -> str:
    paths = sorted({*graph.manifests, *graph.damaged})
    if name in paths:
        return name
    if adapters := [path for path in graph.manifests if path.startswith(f"adapters/{name}/")]:
        return max(adapters, key=lambda path: graph.manifests[path].created_at)
    if re.fullmatch("[0-9a-f]+", name):
        if len(name) < FEWEST_DIGITS:
            raise UserError(f"{name!r} is too short for a digest: give {FEWEST_DIGITS} digits of it or more.")
        found = [path for path in paths if path.rpartition("/")[2].startswith(name)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"{name} is ambiguous in {url}: give one of {', '.join(found)}.")
        raise UserError(f"{url} holds no artifact whose digest begins with {name}.")
    known = {*concepts, *(path.split("/")[1] for path in paths if path.startswith("adapters/"))}
    raise UserError(f"{name!r} is neither a concept with an adapter in {url} nor a digest; {near(name, known)}")


def short(value: Any) -> str:
    """A setting of a teacher, hashes cut short."""
    if isinstance(value, dict):
        return " ".join(f"{key} {short(inner)}" for key, inner in value.items())
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{20,}\b", r"\1", str(value))
