"""The experiment of docs/results.md: one teacher is left out of the base, then learned in every way to be compared.

    python bench/experiment.py [--config configs/study.yaml] [--leave-out wave --leave-out udnie] [--images 2400]

For each left-out concept: a base on the other concepts; LoRA on 100, 200 and 400 pairs, chosen by similarity clustering
and at random; the full fine-tune of the same base; pix2pix with nine residual blocks from scratch on all pairs. Every
model sees the same number of images. Results are kept as they come (`<store folder>/lab`), so the command goes on where
it stopped; it prints JSON lines and writes them to --json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from recipes import Base, Recipe
from study import Study, say

from e2gan.config import pix2pix_nine_blocks
from farm.config import FarmConfig
from farm.config_file import load_config
from farm.errors import UserError

ADVERSARIAL = 0.01
"""Weight of the adversarial loss in the rows with a discriminator: pix2pix's 1 against 100 times L1."""


def recipes(config: FarmConfig, target: str, images: int, counts: Sequence[int]) -> list[Recipe]:
    """The rows of one left-out concept's table. counts: training pairs, the most first."""
    model = config.model
    nine = replace(pix2pix_nine_blocks(), channels=model.channels)
    concepts = tuple(c.id for c in config.catalogue if c.id != target)
    base = Base(model=model, concepts=concepts)
    most = counts[0]

    def lora(name: str, **changes: object) -> Recipe:
        return replace(Recipe(name=name, model=model, base=base, images=images, ranks="searched"), **changes)

    return [
        lora("base as it is", images=0, ranks=None, pairs=most),
        *[
            lora(f"LoRA, {pairs} pairs, {how}", pairs=pairs, selection=how)
            for pairs in counts
            for how in ("cluster", "random")
        ],
        lora(f"LoRA at four times the ranks, {most} pairs, cluster", pairs=most, ranks="searched-x4"),
        lora(f"full fine-tune, {most} pairs, cluster", pairs=most, ranks=None),
        lora(f"LoRA with discriminator, {most} pairs, cluster", pairs=most, adversarial_weight=ADVERSARIAL),
        lora(
            f"full fine-tune with discriminator, {most} pairs, cluster",
            pairs=most,
            ranks=None,
            adversarial_weight=ADVERSARIAL,
        ),
        Recipe(name=f"E2GAN from scratch, {most} pairs, cluster", model=model, images=images, pairs=most),
        Recipe(name="pix2pix 9RB from scratch, all pairs", model=nine, images=images),
        Recipe(
            name="pix2pix 9RB from scratch, identity start, all pairs",
            model=replace(nine, init="identity"),
            images=images,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/study.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the configuration")
    parser.add_argument("--leave-out", action="append", metavar="CONCEPT", help="default: wave, then udnie")
    parser.add_argument("--images", type=int, default=2400, help="images every training sees")
    parser.add_argument("--pairs", type=int, nargs="+", default=[400, 200, 100], help="training pairs, the most first")
    parser.add_argument("--json", type=Path, help="also write the results there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    config = load_config(args.config, args.set)
    study = Study(config, Path(config.store) / "lab", device=args.device)
    lines = [study.describe()]
    print(json.dumps(lines[0], sort_keys=True), flush=True)
    for target in args.leave_out or ("wave", "udnie"):
        study.make_edits([config.concept(target).id, *(c.id for c in config.catalogue if c.id != target)])
        for recipe in recipes(config, target, args.images, args.pairs):
            say(f"{target}: {recipe.name}")
            lines.append(study.run(recipe, target))
            print(json.dumps(lines[-1], sort_keys=True), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))


if __name__ == "__main__":
    try:
        main()
    except (UserError, ValueError) as error:
        sys.exit(f"error: {error}")
