"""`farm export`: published concepts as packs that an app for phones takes in."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from farm.errors import StoreError, UserError
from farm.options import Config, Json, Override, load_config, naming, resumable
from farm.spelling import near

if TYPE_CHECKING:
    from farm.artifacts import Manifest
    from farm.packs import Pack
    from farm.registry import Entry, Registry
    from farm.signing import Keys
    from farm.store import Store

PackFormat = Annotated[
    Literal["coreml", "coreml-single", "onnx"],
    typer.Option("--format", help="coreml: iOS 18 and later; coreml-single: iOS 16, a package a concept; onnx."),
]
Chosen = Annotated[
    list[str] | None, typer.Option("--concepts", metavar="ID,…", help="These concepts; repeatable.", show_default=False)
]
Everything = Annotated[bool, typer.Option("--all", help="Every published concept.")]
MaxMb = Annotated[
    float | None, typer.Option("--max-mb", help="The most a pack may take; several are made where one is too small.")
]
Precision = Annotated[
    Literal["fp16", "int8", "8bit", "6bit", "4bit"] | None,
    typer.Option("--precision", help="Of the base's weights; default fp16, or what --max-mb has room for."),
]
Side = Annotated[int | None, typer.Option("--side", min=16, help="Side of the images in px; default sources.size.")]
Out = Annotated[Path | None, typer.Option("--out", help="Write the packs below this folder too.", show_default=False)]
Since = Annotated[
    str | None,
    typer.Option("--since", metavar="PACK", help="Go on from this pack; --out then gets only what changed."),
]

OnRay = Annotated[bool, typer.Option("--ray", help="Each pack as a Ray task; jobs/export_mobile.py is this.")]


def export(
    config: Config,
    format: PackFormat = "coreml",
    concepts: Chosen = None,
    everything: Everything = False,
    max_mb: MaxMb = None,
    precision: Precision = None,
    side: Side = None,
    out: Out = None,
    since: Since = None,
    on_ray: OnRay = False,
    override: Override = None,
    as_json: Json = False,
) -> None:
    """Published concepts as packs for phones, each run and held against the server's edits before it is published.

    Exits with 1 when a concept was left out. What is there already is not made again.
    """
    from e2gan.export.budget import Shape
    from farm.artifacts import find
    from farm.files import make_folder
    from farm.packs import plan_packs, update_of
    from farm.plan import make_plan
    from farm.registry import Registry
    from farm.signing import open_keys
    from farm.store import open_store

    loaded = load_config(config, override or [])
    with naming(config):
        store = open_store(loaded.store, loaded.cluster.store_patience_seconds)
        plan = make_plan(loaded)
        keys = open_keys(None, loaded.signing.public_keys)
    side = side or loaded.sources.size
    if side % 8:
        raise UserError(f"--side: {side} is not a multiple of 8, which the network needs; take {side // 8 * 8 or 16}.")
    if max_mb is not None and not max_mb > 0:
        raise UserError(f"--max-mb: {max_mb:g} is no size; give megabytes.")
    if max_mb is not None and format == "coreml-single":
        raise UserError("--max-mb: coreml-single makes a package a concept, which --precision makes smaller; use that.")
    if format == "onnx" and precision not in (None, "fp16", "int8"):
        raise UserError(f"--precision {precision}: ONNX models have fp16 or int8 weights; take one of these.")
    if out is not None:
        make_folder(out)
    entries = _chosen(Registry(store, keys), concepts or [], everything)
    packs = plan_packs(
        store,
        entries,
        format=format,
        side=side,
        sources=plan.sources.path,
        shape=Shape(precision=precision) if precision else None,
        budget=None if max_mb is None else int(max_mb * 1e6),
    )
    if since is not None:
        if len(packs) > 1:
            raise UserError("--since: these concepts make several packs; name the concepts of one of them.")
        packs = [update_of(store, packs[0], since)]
    there = {pack: manifest for pack in packs if (manifest := find(store, pack.spec.path))}
    missing = [pack for pack in packs if pack not in there]
    made: dict[Pack, Manifest] = {}
    failures: list[str] = []
    if missing:
        made, failures = _on_ray(loaded, store, missing, keys) if on_ray else _here(store, missing, keys)
    rows = []
    for pack in packs:
        manifest = there.get(pack) or made.get(pack)
        if manifest is None:
            continue
        folder = _write(store, pack, manifest, out) if out is not None else None
        rows.append({"pack": manifest.digest, "path": manifest.path, "out": folder, **manifest.summary})
    if as_json:
        print(json.dumps({"packs": rows, "failures": failures}, indent=1))
    else:
        for row in rows:
            print("\n".join(_told(row)))
        for failure in failures:
            print(failure)
    if failures or any(row["left_out"] for row in rows):
        raise typer.Exit(1)


def _here(store: Store, packs: list[Pack], keys: Keys) -> tuple[dict[Pack, Manifest], list[str]]:
    from farm.progress import Screen
    from farm.stages.export import export as build

    made: dict[Pack, Manifest] = {}
    failures = []
    with resumable(), Screen().bar("export") as bar:
        for pack in packs:
            try:
                made[pack] = build(store, pack, bar.update, keys)
            except StoreError:
                raise
            except UserError as error:
                failures.append(str(error))
    return made, failures


def _on_ray(loaded: Any, store: Store, packs: list[Pack], keys: Keys) -> tuple[dict[Pack, Manifest], list[str]]:
    from farm.cluster import connected
    from farm.cluster.packing import export_packs
    from farm.progress import Screen

    with (
        resumable(loaded.cluster.grace_seconds) as stop,
        connected(loaded.cluster),
        Screen().bar("export") as bar,
    ):
        made, failed = export_packs(store, packs, loaded.cluster, bar, stop, keys)
    return made, [failure.traceback or failure.message for failure in failed.values()]


def _chosen(registry: Registry, concepts: list[str], everything: bool) -> list[Entry]:
    names, url = dict.fromkeys(name for given in concepts for name in given.split(",") if name), registry.store.url
    if bool(names) == everything:
        raise UserError("farm export: name concepts with --concepts or say --all, one of the two.")
    if everything and not (published := registry.list()):
        raise UserError(f"farm export: nothing is published in {url}; `farm run` makes and publishes adapters.")
    if everything:
        return list(published.values())
    entries, known = [], registry.concepts()
    for name in names:
        entry = registry.get(name) if name in known else None
        if entry is None:
            raise UserError(f"--concepts: {name!r} is not published in {url}; {near(name, known)}")
        entries.append(entry)
    return entries


def _write(store: Store, pack: Pack, manifest: Manifest, out: Path) -> str:
    """Write the pack, or what changed since another, below `out`; the folder's path."""
    from e2gan.export.builders import PACKAGE
    from e2gan.export.update import write_update
    from farm.files import make_folder
    from farm.packs import find_pack
    from farm.stages.export import fetch

    folder = out / f"{manifest.config['format']}-{manifest.digest[:12]}"
    if pack.since is None:
        fetch(store, manifest, folder)
        return str(folder)
    new = {row["function"] for row in manifest.summary["concepts"] if row["new"]}
    with tempfile.TemporaryDirectory() as scratch:
        old, whole = Path(scratch) / "old", Path(scratch) / "new"
        fetch(store, manifest, whole)
        make_folder(folder)
        papers = [path for path in whole.iterdir() if path.suffix in (".json", ".webp") or path.name in new]
        for path in papers:
            (folder / path.name).write_bytes(path.read_bytes())
        if pack.format == "coreml":
            fetch(store, find_pack(store, pack.since), old)
            write_update(old / PACKAGE, whole / PACKAGE, folder)
    return str(folder)


def _told(row: dict[str, Any]) -> list[str]:
    """What became of a pack, in a few lines."""
    concepts, parts = row["concepts"], row["parts"]
    worst = min(concepts, key=lambda concept: concept["psnr_worst"])
    sizes = ", ".join(f"{name} {size / 1e6:.2f}" for name, size in parts.items())
    cap = f", ranks at most {row['rank_cap']}" if row["rank_cap"] else ""
    lines = [
        f"{row['path']}: {len(concepts)} concepts, {row['format']}, {row['side']} px, base {row['precision']}{cap}",
        f"  {row['bytes'] / 1e6:.2f} MB: {sizes}",
        f"  furthest from the server's edits: {worst['concept']}, {worst['psnr_worst']:.1f} dB PSNR on its worst photo",
    ]
    if row["since"]:
        new = sum(concept["new"] for concept in concepts)
        lines.append(f"  goes on from {row['since']}: {new} concepts are new")
    if row["out"]:
        lines.append(f"  written to {row['out']}")
    return lines + [f"  left out: {concept}: {reason}" for concept, reason in row["left_out"].items()]
