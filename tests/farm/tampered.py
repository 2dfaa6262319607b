"""What somebody leaves in a store who may write to it and knows how it is laid out."""

from __future__ import annotations

import json
from typing import Any

from farm.artifacts import MANIFEST, FileEntry
from farm.store import LocalStore


def replace_file(store: LocalStore, path: str, name: str, data: bytes, **entry: Any) -> None:
    """Another file of an artifact, and a manifest that vouches for it. entry: what the manifest says of it instead."""
    store.put(f"{path}/{name}", data)
    edit_manifest(
        store, path, lambda manifest: manifest["files"].update({name: FileEntry.of(data).model_dump() | entry})
    )


def edit_manifest(store: LocalStore, path: str, change: Any) -> None:
    edit_json(store, f"{path}/{MANIFEST}", change)


def edit_json(store: LocalStore, key: str, change: Any) -> None:
    """Change a document in place, or for what `change` returns."""
    document = json.loads(store.get(key))
    changed = change(document)
    store.put(key, json.dumps(document if changed is None else changed).encode())
