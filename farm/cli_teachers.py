"""`farm teachers`: which there are, and which one suits a concept best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm.files import make_folder, write_whole
from farm.options import Config, Json, Override, load_config, naming, resumable

if TYPE_CHECKING:
    from farm.config import FarmConfig

app = typer.Typer(help="The teachers, whose edits everything is learned from.", no_args_is_help=True)

Concepts = Annotated[list[str] | None, typer.Option("--concept", help="Only this concept; repeatable.")]


@app.command("list")
def list_teachers(config: Config, override: Override = None, as_json: Json = False) -> None:
    """The teachers of every concept, and the one that was chosen where several were compared."""
    from farm.artifacts import find
    from farm.plan import make_plan
    from farm.store import open_store

    loaded = load_config(config, override or [])
    rows: list[dict[str, Any]] = []
    with naming(config):
        store, plan = open_store(loaded.store), make_plan(loaded)
        for concept in loaded.catalogue:
            names = list(loaded.candidates(concept.id))
            chosen: str | None = names[0]
            if plan.compared(concept.id):
                manifest = find(store, plan.comparison(concept.id).path)
                chosen = manifest.summary["teacher"] if manifest else None
            rows.append({"concept": concept.id, "teachers": names, "chosen": chosen})
    if as_json:
        print(json.dumps({"concepts": rows}, indent=1))
        return
    for row in rows:
        print(f"{row['concept']:<32} {row['chosen'] or '-':<20} of {', '.join(row['teachers'])}")


@app.command()
def compare(
    config: Config,
    concept: Concepts = None,
    override: Override = None,
    sheets: Annotated[
        Path | None, typer.Option("--sheets", help="A folder for the contact sheets.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Have every teacher of a concept edit the same few photos, score the edits, and choose.

    Exits with 1 when a concept's teachers could not be compared or none of them is fit.
    """
    from farm.progress import Screen
    from farm.run import Run

    loaded = load_config(config, override or [])
    for concept_id in concept or ():
        loaded.concept(concept_id)
    if sheets is not None:
        make_folder(sheets)
    with naming(config), resumable():
        run = Run(loaded, Screen())
        several = [c.id for c in loaded.catalogue if run.plan.compared(c.id)]
        wanted = [c for c in several if not concept or c in concept]
        if not wanted:
            run.screen.say("no concept has more than one teacher: nothing to compare")
        run.compare(wanted)
        found = {c: _choice(run, c, sheets) for c in wanted if c not in run.outcome.failures}
    if as_json:
        print(json.dumps({"concepts": found, "failures": run.outcome.failures}, indent=1))
    else:
        _show(loaded, found)
    for concept_id, reason in sorted(run.outcome.failures.items()):
        run.screen.say(f"failed: {concept_id}: {reason}")
    if run.outcome.failures or any(choice["teacher"] is None for choice in found.values()):
        raise typer.Exit(1)


def _choice(run: Any, concept_id: str, sheets: Path | None) -> dict[str, Any]:
    from farm.artifacts import open_artifact
    from farm.store import where

    artifact = open_artifact(run.store, run.plan.comparison(concept_id).path)
    if sheets is not None:
        write_whole(sheets / f"{concept_id}.webp", artifact.read("sheet.webp"))
    choice: dict[str, Any] = json.loads(artifact.read("choice.json"))
    return choice | {"sheet": where(run.store, f"{artifact.manifest.path}/sheet.webp")}


def _show(config: FarmConfig, found: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from farm.quality.score import parts_shown

    console = Console()
    for concept_id, choice in found.items():
        parts = parts_shown(choice["scores"].values())
        table = Table("teacher", "score", *(name.replace("_", " ") for name in parts), title=concept_id)
        for name, score in sorted(choice["scores"].items(), key=lambda item: -item[1]["total"]):
            values = ["-" if score[part] is None else f"{score[part]:.2f}" for part in parts]
            mark = " (chosen)" if name == choice["teacher"] else ""
            table.add_row(name + mark, f"{score['total']:.3f}", *values)
        console.print(table)
        console.print(choice["sheet"], soft_wrap=True, highlight=False)
    if found and config.quality.clip is None:
        console.print("quality.clip is not set: the score knows nothing of the prompt, only of the pictures.")
