"""`farm queue`: the adapters that wait, run and failed, and what to do with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm.errors import UserError
from farm.options import Config, Json, Override, Told, concept_ids, load_config, naming
from farm.spelling import near

if TYPE_CHECKING:
    from farm.plan import Plan
    from farm.queue import Queue
    from farm.store import Store

app = typer.Typer(help="The queue of adapters to train, which `farm run` works.", no_args_is_help=True)

Concepts = Annotated[
    list[str] | None,
    typer.Argument(metavar="[CONCEPT]...", help="Concepts.", show_default=False, autocompletion=concept_ids),
]
Items = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONCEPT|KEY]...",
        help="Concepts, or keys that `list` prints.",
        show_default=False,
        autocompletion=concept_ids,
    ),
]


@app.command()
def add(
    config: Config,
    concepts: Concepts = None,
    everything: Annotated[bool, typer.Option("--all", help="Every concept of the catalogue.")] = False,
    priority: Annotated[int, typer.Option(help="Higher ones are trained first.")] = 0,
    override: Override = None,
    as_json: Json = False,
) -> None:
    """Queue the adapters of concepts as the configuration has them now; a run under way takes them up."""
    from farm.artifacts import find
    from farm.standing import quarantined

    store, plan, queue = _open(config, override)
    ids = [concept.id for concept in plan.config.catalogue]
    failed = {item.key for item in queue.failed()}
    pending = {item.key: item for item in queue.pending()}
    shared = {"the base": plan.base, "the rank search": plan.ranks}
    told = Told(as_json=as_json)
    for concept_id in _chosen(concepts, everything, ids, ids, plan):
        key = plan.adapter_key(concept_id)
        if find(store, plan.adapter(concept_id).path):
            told(f"{concept_id}: its adapter is there already", concept=concept_id, changed=False)
        elif key in failed:
            told(
                f"{concept_id}: it failed; `farm queue retry {concept_id}` queues it again",
                concept=concept_id,
                changed=False,
            )
        elif key in pending:
            told(f"{concept_id}: queued already, priority {pending[key].priority}", concept=concept_id, changed=False)
        elif reason := quarantined(store, plan, concept_id):
            told(f"{concept_id}: not queued, quarantined: {reason}", concept=concept_id, changed=False)
        else:
            queue.enqueue(key, {"concept": concept_id}, priority)
            missing = [name for name, spec in shared.items() if find(store, spec.path) is None]
            if find(store, plan.quality(concept_id).path) is None:
                missing.insert(0, "its edits")
            wants = f"; `farm run` has to make {' and '.join(missing)} first" if missing else ""
            told(f"{concept_id}: queued, priority {priority}{wants}", concept=concept_id, changed=True)
    told.end("items")


@app.command("list")
def list_(config: Config, override: Override = None, as_json: Json = False) -> None:
    """What waits, what is being trained and by whom, and what failed."""
    _, plan, queue = _open(config, override)
    rows, paused = _rows(queue, plan), queue.paused()
    if as_json:
        print(json.dumps({"paused": paused, "items": rows}, indent=1))
        return
    if paused:
        print("paused: `farm queue resume` goes on")
    if not rows:
        print("the queue is empty")
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("concept", "state", "priority", "attempts", "owner", "expires in", "last error")
    for row in rows:
        name = row["concept"] if row["current"] else f"{row['key']} (of another configuration)"
        expires = "-" if row["expires_in"] is None else f"{row['expires_in']:.0f} s"
        counts = (str(row["priority"]), str(row["attempts"]))
        table.add_row(escape(name), row["state"], *counts, row["owner"] or "-", expires, escape(row["error"]))
    Console().print(table)


@app.command()
def retry(
    config: Config,
    items: Items = None,
    everything: Annotated[bool, typer.Option("--all", help="Every concept that failed.")] = False,
    override: Override = None,
    as_json: Json = False,
) -> None:
    """Queue again what failed, its attempts forgotten."""
    from farm.store import NotFoundError

    _, plan, queue = _open(config, override)
    rows = _rows(queue, plan)
    failed = [row["concept"] for row in rows if row["state"] == "failed" and row["current"]]
    told = Told(as_json=as_json)
    for name in _chosen(items, everything, failed, _names(rows, plan), plan):
        try:
            queue.retry(_key(name, plan))
        except NotFoundError:
            told(f"{name}: it has not failed", item=name, changed=False)
        else:
            told(f"{name}: queued again", item=name, changed=True)
    told.end("items")
    if everything and not failed and not as_json:
        print("nothing has failed")


@app.command()
def drop(config: Config, items: Items = None, override: Override = None, as_json: Json = False) -> None:
    """Take items off the queue; exits with 1 when one of them is being worked on."""
    from farm.queue import owner_name

    _, plan, queue = _open(config, override)
    rows = {row["key"]: row for row in _rows(queue, plan)}
    refused, told = False, Told(as_json=as_json)
    for name in _chosen(items, False, [], _names(list(rows.values()), plan), plan):
        key = _key(name, plan)
        if key not in rows:
            told(f"{name}: it is not in the queue", item=name, changed=False)
        elif queue.withdraw(key, owner_name()):
            told(f"{name}: dropped", item=name, changed=True)
        else:
            refused = True
            why = "it is being trained (`farm queue list` says by whom)"
            told(f"{name}: not dropped, {why}", item=name, changed=False, error=why)
    told.end("items")
    if refused:
        raise typer.Exit(1)


@app.command()
def pause(config: Config, override: Override = None, as_json: Json = False) -> None:
    """Start nothing more; what is being trained is finished."""
    paused = _queue(config, override).pause()
    told = Told(as_json=as_json)
    told("paused: what runs is finished, `farm queue resume` goes on" if paused else "paused already", changed=paused)
    told.end("queue")


@app.command()
def resume(config: Config, override: Override = None, as_json: Json = False) -> None:
    """End a pause."""
    resumed = _queue(config, override).resume()
    told = Told(as_json=as_json)
    told("resumed: `farm run` trains what waits" if resumed else "the queue is not paused", changed=resumed)
    told.end("queue")


def _queue(config: Path, override: list[str] | None) -> Queue:
    from farm.queue import Queue
    from farm.store import open_store

    loaded = load_config(config, override or [])
    with naming(config):
        return Queue(open_store(loaded.store), "adapters")


def _open(config: Path, override: list[str] | None) -> tuple[Store, Plan, Queue]:
    from farm.plan import make_plan

    queue = _queue(config, override)
    with naming(config):
        return queue.store, make_plan(load_config(config, override or [])), queue


def _chosen(
    names: Sequence[str] | None, everything: bool, all_names: Sequence[str], known: Sequence[str], plan: Plan
) -> list[str]:
    """The names asked for, each once, or all."""
    if bool(names) == everything:
        raise UserError("farm queue: name the concepts or say --all, one of the two.")
    for name in names or ():
        if name not in known:
            raise UserError(
                f"farm queue: there is no {name!r} in the catalogue of {plan.config.name} or in its queue; "
                f"{near(name, known)}"
            )
    return list(all_names) if everything else list(dict.fromkeys(names or ()))


def _names(rows: Sequence[dict[str, Any]], plan: Plan) -> list[str]:
    return [concept.id for concept in plan.config.catalogue] + [row["key"] for row in rows]


def _key(name: str, plan: Plan) -> str:
    """The key of a concept, as it is configured now, or the key itself."""
    known = {concept.id for concept in plan.config.catalogue}
    return plan.adapter_key(name) if name in known else name


def _rows(queue: Queue, plan: Plan) -> list[dict[str, Any]]:
    """The items in the order of leasing, failed ones last; an expired lease counts as none."""
    current = {plan.adapter_key(concept.id) for concept in plan.config.catalogue}
    leases = {lease.item.key: lease for lease in queue.leased()}
    pending, failed = queue.pending(), queue.failed()
    rows = []
    for place, item in enumerate([*pending, *failed]):
        lease = leases.get(item.key) if place < len(pending) else None
        waits = "leased" if lease else "pending"
        rows.append(
            {
                "key": item.key,
                "concept": item.payload["concept"],
                "current": item.key in current,
                "state": waits if place < len(pending) else "failed",
                "priority": item.priority,
                "attempts": item.attempts,
                "owner": lease.hold.owner if lease else None,
                "expires_in": round(lease.hold.expires_at - queue.now(), 1) if lease else None,
                "error": (item.error.strip().splitlines() or [""])[-1],
            }
        )
    return rows
