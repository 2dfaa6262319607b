"""The command line: `farm run`, `status` and `serve`, and the commands of the other `cli_` files in their places."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm import (
    cli_add,
    cli_concepts,
    cli_cost,
    cli_doctor,
    cli_edit,
    cli_export,
    cli_hub,
    cli_init,
    cli_keys,
    cli_logs,
    cli_migrate,
    cli_preflight,
    cli_queue,
    cli_registry,
    cli_report,
    cli_serve_key,
    cli_show,
    cli_store,
    cli_teachers,
    cli_watch,
)
from farm.errors import UserError
from farm.options import Config, Json, Log, LogFormat, Override, load_config, naming, resumable

if TYPE_CHECKING:
    from farm.config import FarmConfig
    from farm.progress import Screen

START, BUILD, LOOK, PUBLISH, SERVE, STORE = "Start", "Build", "Look", "Publish", "Serve", "Store"
"""Headings in `farm --help`."""

app = typer.Typer(
    help="A farm of image-editing concepts: distil editors into tiny GANs, one small adapter a concept.",
    epilog="Exit status: 0 done; 1 something failed, and the output says what; 2 a mistake in the command or the "
    "configuration, told in one sentence; 130 interrupted; 143 stopped by SIGTERM. After the last two the same command "
    "goes on. --json prints one document for programs. docs/cli.md has every command.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
)


def run(
    config: Config,
    override: Override = None,
    stage: Annotated[
        list[str] | None,
        typer.Option("--stage", help="Only this stage: concepts, base, ranks, adapters; repeatable."),
    ] = None,
    concept: Annotated[
        list[str] | None, typer.Option("--concept", help="Only this concept and what it needs; repeatable.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done.")] = False,
    as_json: Json = False,
    log: Log = LogFormat.HUMAN,
) -> None:
    """Photos in, published adapters and a report out; goes on where an earlier run stopped."""
    run_stages(config, override or [], stage, concept or (), dry_run=dry_run, as_json=as_json, log=log)


def run_stages(
    config: Path,
    overrides: list[str],
    stages: list[str] | None = None,
    concepts: Sequence[str] = (),
    *,
    dry_run: bool = False,
    as_json: bool = False,
    log: LogFormat = LogFormat.HUMAN,
) -> None:
    """What `farm run` and the scripts in jobs/ do; exits with 1 when a concept failed."""
    from farm.progress import JsonLines, Screen

    if log is LogFormat.HUMAN:
        _run_stages(config, overrides, stages, concepts, Screen(), dry_run=dry_run, as_json=as_json)
        return
    lines = JsonLines()
    with lines.instead_of_logs():
        try:
            _run_stages(config, overrides, stages, concepts, lines, dry_run=dry_run, as_json=as_json)
        except UserError as error:
            lines.say(f"error: {error}")
            raise typer.Exit(2) from None


def _run_stages(
    config: Path,
    overrides: list[str],
    stages: list[str] | None,
    concepts: Sequence[str],
    screen: Screen,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    from farm import run as farm_run

    loaded = load_config(config, overrides)
    unknown = sorted(set(stages or []) - set(farm_run.STAGES))
    if unknown:
        raise UserError(f"--stage {unknown[0]}: the stages are {', '.join(farm_run.STAGES)}.")
    for concept_id in concepts:
        loaded.concept(concept_id)
    with naming(config), resumable(loaded.cluster.grace_seconds, screen.say) as stop:
        outcome = farm_run.run(
            loaded,
            screen=screen,
            stages=stages or farm_run.STAGES,
            dry_run=dry_run,
            stop=stop,
            only=concepts,
        )
    if as_json:
        print(json.dumps(vars(outcome), indent=1))
    _print_outcome(loaded, outcome, screen)
    if outcome.failures or outcome.paused:
        raise typer.Exit(1)


def status(config: Config, override: Override = None, as_json: Json = False) -> None:
    """Every concept by stage."""
    from farm.plan import make_plan
    from farm.status import farm_status
    from farm.store import open_store

    loaded = load_config(config, override or [])
    with naming(config):
        found = farm_status(open_store(loaded.store), make_plan(loaded))
    if as_json:
        print(json.dumps(found, indent=1))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        "concept",
        "role",
        "edits",
        "adapter",
        "published",
        "L1 / untouched",
        title=escape(f"{found['farm']}: {found['store']}"),
    )
    for row in found["concepts"]:
        scores = row["metrics"]
        ratio = f"{scores['l1']:.3f} / {scores['l1_untouched']:.3f}" if scores else "-"
        stages = row["stages"]
        held = stages["published"] if stages["published"] in ("quarantined", "withdrawn") else ""
        version = ", ".join(filter(None, (f"v{row['published']}" if row["published"] else "", held))) or "-"
        adapter = f"{stages['adapter']} ({row['error']})" if row["error"] else stages["adapter"]
        table.add_row(row["id"], row["role"], stages["edits"], escape(adapter), version, ratio)
    console = Console()
    console.print(table)
    console.print(", ".join(f"{name} {state}" for name, state in found["stages"].items()))


def serve(
    config: Config,
    override: Override = None,
    host: Annotated[str | None, typer.Option(help="Default serve.host.")] = None,
    port: Annotated[int | None, typer.Option(help="Default serve.port.")] = None,
) -> None:
    """Start the HTTP endpoint with every published concept."""
    from farm.serve import app as serve_app
    from farm.serve.settings import arguments

    loaded = load_config(config, override or [])
    serve_app.run(arguments(loaded), host or loaded.serve.host, port or loaded.serve.port)


app.command(rich_help_panel=START)(cli_init.init)
app.command(rich_help_panel=START)(cli_doctor.doctor)
app.command(rich_help_panel=START)(cli_preflight.preflight)
app.command(rich_help_panel=BUILD)(run)
app.command(rich_help_panel=BUILD)(cli_add.add)
app.add_typer(cli_concepts.app, name="concepts", rich_help_panel=BUILD)
app.add_typer(cli_teachers.app, name="teachers", rich_help_panel=BUILD)
app.add_typer(cli_queue.app, name="queue", rich_help_panel=BUILD)
app.command(rich_help_panel=LOOK)(status)
app.command(rich_help_panel=LOOK)(cli_watch.watch)
app.command(rich_help_panel=LOOK)(cli_logs.logs)
app.command(rich_help_panel=LOOK)(cli_show.show)
app.command(rich_help_panel=LOOK)(cli_edit.compare)
app.command(rich_help_panel=LOOK)(cli_report.report)
app.command(rich_help_panel=LOOK)(cli_cost.cost)
app.command(rich_help_panel=LOOK)(cli_store.lineage)
app.command(rich_help_panel=PUBLISH)(cli_registry.publish)
app.command(rich_help_panel=PUBLISH)(cli_registry.rollback)
app.command(rich_help_panel=PUBLISH)(cli_registry.unpublish)
app.command(rich_help_panel=PUBLISH)(cli_registry.history)
app.command(rich_help_panel=PUBLISH)(cli_export.export)
app.command(rich_help_panel=PUBLISH)(cli_hub.push_hub)
app.add_typer(cli_keys.app, name="keys", rich_help_panel=PUBLISH)
app.command(rich_help_panel=SERVE)(serve)
app.command(rich_help_panel=SERVE)(cli_edit.edit)
app.add_typer(cli_serve_key.app, name="serve-key", rich_help_panel=SERVE)
app.command(rich_help_panel=STORE)(cli_store.verify)
app.command(rich_help_panel=STORE)(cli_store.sync)
app.command(rich_help_panel=STORE)(cli_store.gc)
app.command(rich_help_panel=STORE)(cli_migrate.migrate)


def _print_outcome(config: FarmConfig, outcome: Any, screen: Any) -> None:
    from farm.store import open_store, where

    concepts = len(config.catalogue)
    screen.table(f"failed: {len(outcome.failures)} of {concepts} concepts", outcome.failures)
    screen.table(f"not published: {len(outcome.unpublished)} of {concepts} concepts", outcome.unpublished)
    if outcome.paused:
        screen.say(
            f"the queue of adapters is paused, {outcome.paused} wait; `farm queue resume` and the same command go on"
        )
    if outcome.seconds:
        screen.say(", ".join(f"{name} {seconds:.0f} s" for name, seconds in outcome.seconds.items()))
    if outcome.report:
        screen.say(f"report: {where(open_store(config.store), outcome.report)}")


def main() -> None:
    """The console script: a user's mistake is one sentence and status 2."""
    guard(app)


def guard(command: Any) -> None:
    """Run a command as the `farm` program and the job scripts do."""
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
