"""One of the paper's tables or figures on a farm's own pairs, beside the paper's figures.

    python bench/ablate.py --list
    python bench/ablate.py --table 5 [--config configs/study.yaml] [--targets wave,udnie] [--images 3600] [--json]

The targets are kept out of every base. Results are kept in --out as they come, so the command goes on where it stopped,
and tables that share a model train it once. The paper's figures are FID on other photographs and teachers: compare the
order of its rows with the order here, not the numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import torch
from recipes import Recipe
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from study import Study, say
from tables import TABLES, Figures, Lab, concepts_of, default_images, paper, rows

from e2gan.config import GeneratorConfig
from e2gan.cost import multiply_adds
from e2gan.model import Generator
from farm.catalogue import find_concept
from farm.config_file import load_config
from farm.errors import UserError

Result = dict[str, Any]


class Parser(argparse.ArgumentParser):
    """A mistake is one sentence, as everywhere in the benches."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}.")


def run_table(number: str, lab: Lab) -> Iterator[tuple[Result, Figures | None]]:
    """Every recipe on every target, recipe by recipe, as they are done."""
    study = lab.study
    planned = rows(number, lab)
    study.make_edits(sorted({*lab.targets, *(c for recipe, _ in planned for c in concepts_of(recipe))}))
    for recipe, figures in planned:
        shape = costs(recipe, study.config.sources.size)
        for target in lab.targets:
            say(f"table {number}: {recipe.name} on {target}")
            yield {**study.run(recipe, target), **shape}, figures


def costs(recipe: Recipe, side: int) -> dict[str, int]:
    """Parameters and multiply-adds of the recipe's network for one image."""
    return _costs(recipe.model, recipe.cross_attention, side)


@lru_cache
def _costs(model: GeneratorConfig, cross_attention: bool, side: int) -> dict[str, int]:
    with torch.device("meta"):
        generator = Generator(model if cross_attention else replace(model, cross_attention=False))
    parameters = sum(p.numel() for p in generator.parameters())
    return {"parameters": parameters, "multiply_adds": multiply_adds(generator, side)}


def print_table(number: str, done: list[tuple[Result, Figures | None]], score: str) -> None:
    """Ours on the left; what is the same in every row is said below; the paper's on the right."""
    about = paper(number)
    measured = {
        "pairs": lambda r: str(r["pairs"]),
        "images": lambda r: str(r["images"]),
        "trained, k": lambda r: f"{r['trainable_parameters'] / 1e3:.1f}",
        "network, M": lambda r: f"{r['parameters'] / 1e6:.2f}",
        "mult-adds, G": lambda r: f"{r['multiply_adds'] / 1e9:.2f}",
    }
    texts = {name: [text(result) for result, _ in done] for name, text in measured.items()}
    varied = [name for name, column in texts.items() if len(set(column)) > 1]
    columns = list(dict.fromkeys(name for figures in about["rows"].values() for name in figures))

    same = ", ".join(f"{name} {texts[name][0]}" for name in texts if name not in varied)
    caption = [
        f"Same in every row: {same}." if same else "",
        f"L1 is over the untouched photo's; {score} with its 95 % interval.",
    ]
    table = Table(
        title=f"{number if number.startswith('figure') else f'Table {number}'}: {about['title']}",
        caption=" ".join([*caption, f"The paper: {about['about']}."]).strip(),
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", overflow="fold")
    table.add_column("target")
    for name in (*varied, "L1"):
        table.add_column(name, justify="right", max_width=10)
    table.add_column(score, justify="right", no_wrap=True)
    for name in columns:
        table.add_column(f"paper, other data: {name}", justify="right", style="dim", width=13)

    def theirs(figures: Figures | None) -> list[str]:
        return [f"{figures[name]:g}" if figures and name in figures else "-" for name in columns]

    last = None
    for i, (result, figures) in enumerate(done):
        interval = result["frechet_interval"][score]
        again = result["recipe"] == last
        last = result["recipe"]
        table.add_row(
            "" if again else last,
            result["target"],
            *[texts[name][i] for name in varied],
            f"{result['l1'] / result['l1_untouched']:.3f}",
            f"{result['frechet'][score]:.3g} ({interval['low']:.3g}..{interval['high']:.3g})",
            *([""] * len(columns) if again else theirs(figures)),
        )
    ours = {result["recipe"] for result, _ in done}
    for name, figures in about["rows"].items():
        if name not in ours:
            table.add_row(name, "paper", *["-"] * (len(varied) + 2), *theirs(figures))
    Console(width=max(120, Console().width)).print(table)


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", metavar="N", help="which; see --list")
    parser.add_argument("--list", action="store_true", help="print the tables there are")
    parser.add_argument("--config", default="configs/study.yaml", help="a farm's configuration")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the configuration")
    parser.add_argument("--targets", default="wave,udnie", metavar="A,B", help="concepts to learn")
    parser.add_argument("--images", type=int, metavar="N", help="every training sees; default: the farm's adapters'")
    parser.add_argument("--base-images", type=int, metavar="N", help="every base's training sees; default: the farm's")
    parser.add_argument("--out", type=Path, help="folder of the results; default: lab in the farm's store")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of the table")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.table is None and not args.list:
        parser.error("--table: which one? --list prints those there are")
    if args.table and args.table not in TABLES:
        parser.error(f"--table: there is no table {args.table!r}; there are {', '.join(TABLES)}")
    for key in ("images", "base_images"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            parser.error(f"--{key.replace('_', '-')}: at least 1 image, not {getattr(args, key)}")
    return args


def main() -> None:
    args = arguments()
    if args.list:
        for number in TABLES:
            print(f"{number:8} {paper(number)['title']}")
        return
    config = load_config(args.config, args.set)
    targets = tuple(dict.fromkeys(args.targets.split(",")))
    for target in targets:
        find_concept(config.catalogue, target, key="--targets")
    study = Study(config, args.out or Path(config.store) / "lab", device=args.device)
    study.make_edits([])
    images, base_images = default_images(study, targets)
    lab = Lab(
        study=study,
        targets=targets,
        images=args.images or images,
        base_images=args.base_images or base_images,
    )
    done = run_table(args.table, lab)
    if not args.json:
        print_table(args.table, list(done), study.plan.score_name)
        return
    print(json.dumps({"table": args.table, "base_images": lab.base_images, **study.describe()}), flush=True)
    for result, figures in done:
        print(json.dumps({**result, "table": args.table, "paper_other_data": figures}, sort_keys=True), flush=True)


if __name__ == "__main__":
    try:
        main()
    except (UserError, ValueError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename}: {error.strerror}.")
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
        sys.exit(130)
