"""`farm cost`: what is left of a farm will take and cost, and what is done took, beside what was predicted of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm.options import Config, Json, Override, load_config, naming, resumable

if TYPE_CHECKING:
    from farm.config import FarmConfig
    from farm.cost.predict import Prediction


def cost(
    config: Config,
    override: Override = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Do a few units of every kind of work here first, and time them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """What is left will take and cost, by measured unit times, and what is done took beside what was predicted."""
    from farm.cost.predict import predict
    from farm.cost.rates import all_manifests, known_rates
    from farm.cost.reconcile import reconcile
    from farm.glance import Documents, kept_at
    from farm.graph import planned
    from farm.plan import make_plan
    from farm.progress import Screen
    from farm.standing import look
    from farm.store import open_store
    from farm.todo import make_todo

    loaded = load_config(config, override or [])
    with naming(config), resumable():
        store, plan = open_store(loaded.store, loaded.cluster.store_patience_seconds), make_plan(loaded)
        if probe:
            from farm.cost.probe import probe as measure_units

            measure_units(store, plan, Screen().say)
        seen, manifests = look(Documents(store, kept_at(loaded.name)), plan), all_manifests(store, plan)
        rates = known_rates(store, loaded.name, manifests)
        left = predict(plan, seen, make_todo(store, plan, seen), manifests, rates)
        own = planned(plan)
        done = reconcile(store, plan, [manifest for path, manifest in manifests.items() if path in own])
    if as_json:
        print(json.dumps({"left": left.model_dump(), "done": done}, indent=1))
        return
    _show_left(loaded, left)
    _show_done(done)


def _show_left(config: FarmConfig, left: Prediction) -> None:
    from rich.console import Console
    from rich.table import Table

    from farm.cost.left import pace
    from farm.report.formats import count, duration, money

    console = Console()
    if not any(line.artifacts for line in left.stages):
        console.print("nothing is left to do")
        return
    columns = ["stage", "to make", "images", "an image", "work", "at once", "takes"]
    gpus, priced = left.gpu_seconds > 0, bool(config.cost.nodes)
    columns += (["GPU time"] if gpus else []) + ([left.currency] if priced else [])
    table = Table(*columns, title="left to do")
    for line in left.stages:
        row = [
            line.stage,
            count(line.artifacts),
            count(line.units),
            "—" if line.unit_seconds is None else pace(line.unit_seconds),
        ]
        row += [duration(line.work_seconds), f"{line.slots} {line.node or ''}".strip(), duration(line.seconds)]
        row += ([duration(line.gpu_seconds)] if gpus else []) + ([money(line.money, "").strip()] if priced else [])
        table.add_row(*row)
    table.add_section()
    total = ["total", "", "", "", duration(left.work_seconds), "", duration(left.seconds)]
    total += ([duration(left.gpu_seconds)] if gpus else []) + ([money(left.money, "").strip()] if priced else [])
    table.add_row(*total)
    console.print(table)
    for title, sentences in (("measured", left.measured), ("assumed", left.assumed), ("not known", left.unknown)):
        for sentence in sentences:
            console.print(f"{title}: {sentence}", markup=False, highlight=False, soft_wrap=True)
    if not left.complete:
        say = f"the totals are of what is known; `farm cost --probe {config.options}` does a few units and times them"
        console.print(say, markup=False, highlight=False, soft_wrap=True)
    if left.nodes_money is not None:
        kept = f"all nodes of cost.nodes, kept to the end: {money(left.nodes_money, left.currency)}"
        console.print(kept, markup=False, highlight=False, soft_wrap=True)
    else:
        console.print("no prices: the section cost of the configuration takes them (docs/costs.md)", soft_wrap=True)


def _show_done(done: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from farm.report.formats import count, duration, money, number

    if not done["total"]["artifacts"]:
        return
    gpus, priced, foretold = done["total"]["gpu_seconds"] > 0, done["priced"], done["predicted"]
    columns = ["stage", "made", "work", *(["GPU time"] if gpus else []), *([done["currency"]] if priced else [])]
    table = Table(*columns, *(["predicted", "actual", "actual / predicted"] if foretold else []), title="done")
    for row in [*done["stages"], done["total"]]:
        if row is done["total"]:
            table.add_section()
        cells = [row["stage"], count(row["artifacts"]), duration(row["work_seconds"])]
        cells += ([duration(row["gpu_seconds"])] if gpus else []) + (
            [money(row["money"], "").strip()] if priced else []
        )
        if foretold:
            told = row["foretold"] or {"seconds": None, "actual": None, "ratio": None}
            cells += [duration(told["seconds"]), duration(told["actual"]), number(told["ratio"], 2)]
        table.add_row(*cells)
    console = Console()
    console.print(table)
    if not done["predicted"]:
        console.print("none of it was predicted: nothing had been measured when the runs began", soft_wrap=True)
