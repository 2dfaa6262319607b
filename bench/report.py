"""The report of a farm of the real size: how long it takes to build, how large it is, what it asks of the store.

    python bench/report.py [--concepts 280] [--farm work/demo] [--side 256] [--json FILE] [--keep DIR]

The farm is made of a finished one, `--farm`, that of `make demo`: its sheets, weights and tables under the names of the
packaged catalogue's concepts, with the sheets enlarged to `--side`, so that there is as much to decode as in a farm of
that size. Nine of ten concepts are published; of the others some were held by the gate, some have bad edits, some
failed. Every manifest is a real one, hashes and all.

`calls`: what was asked of the store, one call after another as in a folder. `seconds_at_20_ms`: the same with 20 ms
added to each, sixteen at a time, as from a bucket.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster import Counting
from machine import machine, sayer
from store import DELAY_SECONDS

from farm.artifacts import FileEntry, Manifest, commit, find
from farm.catalogue import load_catalogue
from farm.config import FarmConfig
from farm.config_file import load_config
from farm.plan import Plan, make_plan
from farm.registry import Registry
from farm.report import build_report
from farm.stages.pictures import GAP
from farm.store import LocalStore

TAKEN = ("preview.webp", "adapter_model.safetensors", "adapter_config.json", "metrics.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concepts", type=int, default=280)
    parser.add_argument("--farm", default="work/demo", help="the finished demo's store")
    parser.add_argument("--side", type=int, default=256, help="of the sheets' pictures")
    parser.add_argument("--json", type=Path, help="a file for the lines as well")
    parser.add_argument("--keep", type=Path, help="a folder for the report")
    options = parser.parse_args()
    say = sayer(options.json)
    say(machine())
    done = make_plan(load_config(Path(__file__).parents[1] / "configs" / "demo.yaml", [f"store={options.farm}"]))
    with tempfile.TemporaryDirectory(prefix="report-") as scratch:
        store = LocalStore(Path(scratch))
        plan = copy_farm(LocalStore(Path(options.farm)), done, store, options.concepts, options.side)
        failures = {c.id: "adapter: the loss is no longer finite" for c in plan.config.catalogue[9::40]}
        for remote in (False, True):
            calls = Counter[str]()
            watched = Slow(store, calls) if remote else Counting(store, calls)
            started, cpu = time.perf_counter(), time.process_time()
            page = build_report(watched, plan, failures=failures, stage_seconds={"adapter": 3600.0})
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
            row = {"concepts": options.concepts, "side": options.side, "calls": sum(calls.values())}
            row |= {"of_them": dict(sorted(calls.items())), "mb": round(len(page) / 1e6, 2)}
            row["pictures"] = page.count(b"<img ")
            say(row | {"seconds_at_20_ms" if remote else "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1)})
        if options.keep:
            (options.keep / "report.html").write_bytes(page)


@dataclass(frozen=True)
class Slow:
    """A store that is far away."""

    store: Any
    calls: Counter[str] = field(compare=False)
    at_once: int = 16

    def __getattr__(self, name: str) -> Any:
        member = getattr(self.store, name)
        if not callable(member):
            return member

        def call(*given: Any, **named: Any) -> Any:
            self.calls[name] += 1
            time.sleep(DELAY_SECONDS)
            return member(*given, **named)

        return call


def copy_farm(done: LocalStore, old: Plan, store: LocalStore, concepts: int, side: int) -> Plan:
    """The demo's artifacts under other names, as those of a farm with so many concepts."""
    names = [*load_catalogue("ffhq"), *load_catalogue("scenery")][:concepts]
    names += [{"id": f"more-{n}", "prompt": f"one more concept, number {n}"} for n in range(concepts - len(names))]
    catalogue = [
        {"id": c["id"], "prompt": c["prompt"], "editor": {"kind": "procedural", "style": "charcoal"}} for c in names
    ]
    document = old.config.model_dump(mode="json", exclude_unset=True) | {"catalogue": catalogue, "store": store.url}
    ids = [concept["id"] for concept in catalogue]
    document |= {"base": {"concepts": ids[:23]}, "ranks": {"concepts": ids[23:26]}, "name": "bench"}
    plan = make_plan(FarmConfig.model_validate(document))
    was = [concept.id for concept in old.config.catalogue]

    def read(path: str) -> tuple[Manifest, dict[str, bytes]]:
        manifest = find(done, path)
        if manifest is None:
            sys.exit(f"error: {done.url} has no {path}: run `make demo` first, or name its store with --farm.")
        return manifest, {name: done.get(f"{path}/{name}") for name in manifest.files}

    def put(spec: Any, made: Manifest, files: dict[str, bytes | FileEntry], **summary: Any) -> Manifest:
        seconds = {"wall_seconds": made.wall_seconds, "device_seconds": made.device_seconds}
        return commit(store, spec, files, **seconds, summary={**made.summary, **summary})

    for new, given in ((plan.sources, old.sources), (plan.selection, old.selection), (plan.ranks, old.ranks)):
        put(new, *read(given.path))
    made, files = read(old.base.path)
    scores = dict(zip(ids[:23], [*made.summary["metrics"].values()] * 6, strict=False))
    files["preview.webp"] = enlarged(files["preview.webp"], 12, side, again=2)
    put(plan.base, made, files, metrics=scores)
    adapters = {}
    for name in was:
        made, files = read(old.adapter(name).path)
        files = {file: files[file] for file in TAKEN}
        adapters[name] = made, files | {"preview.webp": enlarged(files["preview.webp"], 3, side)}
    edits = {name: read(old.edits(name).path) for name in was}
    checked = {name: read(old.quality(name).path) for name in was}
    rows = {name: list(made.summary["left_out"].items()) for name, (made, _) in checked.items()}
    registry = Registry(store)
    for number, concept_id in enumerate(ids):
        name = was[number % len(was)]
        put(plan.edits(concept_id), *edits[name])
        bad = number % 40 == 7 and rows[name]
        put(plan.quality(concept_id), *checked[name], quarantined="only 3 of 304 edits are good" if bad else None)
        if bad or number % 40 == 9:
            continue
        made, given = adapters[name]
        checks = {**made.summary["checks"], "base": plan.base.digest}
        scored = dict(made.summary["metrics"])
        if number % 40 == 11:
            scored |= {"l1": scored["l1_untouched"]}
        adapter = put(plan.adapter(concept_id), made, given, metrics=scored, checks=checks)
        if number % 40 != 11:
            release = {"adapter": adapter.path, "digest": adapter.digest, "base": plan.base.digest, "metrics": scored}
            registry.publish(concept_id, **release, manifest=adapter)
    return plan


def enlarged(sheet: bytes, rows: int, side: int, again: int = 1) -> bytes:
    """A sheet with pictures of another side, its rows as often as told."""
    import io

    import PIL.Image

    with PIL.Image.open(io.BytesIO(sheet)) as opened:
        whole = opened.convert("RGB")
    cell = (whole.height + GAP) // rows
    columns = (whole.width + GAP) // cell
    large = PIL.Image.new("RGB", (columns * (side + GAP) - GAP, again * rows * (side + GAP) - GAP), "white")
    for row in range(again * rows):
        for column in range(columns):
            left, top = column * cell, row % rows * cell
            piece = whole.crop((left, top, left + cell - GAP, top + cell - GAP)).resize((side, side))
            large.paste(piece, (column * (side + GAP), row * (side + GAP)))
    buffer = io.BytesIO()
    large.save(buffer, format="WEBP", lossless=True, method=0)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
