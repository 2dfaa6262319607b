"""`farm publish`, `rollback`, `unpublish` and `history`: what is served, and what was."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm.errors import StoreError, UserError
from farm.options import Concept, Config, Json, Override, Told, load_config, naming
from farm.spelling import near

if TYPE_CHECKING:
    from farm.registry import Entry, Registry, Release


def publish(
    config: Config,
    concepts: Annotated[
        list[str] | None, typer.Argument(metavar="[CONCEPT]...", help="Concepts.", show_default=False)
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every finished adapter, but for those taken out of service by hand.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also adapters that are not good enough; the history says so.")
    ] = False,
    override: Override = None,
    as_json: Json = False,
) -> None:
    """Publish the adapters of concepts as the configuration has them; exits with 1 when one was not published."""
    from farm.artifacts import find
    from farm.plan import make_plan
    from farm.publishing import due, publish_by_hand

    registry = _registry(config, override)
    with naming(config):
        plan = make_plan(load_config(config, override or []))
    ids = [concept.id for concept in plan.config.catalogue]
    if bool(concepts) == everything:
        raise UserError("farm publish: name the concepts or say --all, one of the two.")
    for name in concepts or ():
        if name not in ids:
            raise UserError(
                f"farm publish: there is no {name!r} in the catalogue of {plan.config.name}; {near(name, ids)}"
            )
    failed, told = False, Told(as_json=as_json)
    for concept_id in ids if everything else dict.fromkeys(concepts or ()):
        digest = plan.adapter(concept_id).digest
        try:
            record = registry.record(concept_id)
            if record and record.published and record.digest == digest:
                told(f"{concept_id}: version {record.version} is this adapter already", **_facts(record, False))
            elif everything and not due(record, digest):
                line = f"{concept_id}: left out of service; `farm publish {concept_id}` puts it back"
                told(line, concept=concept_id, changed=False)
            elif everything and find(registry.store, plan.adapter(concept_id).path) is None:
                told(f"{concept_id}: no adapter yet", concept=concept_id, changed=False)
            else:
                made = publish_by_hand(registry.store, plan, concept_id, force=force, keys=registry.keys)
                told(_told(made), **_facts(made, True))
        except StoreError:
            raise
        except UserError as error:
            failed = True
            told(str(error), concept=concept_id, changed=False, error=str(error))
    told.end("concepts")
    if failed:
        raise typer.Exit(1)


def rollback(
    config: Config,
    concept: Concept,
    to: Annotated[
        int | None, typer.Option("--to", help="The version whose adapter to publish again.", show_default=False)
    ] = None,
    override: Override = None,
    as_json: Json = False,
) -> None:
    """Publish an earlier adapter again, as a new version; by default the one before the current."""
    registry = _known(config, override, concept)
    target, mine = registry.target(concept, to), uuid.uuid4().hex
    try:
        entry = registry.rollback(concept, target.version, mine)
    except StoreError as error:  # the same command without --to might go back to where it began
        hint = f"; say --to {target.version} then, for it may have happened already." if to is None else "."
        raise StoreError(str(error).rstrip(".") + hint) from error
    already = f"{concept}: version {entry.version} is the adapter of version {target.version} already"
    _print_change(entry, entry.id == mine, already, as_json)


def unpublish(config: Config, concept: Concept, override: Override = None, as_json: Json = False) -> None:
    """Take a concept out of service; its history stays, and `farm rollback` or `farm publish` puts it back."""
    registry = _known(config, override, concept)
    mine = uuid.uuid4().hex
    entry = registry.unpublish(concept, mine)
    _print_change(entry, entry.id == mine, f"{concept}: it is not published", as_json)


def history(config: Config, concept: Concept, override: Override = None, as_json: Json = False) -> None:
    """Every version of a concept: what, when, by whom, how good."""
    record = _known(config, override, concept).record(concept)
    assert record is not None
    releases = record.releases
    if as_json:
        current = record.version if record.published else None
        rows = [release.model_dump() for release in releases]
        print(json.dumps({"concept": concept, "published": current, "releases": rows}, indent=1))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("version", "what", "adapter", "base", "L1 / untouched", "when", "by", title=escape(concept))
    for release in reversed(releases):
        scores = release.metrics
        ratio = f"{scores['l1']:.3f} / {scores['l1_untouched']:.3f}" if "l1_untouched" in scores else "-"
        served = " *" if record.published and release.version == record.version else ""
        names = (release.digest[:12], release.base[:12])
        who = (release.published_at, escape(release.published_by))
        table.add_row(f"{release.version}{served}", escape(_what(release)), *names, ratio, *who)
    console = Console()
    console.print(table)
    console.print("* is served" if record.published else "not published now")


def _what(release: Release) -> str:
    restores = f" to {release.restores}" if release.action == "rolled-back" else ""
    forced = f", forced: {release.forced}" if release.forced else ""
    return f"{release.action}{restores}{forced}"


def _told(entry: Entry) -> str:
    """One line about a change."""
    return f"{entry.concept}: version {entry.version}, {_what(entry)}, adapter {entry.digest}"


def _facts(entry: Entry, changed: bool) -> dict[str, Any]:
    """The same for programs. changed: whether this command made the release."""
    facts = entry.model_dump(
        include={"concept", "version", "action", "adapter", "digest", "base", "restores", "forced"}
    )
    return {**facts, "published": entry.published, "changed": changed}


def _print_change(entry: Entry, changed: bool, otherwise: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_facts(entry, changed), indent=1))
    else:
        print(_told(entry) if changed else otherwise)


def _registry(config: Path, override: list[str] | None) -> Registry:
    from farm.registry import Registry
    from farm.signing import open_keys
    from farm.store import open_store

    loaded = load_config(config, override or [])
    with naming(config):
        keys = open_keys(loaded.signing.private_key, loaded.signing.public_keys)
        return Registry(open_store(loaded.store, loaded.cluster.store_patience_seconds), keys)


def _known(config: Path, override: list[str] | None, concept: str) -> Registry:
    """The registry, in which the concept has a record."""
    registry = _registry(config, override)
    known = registry.concepts()
    if concept not in known:
        raise UserError(f"{concept!r} was never published in {registry.store.url}; {near(concept, known)}")
    return registry
