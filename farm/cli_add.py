"""`farm add`: a new concept, from its prompt to what is served."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from farm.files import write_whole
from farm.options import Config, Json, Override, load_config, naming, resumable

ConceptId = Annotated[str, typer.Argument(metavar="ID", help="The new concept's id.", show_default=False)]
Prompt = Annotated[
    str, typer.Option("--prompt", help="The instruction, such as `make the person sad`.", show_default=False)
]
Teachers = Annotated[
    list[str] | None, typer.Option("--teacher", help="One of the farm's teachers; repeatable; default all of them.")
]
OwnEditor = Annotated[
    str | None,
    typer.Option("--editor", metavar="YAML", help="A teacher of its own: '{kind: procedural, style: night}'."),
]


def add(
    config: Config,
    concept: ConceptId,
    prompt: Prompt,
    teacher: Teachers = None,
    editor: OwnEditor = None,
    name: Annotated[str, typer.Option(help="As people spell it; the id in words when left out.")] = "",
    category: Annotated[str, typer.Option(help="What it is listed under.")] = "other",
    before: Annotated[str | None, typer.Option(help="A caption of the photo, `a photo of a person`.")] = None,
    after: Annotated[str | None, typer.Option(help="A caption of the edited photo, `a photo of a sad person`.")] = None,
    domain: Annotated[str, typer.Option(help="face or scenery.")] = "scenery",
    no_run: Annotated[bool, typer.Option("--no-run", help="Only add it; `farm run` makes it.")] = False,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Even if base and all adapters are made anew.")] = False,
    override: Override = None,
    as_json: Json = False,
) -> None:
    """A new concept, from a prompt to a served adapter.

    It is put at the end of the catalogue's file, or of the configuration's own list, then edited, trained and
    published. The same command goes on after an interruption. Exits with 1 when it was not published.
    """
    from farm import run as farm_run
    from farm.adding import addition, check_addition, taught
    from farm.catalogue_file import new_entry
    from farm.progress import Screen
    from farm.store import open_store

    loaded = load_config(config, override or [])
    entry, made = new_entry(
        concept,
        prompt,
        name=name,
        category=category,
        before=before,
        after=after,
        domain=domain,
        taught=taught(loaded, teacher or (), editor),
    )
    found = addition(config, loaded, entry, made)
    screen = Screen()
    if found.text is not None:
        with naming(config):
            check_addition(config, open_store(loaded.store), loaded, made, rebuild=rebuild)
        write_whole(found.file.resolve(), found.text.encode())
        screen.say(f"{found.file}: added {made.id}")
    facts: dict[str, Any] = {"concept": made.id, "file": str(found.file), "added": found.text is not None}
    failed = None
    if not no_run:
        loaded = load_config(config, override or [])
        with naming(config), resumable(loaded.cluster.grace_seconds) as stop:
            outcome = farm_run.run(loaded, screen=screen, stop=stop, only=[made.id])
        failed = outcome.failures.get(made.id) or outcome.unpublished.get(made.id)
        facts |= _published(loaded, made.id) | {"error": failed, "report": outcome.report}
    if as_json:
        print(json.dumps(facts, indent=1))
    elif facts.get("version"):
        print(f"{made.id}: version {facts['version']} is published: {facts['adapter']}")
        print(f"try it: farm edit --config {config} --concept {made.id} PHOTO edited.png")
    elif failed:
        print(f"{made.id} is not published: {failed}")
    if failed or (not no_run and not facts["version"]):
        raise typer.Exit(1)


def _published(config: Any, concept_id: str) -> dict[str, Any]:
    from farm.registry import Registry
    from farm.signing import open_keys
    from farm.store import open_store, where

    store = open_store(config.store)
    entry = Registry(store, open_keys(None, config.signing.public_keys)).get(concept_id)
    if entry is None:
        return {"version": None, "digest": None, "adapter": None}
    return {"version": entry.version, "digest": entry.digest, "adapter": where(store, entry.adapter)}
