"""What training one concept costs, against pix2pix: the paper's figure 6, counted instead of measured.

    python bench/cost.py [--side 256] [--channels 64] [--seconds e2gan-lora=95] [--json]

Of 1,000 images 800 train; E2GAN takes 400 of them for 100 epochs, pix2pix all for 200. The base that the first two
rows start from is trained once for all concepts and not counted. `less` is than pix2pix. The paper's own figures are at
256 px and 64 channels; its 56.9 G are counted in another way than its 23.6 G (`e2gan.cost`).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace

import torch
from rich.console import Console
from rich.table import Table

from e2gan.config import GeneratorConfig, TrainConfig, pix2pix_nine_blocks
from e2gan.cost import TrainingCost, training_cost
from e2gan.lora import searched_ranks
from e2gan.model import Generator


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row: what trains, on how many pairs and for how long, and what the paper says of it (tables 1, 2 and 5)."""

    name: str
    config: GeneratorConfig
    lora: bool
    pairs: int
    epochs: int
    paper: dict[str, float]


def variants(channels: int) -> list[Variant]:
    ours = GeneratorConfig(channels=channels)
    nine = replace(pix2pix_nine_blocks(), channels=channels)
    network = {"parameters": 7.1e6, "multiply_adds_per_image": 23.6e9}
    lora = {**network, "trainable_parameters": 0.092e6}
    full = {**network, "trainable_parameters": 7.1e6}
    # 16 minutes: table 1, one H100.
    pix2pix = {
        "parameters": 11.4e6,
        "multiply_adds_per_image": 56.9e9,
        "trainable_parameters": 11.4e6,
        "seconds": 960.0,
    }
    return [
        Variant(name="e2gan-lora", config=ours, lora=True, pairs=400, epochs=100, paper=lora),
        Variant(name="e2gan-finetune", config=ours, lora=False, pairs=400, epochs=100, paper=full),
        Variant(name="e2gan-scratch", config=ours, lora=False, pairs=800, epochs=200, paper=full),
        Variant(name="pix2pix-9rb", config=nine, lora=False, pairs=800, epochs=200, paper=pix2pix),
    ]


def cost_of(variant: Variant, side: int, seconds: float | None) -> TrainingCost:
    with torch.device("meta"):
        ranks = searched_ranks(Generator(variant.config)) if variant.lora else None
    training = TrainConfig(epochs=variant.epochs)
    return training_cost(
        variant.name, variant.config, training, pairs=variant.pairs, side=side, ranks=ranks, seconds=seconds
    )


def ratios(cost: TrainingCost, reference: TrainingCost) -> dict[str, float]:
    """Every figure over pix2pix's, where both are known."""
    ours, theirs = asdict(cost), asdict(reference)
    keys = [key for key in ours if key != "name" and ours[key] is not None and theirs[key] is not None]
    return {key: float(f"{ours[key] / theirs[key]:.3g}") for key in keys}


def print_table(rows: list[tuple[Variant, TrainingCost]]) -> None:
    table = Table(caption="The paper trains pix2pix in 16 minutes on one H100.", caption_justify="left")
    for column in ("", "pairs x epochs", "G/image", "paper", "training, P", "less", "trained, M", "paper", "MB", "s"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    reference = rows[-1][1].training_multiply_adds
    for variant, cost in rows:
        table.add_row(
            variant.name,
            f"{variant.pairs} x {variant.epochs}",
            f"{cost.multiply_adds_per_image / 1e9:.1f}",
            f"{variant.paper['multiply_adds_per_image'] / 1e9:.1f}",
            f"{cost.training_multiply_adds / 1e15:.2f}",
            f"{reference / cost.training_multiply_adds:.1f} x",
            f"{cost.trainable_parameters / 1e6:.3f}",
            f"{variant.paper['trainable_parameters'] / 1e6:g}",
            f"{cost.bytes_per_concept / 1e6:.3f}",
            "-" if cost.seconds is None else f"{cost.seconds:.0f}",
        )
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=256, help="of the square images, px")
    parser.add_argument(
        "--channels", type=int, default=64, help="of the generators at full resolution, not the discriminator's"
    )
    parser.add_argument(
        "--seconds",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a whole training's time, measured elsewhere",
    )
    parser.add_argument("--json", action="store_true", help="JSON lines instead of the table")
    args = parser.parse_args()
    try:
        chosen = variants(args.channels)
    except ValueError as error:
        parser.error(str(error))
    try:
        seconds = {name: float(value) for name, value in (text.split("=") for text in args.seconds)}
    except ValueError:
        parser.error(f"--seconds takes NAME=VALUE with a number of seconds, not {' '.join(args.seconds)}")
    unknown = sorted(set(seconds) - {v.name for v in chosen})
    if unknown:
        parser.error(f"--seconds {unknown[0]}: no such row; those are {', '.join(v.name for v in chosen)}")
    try:
        rows = [(v, cost_of(v, args.side, seconds.get(v.name))) for v in chosen]
    except ValueError as error:
        parser.error(str(error))
    if not args.json:
        print_table(rows)
        return
    for variant, cost in rows:
        line = {**asdict(cost), "of_pix2pix": ratios(cost, rows[-1][1]), "paper": variant.paper}
        run = {"pairs": variant.pairs, "epochs": variant.epochs, "side": args.side, "channels": args.channels}
        print(json.dumps({**line, **run}))


if __name__ == "__main__":
    main()
