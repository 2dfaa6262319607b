"""Images a second of one training step, as JSON lines: every variant in one run, so that ratios hold.

    python bench/train.py [--side 64] [--channels 32] [--batch-size 8] [--seconds 8]

The first line is the reference: pix2pix with nine residual blocks, fp32, every weight trained.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from e2gan.config import GeneratorConfig, TrainConfig, pix2pix_nine_blocks
from e2gan.lora import attach, new_adapter
from e2gan.model import build_generator
from e2gan.pairs import Pairs
from e2gan.train import ConceptPairs, Progress, train
from farm.stages.ranks import thresholds


class _EnoughError(Exception):
    """Ends a timed run."""


def images_per_second(
    config: GeneratorConfig, *, lora: bool, precision: str, adversarial: bool, args: argparse.Namespace
) -> float:
    """Throughput of `e2gan.train.train` after its first ten steps."""
    generator = build_generator(config, seed=0)
    if lora:
        attach(generator, new_adapter(generator, thresholds(generator), seed=0))
    images = torch.randint(0, 256, (64, 3, args.side, args.side), dtype=torch.uint8)
    pairs = Pairs(ids=tuple(map(str, range(64))), source=images, target=255 - images)
    training = TrainConfig(
        epochs=10**6, batch_size=args.batch_size, precision=precision, adversarial_weight=float(adversarial)
    )
    marks: list[tuple[float, int]] = []

    def on_progress(done: Progress) -> None:
        marks.append((time.perf_counter(), done.step))
        if marks[-1][0] - marks[0][0] > args.seconds:
            raise _EnoughError

    concept = ConceptPairs(concept="inverted", text=torch.randn(77, 768), pairs=pairs)
    try:
        train(generator, [concept], training, seed=0, device=args.device, on_progress=on_progress, progress_every=10)
    except _EnoughError:
        (start, first), (end, last) = marks[0], marks[-1]
        return (last - first) * args.batch_size / (end - start)
    raise AssertionError("the run is longer than any bench")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    ours = GeneratorConfig(channels=args.channels)
    nine = pix2pix_nine_blocks()
    nine = GeneratorConfig(
        channels=args.channels, residual_blocks=nine.residual_blocks, transformer=False, init=nine.init
    )
    variants = [
        ("pix2pix 9RB, full, GAN", nine, False, "fp32", True),
        ("E2GAN, full, GAN", ours, False, "fp32", True),
        ("E2GAN, full, GAN", ours, False, "auto", True),
        ("E2GAN, LoRA, GAN", ours, True, "auto", True),
        ("E2GAN, full, L1", ours, False, "auto", False),
        ("E2GAN, LoRA, L1", ours, True, "auto", False),
    ]
    reference = None
    for name, config, lora, precision, adversarial in variants:
        rate = images_per_second(config, lora=lora, precision=precision, adversarial=adversarial, args=args)
        reference = reference or rate
        line = {
            "variant": name,
            "precision": precision,
            "images_per_second": round(rate, 1),
            "ratio": round(rate / reference, 2),
        }
        print(
            json.dumps({**line, "side": args.side, "channels": args.channels, "batch_size": args.batch_size}),
            flush=True,
        )


if __name__ == "__main__":
    main()
