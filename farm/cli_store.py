"""`farm gc`, `verify`, `sync` and `lineage`: looking after what a store holds."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm.errors import UserError
from farm.options import Config, Json, Override, load_config, naming, resumable

if TYPE_CHECKING:
    from farm.garbage import Garbage
    from farm.plan import Plan
    from farm.store import Store

Configs = Annotated[
    list[Path],
    typer.Option(
        "--config", "-c", help="A farm's YAML file; repeat it for all that share the store.", show_default=False
    ),
]
PATIENCE_SECONDS = 600.0
"""How long `farm sync`, which reads no configuration, waits for a store that stopped answering."""
TURN_SECONDS = 120.0


def lineage(
    config: Config,
    what: Annotated[
        str, typer.Argument(metavar="CONCEPT|DIGEST", help="A concept, or a digest's first digits.", show_default=False)
    ],
    override: Override = None,
    as_json: Json = False,
) -> None:
    """Where an adapter comes from: base, edits, teacher, prompt, photographs, seeds, versions."""
    from farm.lineage import trace
    from farm.store import open_store

    loaded = load_config(config, override or [])
    with naming(config):
        found = trace(open_store(loaded.store, loaded.cluster.store_patience_seconds), what)
    if as_json:
        print(json.dumps(found.document(), indent=1))
        return
    from rich.console import Console

    Console().print(found.tree())


def gc(
    config: Configs,
    grace_days: Annotated[float, typer.Option(min=0, help="Delete nothing younger than this.")] = 7,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be deleted.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    unfinished: Annotated[
        bool,
        typer.Option(
            "--unfinished", help="Also unfinished work and checkpoints of no configuration given, of any age."
        ),
    ] = False,
    override: Override = None,
    as_json: Json = False,
) -> None:
    """Delete old artifacts that no release, run, pack or configuration refers to."""
    from farm import garbage as rubbish

    store, plans = _open(config, override)
    before = datetime.now(UTC) - timedelta(days=grace_days)
    if dry_run:
        _show(rubbish.find_garbage(store, plans, before=before), unfinished, as_json, {"dry_run": True})
        return
    with resumable(), _alone(store):
        rubbish.put_back(store)
        found = rubbish.find_garbage(store, plans, before=before)
        count = len(found.artifacts) + unfinished * len(found.unfinished)
        if not as_json:
            _show(found, unfinished, as_json, {})
        if count and not yes:
            if not sys.stdin.isatty():
                raise UserError("farm gc: nobody is there to ask; say --yes to delete, or --dry-run to only look.")
            typer.confirm(f"delete {count} folders?", abort=True)
        with _progress("gc") as show:
            if unfinished:
                rubbish.delete_unfinished(store, found)
            rescued = rubbish.collect(store, found, show) if found.artifacts else []
    if as_json:
        _show(found, unfinished, as_json, {"dry_run": False, "kept": rescued})
        return
    for path in rescued:
        print(f"kept, published meanwhile: {path}")
    print(f"deleted {count - len(rescued)} folders")


def _show(found: Garbage, unfinished: bool, as_json: bool, more: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Table

    from farm.garbage import size_of

    facts: dict[str, Any] = {
        path: {"stage": manifest.stage, "created_at": manifest.created_at, "bytes": size_of(manifest)}
        for path, manifest in found.artifacts.items()
    }
    if as_json:
        left = {"young": found.young, "damaged": found.damaged}
        rows = {"artifacts": facts, "bytes": found.size, "unfinished": found.unfinished if unfinished else []}
        print(json.dumps({**more, **rows, **left}, indent=1))
        return
    table = Table("folder", "made", "size")
    for path, fact in facts.items():
        table.add_row(escape(path), fact["created_at"], decimal(fact["bytes"]))
    for path in found.unfinished if unfinished else ():
        table.add_row(escape(path), "unfinished", f"{len(found.keys[path])} objects")
    console = Console()
    if table.row_count:
        console.print(table)
    console.print(f"{len(facts)} artifacts that nothing refers to, {decimal(found.size)}", highlight=False)
    if found.young:
        console.print(f"{found.young} more are kept, too young or what such a one was made from", highlight=False)
    if found.unfinished and not unfinished:
        console.print(f"{len(found.unfinished)} unfinished folders are left alone; see --unfinished", highlight=False)
    for path in found.damaged:
        console.print(f"left alone, its manifest is damaged: {path}", highlight=False, markup=False)


def verify(config: Configs, override: Override = None, as_json: Json = False) -> None:
    """Read and hash again everything that releases, runs, packs and the configuration refer to; exits with 1 when
    something is not as it was put there."""
    from rich.filesize import decimal

    from farm.signing import Keys, open_keys
    from farm.verify import verify as verify_store

    store, plans = _open(config, override)
    public: list[bytes] = []
    for path, plan in zip(config, plans, strict=True):
        with naming(path):
            public += open_keys(None, plan.config.signing.public_keys).public
    with resumable(), _progress("verify") as show:
        found = verify_store(store, plans, show, Keys(tuple(dict.fromkeys(public))))
    if as_json:
        print(json.dumps(vars(found), indent=1))
    else:
        for problem in found.problems:
            print(problem)
        read = f"{found.concepts} concepts, {found.artifacts} artifacts, {found.files} files, {decimal(found.size)}"
        print(f"{read}: {len(found.problems) or 'no'} problem{'s' * (len(found.problems) != 1)}")
    if found.problems:
        raise typer.Exit(1)


def sync(
    source: Annotated[str, typer.Argument(metavar="SRC", help="The store to read.", show_default=False)],
    target: Annotated[str, typer.Argument(metavar="DST", help="The store to bring up to it.", show_default=False)],
    public_key: Annotated[
        list[str] | None,
        typer.Option("--public-key", help="Copy only what this key signed: a file, or what `farm keys show` prints."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Copy what one store has finished into another; the same command goes on after an interruption. Exits with 1 when
    something could not be copied."""
    from rich.filesize import decimal

    from farm.layout import mark_layout
    from farm.signing import open_keys
    from farm.store import open_store
    from farm.sync import sync as sync_stores

    try:
        keys = open_keys(None, public_key or ())
    except UserError as error:
        raise UserError(re.sub(r"signing\.public_keys\.\d+", "--public-key", str(error))) from error
    read, written = open_store(source, PATIENCE_SECONDS), open_store(target, PATIENCE_SECONDS)
    if read.url == written.url:
        raise UserError(f"farm sync: {source} and {target} are one store; name two.")
    if not any(True for _ in read.list()):
        raise UserError(f"farm sync: there is nothing in {read.url}; check its address.")
    with resumable(), _alone(written), _progress("sync") as show:
        mark_layout(written)
        copied = sync_stores(read, written, show, keys)
    if as_json:
        print(json.dumps(vars(copied), indent=1))
    else:
        for problem in copied.problems:
            print(problem)
        print(
            f"copied {copied.artifacts} artifacts and {copied.concepts} concepts' versions, {decimal(copied.size)}; "
            f"{copied.there} artifacts were there"
        )
    if copied.problems:
        raise typer.Exit(1)


@contextmanager
def _alone(store: Store) -> Iterator[None]:
    """While nobody else collects garbage in the store or copies into it."""
    from farm.garbage import TURN
    from farm.turn import turn

    def wait(owner: str) -> None:
        print(f"{owner} is cleaning up {store.url} or copying into it: waiting for it to end", file=sys.stderr)

    with turn(store, TURN, seconds=TURN_SECONDS, on_wait=wait):
        yield


@contextmanager
def _progress(name: str) -> Iterator[Any]:
    from farm.progress import Screen

    with Screen().bar(name) as bar:
        yield bar.update


def _open(configs: list[Path], override: list[str] | None) -> tuple[Store, list[Plan]]:
    """The store that the configurations share, and what each farm makes."""
    from farm.plan import make_plan
    from farm.store import open_store

    plans, stores = [], []
    for config in configs:
        loaded = load_config(config, override or [])
        with naming(config):
            stores.append(open_store(loaded.store, loaded.cluster.store_patience_seconds))
            plans.append(make_plan(loaded))
        if stores[-1].url != stores[0].url:
            raise UserError(
                f"{config}: store: {loaded.store} is another store than that of {configs[0]}; give one at a time."
            )
    return stores[0], plans
