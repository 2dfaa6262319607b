"""Packs for phones: sizes, time, memory and parity, of concepts with random weights.

    python bench/export.py [--concepts 30 260] [--side 256] [--channels 64] [--judge 3] [--theirs 3]

One JSON line a pack, after the machine's. `of_merged` is how many times smaller the pack is than as many packages of
one merged concept each, of which one is really built. Each pack is built in a process of its own, whose highest memory,
imports included, is `peak_mb`; `imports_mb` is what it had before. `--theirs` has coremltools' own `save_multifunction`
join that many converted concepts, for comparison.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import machine

from e2gan.config import GeneratorConfig
from e2gan.export.budget import Shape
from e2gan.export.builders import PACKAGE, Templates, builder
from e2gan.export.coreml import halved
from e2gan.export.libraries import coremltools
from e2gan.export.onnx import OnnxFunction
from e2gan.export.parity import judge, server_edits
from e2gan.export.phone import concept_tensors
from e2gan.lora import Adapter, new_adapter, searched_ranks
from e2gan.model import Generator, build_generator

PACKS = ["coreml:fp16", "coreml:8bit", "coreml:6bit", "coreml:int8", "onnx:fp16", "onnx:int8"]
PHOTOS = 2
REPEATS = 7


def concept(base: Generator, number: int) -> tuple[Adapter, torch.Tensor]:
    """An adapter whose update is of about the weights' size, and a prompt."""
    random = torch.Generator().manual_seed(number)
    adapter = new_adapter(base, searched_ranks(base), seed=number)
    for name, tensor in adapter.tensors.items():
        if name.endswith(".lora_B"):
            tensor.normal_(0, 0.05, generator=random)
    return adapter, torch.randn(base.config.text_tokens, base.config.text_width, generator=random)


def photos(side: int) -> torch.Tensor:
    """Smooth pictures, uint8."""
    noise = torch.rand(PHOTOS, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return (F.interpolate(noise, (side, side), mode="bicubic") * 255).clamp(0, 255).byte()


def peak() -> float:
    """The most memory that this process has had, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def build(format: Any, precision: Any, concepts: int, side: int, channels: int, judged: int) -> dict[str, Any]:
    """One pack, and what it is like."""
    base = build_generator(GeneratorConfig(channels=channels), seed=0).eval()
    if format != "onnx":
        coremltools()
    before = peak()
    templates = Templates(base, side=side, shape=Shape(precision=precision))
    with tempfile.TemporaryDirectory() as folder:
        pack = builder(format, Path(folder), templates)
        started = time.monotonic()
        parts = [pack.add("c000", *concept(base, 0))]
        first = time.monotonic() - started
        started = time.monotonic()
        parts += [pack.add(f"c{number:03d}", *concept(base, number)) for number in range(1, concepts)]
        pack.close()
        others = time.monotonic() - started
        memory, total = peak(), size(Path(folder))
        pictures, lowest, seconds = photos(side), [], 0.0
        for number in range(0, concepts, -(-concepts // judged)) if judged else ():
            expected = server_edits(base, *concept(base, number), pictures)
            started = time.monotonic()
            lowest.append(judge(pack.editor(f"c{number:03d}"), expected, pictures, limit=0).parity.lowest)
            seconds += time.monotonic() - started
        inputs = as_inputs(Path(folder), templates, base, pictures) if format == "onnx" and judged else {}
    own = parts[-1].weights + parts[-1].program
    return {
        "format": format,
        "precision": precision,
        "concepts": concepts,
        "side": side,
        "channels": channels,
        "bytes": total,
        "concept_bytes": own,
        "first_seconds": round(first, 2),
        "others_seconds": round(others, 2),
        "imports_mb": round(before),
        "peak_mb": round(memory),
        "judged": len(lowest),
        "lowest_psnr": round(min(lowest), 1) if lowest else None,
        "judge_seconds_an_edit": round(seconds / (PHOTOS * len(lowest)), 2) if lowest else None,
        **inputs,
    }


def as_inputs(folder: Path, templates: Templates, base: Generator, pictures: torch.Tensor) -> dict[str, Any]:
    """Milliseconds of processor time of an edit and of loading, of a model a concept and of one that takes its
    tensors as inputs; medians of runs in turn."""
    adapter, text = concept(base, 0)
    tensors = halved(concept_tensors(base, adapter, text))
    templates.onnx(adapter).write_open(folder / "open.onnx")
    times: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        started = time.process_time()
        result = work()
        times.setdefault(name, []).append(1000 * (time.process_time() - started))
        return result

    for _ in range(REPEATS):
        own = timed("load_cpu_ms", lambda: OnnxFunction(folder / "c000.onnx"))
        taking = timed("load_cpu_ms_as_inputs", lambda: OnnxFunction(folder / "open.onnx"))
        for _ in range(2):
            timed("edit_cpu_ms", lambda own=own: own(pictures[:1]))
            timed("edit_cpu_ms_as_inputs", lambda taking=taking: taking(pictures[:1], tensors))
    return {name: round(statistics.median(found), 1) for name, found in times.items()}


def theirs(concepts: int, side: int, channels: int) -> dict[str, Any]:
    """The same by converting every concept and joining all with coremltools."""
    from e2gan.export.coreml import _converted
    from e2gan.export.phone import PhoneGenerator

    base, tools = build_generator(GeneratorConfig(channels=channels), seed=0).eval(), coremltools()
    before, started = peak(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        joined = tools.utils.MultiFunctionDescriptor()
        for number in range(concepts):
            network = PhoneGenerator(base, concept_tensors(base, *concept(base, number)))
            path = f"{folder}/{number}.mlpackage"
            _converted(network, side, tools.target.iOS18).save(path)
            joined.add_function(path, "main", f"c{number:03d}")
        joined.default_function_name = "c000"
        tools.utils.save_multifunction(joined, f"{folder}/{PACKAGE}")
        total = size(Path(folder) / PACKAGE)
    seconds = round(time.monotonic() - started, 2)
    row = {"format": "coreml", "precision": "fp16", "by": "save_multifunction", "concepts": concepts, "bytes": total}
    return {
        **row,
        "side": side,
        "channels": channels,
        "seconds": seconds,
        "imports_mb": round(before),
        "peak_mb": round(peak()),
    }


def alone(**settings: Any) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--one", json.dumps(settings)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=int, nargs="+", default=[30, 260], help="of a pack")
    parser.add_argument("--packs", nargs="+", default=PACKS, help="formats and precisions")
    parser.add_argument("--side", type=int, default=256, help="of the images, px")
    parser.add_argument("--channels", type=int, default=64, help="of the generator at full resolution")
    parser.add_argument("--judge", type=int, default=3, help="concepts of a pack that are run on two pictures")
    parser.add_argument("--theirs", type=int, default=3, help="concepts that save_multifunction joins; 0 for none")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        settings = json.loads(args.one)
        print(json.dumps(theirs(**settings) if "format" not in settings else build(**settings)))
        return
    print(json.dumps(machine()), flush=True)
    common = {"side": args.side, "channels": args.channels}
    merged = alone(format="coreml-single", precision="fp16", concepts=1, judged=1, **common)
    print(json.dumps(merged), flush=True)
    for concepts in args.concepts:
        for format, precision in (pack.split(":") for pack in args.packs):
            row = alone(format=format, precision=precision, concepts=concepts, judged=args.judge, **common)
            row["of_merged"] = round(concepts * merged["bytes"] / row["bytes"], 1)
            print(json.dumps(row), flush=True)
    if args.theirs:
        print(json.dumps(alone(concepts=args.theirs, **common)), flush=True)


if __name__ == "__main__":
    main()
