"""One pack: built concept by concept, run as a phone would run it, and committed with its certificate."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from torch import Tensor

from e2gan.export.builders import Builder, Templates, builder, function_in
from e2gan.export.libraries import coremltools, onnx
from e2gan.export.mlpackage import Part
from e2gan.export.parity import LIMITS, Judged, certificate, judge, server_edits, shown
from e2gan.infer import base_generator
from e2gan.model import Generator
from e2gan.pairs import Image, to_tensor
from farm.artifacts import FileEntry, Manifest, commit, find, open_artifact
from farm.errors import StoreError, UserError
from farm.files import make_folder
from farm.packs import Member, Pack
from farm.signing import NOBODY, Keys
from farm.stages.ingest import source_images
from farm.stages.pictures import picture_sheet
from farm.store import NotFoundError, Store, where
from farm.weights import read_adapter, read_base

PHOTOS = 4
"""Photographs that every concept of a pack is judged on."""
SHEET = 16
"""Concepts in the certificate's picture: those that are furthest off."""
CERTIFICATE, PACK, PICTURES = "certificate.json", "pack.json", "parity.webp"

OnProgress = Callable[[int, int, str], None]


class EmptyPackError(UserError):
    """No concept of a pack could be exported. left_out: why, by concept."""

    def __init__(self, left_out: dict[str, str]) -> None:
        reasons = "; ".join(f"{concept}: {reason}" for concept, reason in left_out.items())
        super().__init__(f"no pack is published, for none of its concepts can be exported: {reasons}.")
        self.left_out = left_out


@dataclass
class _Made:
    """A pack in a folder, not yet judged. left_out: why a concept is not in it."""

    builder: Builder
    parts: dict[str, Part] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    left_out: dict[str, str] = field(default_factory=dict)


def export(
    store: Store,
    pack: Pack,
    on_progress: OnProgress = lambda done, total, what: None,
    keys: Keys = NOBODY,
) -> Manifest:
    """Commit `packs/<digest>`, or find it there: the models, `pack.json`, `certificate.json` and `parity.webp`.

    A concept that cannot be exported, or that a phone would not edit as the server does, is left out;
    `summary["left_out"]` says why. keys: those that base and adapters have to be signed by.

    Raises:
        EmptyPackError: that was every one of them.
        UserError: the base, the photographs or the pack to go on from are not in the store, it came out larger than
            its budget, or the extra `export` is not installed.
    """
    if done := find(store, pack.spec.path):
        return done
    started = time.monotonic()
    try:
        onnx() if pack.format == "onnx" else coremltools()
    except ValueError as error:
        raise UserError(f"farm export: {error}.") from error
    base = base_generator(*read_base(store, f"bases/{pack.base}", keys))
    photos = _photos(store, pack)
    templates = Templates(base, side=pack.side, shape=pack.shape)
    failed: dict[str, str] = {}
    steps, step = 2 * len(pack.members), 0

    def told(what: str) -> None:
        nonlocal step
        step = min(step + 1, steps)
        on_progress(step, steps, what)

    with tempfile.TemporaryDirectory() as scratch:
        while True:
            folder = Path(scratch) / f"pack{len(failed)}"
            folder.mkdir()
            members = [member for member in pack.members if member.concept not in failed]
            made = _build(store, pack, members, templates, folder, Path(scratch), told, keys)
            failed |= made.left_out
            judged = _judge(store, pack, base, made, members, photos, told, keys)
            bad = {name: one.reason for name, one in judged.items() if one.reason}
            if not bad:
                break
            failed |= {name: str(reason) for name, reason in bad.items()}  # and without them again
            if len(failed) == len(pack.members):
                raise EmptyPackError(failed)
        return _commit(store, pack, made, judged, failed, folder, started)


def _build(
    store: Store,
    pack: Pack,
    members: Sequence[Member],
    templates: Templates,
    folder: Path,
    scratch: Path,
    told: Callable[[str], None],
    keys: Keys,
) -> _Made:
    old = open_artifact(store, f"packs/{pack.since}").manifest if pack.since else None
    since = scratch / "since" if old else None
    if old and since and not since.exists():
        fetch(store, old, since)
    before = {row["concept"]: row["adapter"] for row in old.summary["concepts"]} if old else {}
    made = _Made(builder(pack.format, folder, templates, since=since))
    for member in members:
        try:
            if before.get(member.concept) == member.digest:
                made.parts[member.concept] = made.builder.keep(member.concept)
                made.kept.add(member.concept)
            else:
                adapter, text = read_adapter(store, member.adapter, pack.base, templates.base.config, keys)
                made.parts[member.concept] = made.builder.add(member.concept, adapter, text)
        except StoreError:
            raise
        except (UserError, NotFoundError, ValueError) as error:
            made.left_out[member.concept] = str(error).rstrip(".")
        told(member.concept)
    if not made.parts:
        raise EmptyPackError(made.left_out)
    made.builder.close()
    return made


def _judge(
    store: Store,
    pack: Pack,
    base: Generator,
    made: _Made,
    members: Sequence[Member],
    photos: Tensor,
    told: Callable[[str], None],
    keys: Keys,
) -> dict[str, Judged]:
    judged, limit = {}, LIMITS[pack.shape.precision]
    for member in members:
        if member.concept in made.parts:
            adapter, text = read_adapter(store, member.adapter, pack.base, base.config, keys)
            expected = server_edits(base, adapter, text, photos)
            judged[member.concept] = judge(made.builder.editor(member.concept), expected, photos, limit=limit)
            told(member.concept)
    return judged


def _commit(
    store: Store,
    pack: Pack,
    made: _Made,
    judged: dict[str, Judged],
    failed: dict[str, str],
    folder: Path,
    started: float,
) -> Manifest:
    rows = [
        {
            "concept": member.concept,
            "adapter": member.digest,
            "function": function_in(pack.format, member.concept),
            "weights_bytes": made.parts[member.concept].weights,
            "program_bytes": made.parts[member.concept].program,
            "new": member.concept not in made.kept,
            **judged[member.concept].parity.document(),
        }
        for member in pack.members
        if member.concept in made.parts
    ]
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    size = sum(path.stat().st_size for path in paths.values())
    if pack.budget is not None and size > pack.budget:
        raise UserError(f"--max-mb: the pack came out at {size / 1e6:.2f} MB, over {pack.budget / 1e6:g}; allow more.")
    document = {
        "format": pack.format,
        "side": pack.side,
        "precision": pack.shape.precision,
        "rank_cap": pack.shape.cap,
        "base": pack.base,
        "since": pack.since,
        "input": "image",
        "output": "edited",
        "bytes": size,
        "concepts": rows,
    }
    proof = certificate(judged, limit=LIMITS[pack.shape.precision], photos=PHOTOS, computed=made.builder.computed)
    worst = dict(sorted(judged.items(), key=lambda item: item[1].parity.lowest)[:SHEET])
    files: dict[str, bytes | FileEntry] = {
        PACK: _json(document),
        CERTIFICATE: _json(proof),
        PICTURES: picture_sheet(shown(worst)),
    }
    for name, path in paths.items():
        data = path.read_bytes()  # one file at a time
        store.put(f"{pack.spec.path}/{name}", data)
        files[name] = FileEntry.of(data)
    summary: dict[str, Any] = {**document, "left_out": failed, "parts": parts(rows, paths)}
    return commit(store, pack.spec, files, wall_seconds=round(time.monotonic() - started, 3), summary=summary)


def parts(rows: Sequence[dict[str, Any]], paths: dict[str, Path]) -> dict[str, int]:
    """Bytes by part: the base's weights, what the concepts add to them, and everything else."""
    weights = sum(path.stat().st_size for name, path in paths.items() if name.endswith(".bin"))
    rest = sum(path.stat().st_size for path in paths.values()) - weights
    if any(name.endswith(".onnx") for name in paths):
        concepts = sum(row["weights_bytes"] for row in rows)
        return {"base": weights, "concepts": concepts, "programs": rest - concepts}
    added = [row["weights_bytes"] for row in rows]
    one = min(added)  # the first concept's part has the base in it
    return {"base": weights - one * len(rows), "concepts": one * len(rows), "programs": rest}


def _photos(store: Store, pack: Pack) -> Tensor:
    """Source images, spread over all of them, at the pack's size: uint8 `[n, 3, side, side]`."""
    try:
        images = source_images(store, pack.sources)
    except NotFoundError as error:
        raise UserError(
            f"{where(store, pack.sources)} is not there, and packs are judged on its photographs; run `farm run`."
        ) from error
    ids = sorted(images)
    chosen = [images[ids[n * len(ids) // PHOTOS]] for n in range(PHOTOS)]
    return to_tensor(_resized(image, pack.side) for image in chosen)


def _resized(image: Image, side: int) -> Image:
    picture = PIL.Image.fromarray(image).resize((side, side), PIL.Image.Resampling.LANCZOS)
    return np.asarray(picture)


def fetch(store: Store, pack: Manifest, folder: Path) -> list[Path]:
    """Write a pack's files below a folder, each checked against the manifest.

    Raises:
        UserError: the folder cannot be written.
    """
    from farm.files import write_whole

    artifact, written = open_artifact(store, pack.path), []
    for name in pack.files:
        path = folder / name
        make_folder(path.parent)
        write_whole(path, artifact.read(name))
        written.append(path)
    return written


def _json(document: object) -> bytes:
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()
