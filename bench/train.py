"""Images a second of one training step, as JSON lines: every variant in one run, so that ratios hold.

    python bench/train.py [--side 256] [--channels 64] [--batch-size 32] [--seconds 20]

The first variant is the reference: pix2pix with nine residual blocks, plain eager fp32, every weight trained. Every
variant runs in a process of its own. The last lines are one adapter as the paper trains it (400 pairs, 100 epochs), by
the fastest variant: measured on a GPU, projected from the rate on a CPU; and 260 of them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from machine import machine

from e2gan.batches import ConceptPairs
from e2gan.config import GeneratorConfig, TrainConfig, pix2pix_nine_blocks
from e2gan.lora import new_adapter, searched_ranks
from e2gan.lora_attach import attach
from e2gan.model import build_generator
from e2gan.pairs import Pairs
from e2gan.train import Progress, train

ADAPTER_PAIRS, ADAPTER_EPOCHS, FARM_ADAPTERS = 400, 100, 260

PLAIN = TrainConfig(precision="fp32", channels_last=False)
BF16 = replace(PLAIN, precision="bf16")
CHANNELS_LAST = replace(BF16, channels_last=True)
COMPILED = replace(BF16, compile=True)
ALL = replace(CHANNELS_LAST, compile=True)


@dataclass(frozen=True)
class Variant:
    """lora: None trains every weight."""

    name: str
    training: TrainConfig
    lora: str | None = None
    nine_blocks: bool = False


VARIANTS = (
    Variant("pix2pix 9RB, full, fp32 eager", PLAIN, nine_blocks=True),
    Variant("E2GAN, full, fp32 eager", PLAIN),
    Variant("E2GAN, full, bf16", BF16),
    Variant("E2GAN, full, bf16, compiled", COMPILED),
    Variant("E2GAN, LoRA as peft's branches, fp32 eager", PLAIN, lora="branches"),
    Variant("E2GAN, LoRA as peft's branches, bf16", BF16, lora="branches"),
    Variant("E2GAN, LoRA in weight space, fp32 eager", PLAIN, lora="weights"),
    Variant("E2GAN, LoRA in weight space, bf16", BF16, lora="weights"),
    Variant("E2GAN, LoRA in weight space, bf16, channels_last", CHANNELS_LAST, lora="weights"),
    Variant("E2GAN, LoRA in weight space, bf16, compiled", COMPILED, lora="weights"),
    Variant("E2GAN, LoRA in weight space, bf16, channels_last, compiled", ALL, lora="weights"),
)


class _EnoughError(Exception):
    """Ends a timed run."""


def measure(variant: Variant, args: argparse.Namespace, adversarial: bool) -> dict[str, float]:
    """Throughput of `e2gan.train.train` after its first steps, the wait before them, and the process's peak memory."""
    model = replace(pix2pix_nine_blocks() if variant.nine_blocks else GeneratorConfig(), channels=args.channels)
    training = replace(
        variant.training, epochs=10**6, batch_size=args.batch_size, adversarial_weight=float(adversarial)
    )
    marks: list[tuple[float, int]] = []

    def on_progress(done: Progress) -> None:  # the losses in it have waited for the device
        marks.append((time.perf_counter(), done.step))
        if marks[-1][0] - marks[0][0] > args.seconds:
            raise _EnoughError

    began = time.perf_counter()
    try:
        _train(model, variant, training, args, on_progress)
    except _EnoughError:
        (start, first), (end, last) = marks[0], marks[-1]
        rate = (last - first) * args.batch_size / (end - start)
        return {"images_per_second": rate, "start_seconds": start - began, "peak_memory_gb": _peak_gb(args.device)}
    raise AssertionError("the run is longer than any bench")


def adapter(variant: Variant, args: argparse.Namespace) -> dict[str, float]:
    """One whole adapter, compiling included."""
    training = replace(variant.training, epochs=ADAPTER_EPOCHS, batch_size=args.batch_size)
    began = time.perf_counter()
    _train(replace(GeneratorConfig(), channels=args.channels), variant, training, args, None)
    return {"seconds": time.perf_counter() - began, "peak_memory_gb": _peak_gb(args.device)}


def _train(
    model: GeneratorConfig,
    variant: Variant,
    training: TrainConfig,
    args: argparse.Namespace,
    on_progress: Callable[[Progress], None] | None,
) -> None:
    generator = build_generator(model, seed=0)
    if variant.lora:
        attach(generator, new_adapter(generator, searched_ranks(generator), seed=0), space=variant.lora)
    images = torch.randint(0, 256, (ADAPTER_PAIRS, 3, args.side, args.side), dtype=torch.uint8)
    pairs = Pairs(ids=tuple(map(str, range(ADAPTER_PAIRS))), source=images, target=255 - images)
    concept = ConceptPairs(concept="inverted", text=torch.randn(77, 768), pairs=pairs)
    every = 10 if args.device == "cuda" else 2
    train(generator, [concept], training, seed=0, device=args.device, on_progress=on_progress, progress_every=every)


def _peak_gb(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _apart(function: Callable[..., dict[str, float]], *arguments: object) -> dict[str, float]:
    """The function's result from a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32, help="a batch of 32 takes minutes on a CPU")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    def line(**values: object) -> None:
        rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in values.items()}
        print(json.dumps(rounded), flush=True)

    line(**machine(), device=args.device, side=args.side, channels=args.channels, batch_size=args.batch_size)
    reference = 0.0
    fastest: tuple[float, Variant] = (0.0, VARIANTS[-1])
    for adversarial, variants in ((True, VARIANTS), (False, (VARIANTS[0], VARIANTS[3], VARIANTS[-1]))):
        for variant in variants:
            found = _apart(measure, variant, args, adversarial)
            rate = found["images_per_second"]
            reference = reference or rate
            line(variant=variant.name, losses="GAN + L1" if adversarial else "L1", ratio=rate / reference, **found)
            if adversarial and variant.lora and rate > fastest[0]:
                fastest = (rate, variant)
    rate, variant = fastest
    if args.device == "cuda":
        found = {**_apart(adapter, variant, args), "measured": True}
    else:
        found = {"seconds": ADAPTER_PAIRS * ADAPTER_EPOCHS / rate, "measured": False}
    line(adapter=variant.name, pairs=ADAPTER_PAIRS, epochs=ADAPTER_EPOCHS, **found)
    line(adapters=FARM_ADAPTERS, device_hours=found["seconds"] * FARM_ADAPTERS / 3600)


if __name__ == "__main__":
    main()
