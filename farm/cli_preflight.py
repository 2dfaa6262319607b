"""`farm preflight`: everything that can be known before a run, a line each."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farm.errors import UserError
from farm.options import Config, Json, Override, load_config, naming

if TYPE_CHECKING:
    from farm.preflight import Check

WorkingDir = Annotated[Path, typer.Option("--working-dir", help="What `ray job submit` would be given.")]
STYLES = {"ok": "green", "warning": "yellow", "error": "red"}


def preflight(
    config: Config,
    override: Override = None,
    working_dir: WorkingDir = Path(),
    as_json: Json = False,
) -> None:
    """Look at all that a run needs: photos, weights, store, disk, upload, token, nodes. Exits with 1 on an error."""
    show(checks(config, override or [], working_dir), as_json=as_json)


def show(checked: Iterable[Check], *, as_json: bool) -> None:
    """Print checks as they are made, as a table or as JSON; typer.Exit with 1 when there is an error among them."""
    found = []
    with nullcontext() if as_json else _table() as table:
        for check in checked:
            found.append(check)
            if table:
                table(check)
    errors = sum(check.state == "error" for check in found)
    if as_json:
        print(json.dumps({"ok": not errors, "checks": [asdict(check) for check in found]}, indent=1))
    if errors:
        raise typer.Exit(1)


@contextmanager
def _table() -> Iterator[Callable[[Check], None]]:
    """A table that takes a row a check, and on a terminal shows each at once."""
    from rich.console import Console
    from rich.live import Live
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table("", "what", "found")

    def add(check: Check) -> None:
        table.add_row(f"[{STYLES[check.state]}]{check.state}", check.what, escape(check.found))
        if live:
            live.refresh()

    with Live(table, console=console, auto_refresh=False) if console.is_terminal else nullcontext() as live:
        yield add
    if not live:
        console.print(table)


def checks(path: Path, overrides: list[str], working_dir: Path) -> Iterator[Check]:
    """What is wrong does not hide what comes after it, unless that needs it."""
    from farm.cluster.inspect import check_cluster, check_token
    from farm.cluster.upload import check_upload
    from farm.plan import make_plan
    from farm.preflight import Check, check_disk, check_store, weights_of
    from farm.store import LocalStore, open_store

    try:
        config = load_config(path, overrides)
    except UserError as error:
        yield Check("configuration", "error", str(error))
        yield check_upload(working_dir)
        return
    yield Check("configuration", "ok", f"{config.name}: {len(config.catalogue)} concepts")
    plan = store = None
    try:
        with naming(path):
            plan = make_plan(config)
    except UserError as error:
        yield Check("photos and models", "error", str(error))
    else:
        names = [w.model for w in weights_of(plan)]
        found = ", ".join([f"{len(plan.photos['photos'])} photos", *names])
        yield Check("photos and models", "ok", found)
    try:
        opened = open_store(config.store)
    except UserError as error:
        yield Check("store", "error", str(error))
    else:
        works = check_store(opened)
        yield works
        if works.state == "ok":
            store = opened
            if plan is not None and isinstance(opened, LocalStore):
                yield check_disk(opened, plan)
    yield check_upload(working_dir)
    yield check_token(config.cluster.address or os.environ.get("RAY_ADDRESS"))
    yield from check_cluster(config, store, weights_of(plan) if plan is not None else [])
