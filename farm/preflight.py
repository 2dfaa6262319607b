"""What can be known before a farm's first run without Ray: its store, its disk, the models its workers load."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rich.filesize import decimal

from farm.artifacts import find
from farm.editors.diffusion import DiffusionSettings, pinned
from farm.errors import UserError
from farm.plan import Plan
from farm.store import LocalStore, Store
from farm.todo import make_todo

State = Literal["ok", "warning", "error"]

PNG_BYTES = 2
"""Of a pixel, about: photographs take 1.5 to 2."""
WORKING_BYTES = 512 * 10**6
"""For checkpoints, weights and reports, about."""


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, and what was found. error: a run would fail. warning: it would go on."""

    what: str
    state: State
    found: str


@dataclass(frozen=True)
class Weights:
    """A model that workers of `stages` load. model: a path or a hub id. key: where the configuration names it."""

    key: str
    model: str
    revision: str | None
    stages: tuple[str, ...]


def check_store(store: Store) -> Check:
    """Every operation of the store once, on an object under `probe/`."""
    key = f"probe/{uuid.uuid4().hex}"
    started = time.monotonic()
    try:
        broken = next((promise for promise, kept in _promises(store, key) if not kept), None)
        store.delete(key)
    except UserError as error:
        return Check("store", "error", str(error))
    except OSError as error:
        return Check("store", "error", f"{store.url}: {error}; it must allow files to be locked and linked.")
    if broken:
        return Check("store", "error", f"{store.url} {broken}; use a local disk or NFS 4.1 or newer.")
    milliseconds = 1000 * (time.monotonic() - started) / 9
    return Check("store", "ok", f"{store.url} reads, writes and swaps, {milliseconds:.1f} ms an operation")


def _promises(store: Store, key: str) -> Iterator[tuple[str, bool]]:
    yield "did not write a new object", store.put_if_absent(key, b"first")
    yield "wrote a new object over another", not store.put_if_absent(key, b"second")
    data, etag = store.get_with_etag(key)
    yield "gave back other bytes than were put", data == b"first"
    yield "did not replace an object that had not changed", store.replace_if_match(key, b"third", etag)
    yield "replaced an object that had changed", not store.replace_if_match(key, b"fourth", etag)
    store.put(key, b"fifth")
    yield "gave back the bytes of before", store.get(key) == b"fifth"
    yield "does not list an object that is there", key in store.list("probe/")
    store.delete(key)
    yield "still has an object that was deleted", not store.exists(key)


def check_disk(store: LocalStore, plan: Plan) -> Check:
    """The free space of the store's disk against what is still to be written, roughly."""
    free = shutil.disk_usage(store.root).free
    todo = make_todo(store, plan)
    config = plan.config
    images = len(plan.photos["photos"]) * config.sources.crops_per_photo
    split = config.sources.split
    trained = min(config.selection.clusters or images, round(images * split.train))
    chosen = trained + round(images * (split.validation + split.test))
    sets = len(todo.edits) * chosen + (images if find(store, plan.sources.path) is None else 0)
    need = sets * config.sources.size**2 * PNG_BYTES + (WORKING_BYTES if todo else 0)
    left = f"{decimal(free)} free, about {decimal(need)} still to be written"
    if free < need:
        fix = "free space, or name a store on a larger disk"
        return Check("disk", "error", f"{left} ({len(todo.edits)} concepts of {chosen} images): {fix}.")
    if free < 2 * need:
        return Check("disk", "warning", f"{left}: that is close, and others may write there too.")
    return Check("disk", "ok", left)


def weights_of(plan: Plan) -> list[Weights]:
    """The models that workers load from their own machine; not those that they may download."""
    config = plan.config
    found = []
    for concept in config.catalogue:
        for name, editor in config.candidates(concept.id).items():
            key = f"catalogue: {concept.id}: editor" if concept.editor is not None else f"teachers.{name}"
            if editor.kind == "onnx":
                found.append(Weights(f"{key}.path", editor.path, None, ("edit",)))
            elif isinstance(editor, DiffusionSettings) and not editor.download:
                exact = pinned(editor, plan.teachers[concept.id][name])
                for field, revision in (
                    ("model", "revision"),
                    ("controlnet", "controlnet_revision"),
                    ("depth_model", "depth_revision"),
                ):
                    if model := getattr(exact, field, None):
                        found.append(Weights(f"{key}.{field}", model, getattr(exact, revision), ("edit",)))
    for key, path, stages in (
        ("quality.clip", config.quality.clip, ("edit",)),
        ("text.path", config.text.path, ("base", "ranks", "adapters")),
        ("evaluation.inception", config.evaluation.inception, ("base", "ranks", "adapters")),
    ):
        if path is not None:
            found.append(Weights(key, path, None, stages))
    return list({(weights.model, weights.revision): weights for weights in reversed(found)}.values())[::-1]
