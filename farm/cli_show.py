"""`farm show`: one concept, from prompt to what is served."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from farm.files import make_folder, write_whole
from farm.options import Concept, Config, Json, Override, load_config, naming


def show(
    config: Config,
    concept: Concept,
    pictures: Annotated[
        Path | None, typer.Option("--pictures", help="Write the pictures into this folder too.", show_default=False)
    ] = None,
    override: Override = None,
    as_json: Json = False,
) -> None:
    """One concept: stages, metrics, version, lineage, pictures."""
    from farm import showing
    from farm.plan import make_plan
    from farm.store import open_store

    loaded = load_config(config, override or [])
    loaded.concept(concept)
    with naming(config):
        store, plan = open_store(loaded.store), make_plan(loaded)
    facts = showing.concept_facts(store, plan, concept)
    if pictures is not None:
        make_folder(pictures)
        facts["written"] = {}
        for name, data in showing.pictures(store, plan, facts).items():
            facts["written"][name] = str(path := pictures / f"{concept}-{name}.webp")
            write_whole(path, data)
    if as_json:
        print(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console()
    for key, text in lines(facts):
        console.print(f"{key:<10} {text}", highlight=False, markup=False, soft_wrap=True)


def lines(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The same for people, a key and a text a line."""
    from rich.filesize import decimal

    from farm.cli_edit import flattened

    yield "concept", f"{facts['id']}, {facts['category']}, {facts['domain']}, {facts['role']}"
    yield "prompt", facts["prompt"]
    teacher = facts["teacher"]
    made = {k: v for k, v in teacher.items() if k not in ("name", "candidates")}
    yield "teacher", f"{teacher['name'] or 'not chosen yet'}{_settings(made)}"
    yield "stages", ", ".join(f"{name} {state}" for name, state in facts["stages"].items())
    if facts["error"]:
        yield "error", facts["error"]
    if edits := facts["edits"]:
        reasons = "".join(f", {count} {reason}" for reason, count in edits["reasons"].items())
        yield "edits", f"{edits['good']} of {edits['images']} are good{reasons}"
    if any(facts["attempts"].values()):
        yield "attempts", f"{facts['attempts']['edits']} further edits, {facts['attempts']['adapter']} trainings begun"
    if published := facts["published"]:
        served = "served" if published["served"] else "not served"
        older = "" if published["current"] or not published["served"] else ", not what the configuration makes now"
        forced = f", forced: {published['forced']}" if published["forced"] else ""
        who = f"{published['action']} {published['published_at']} by {published['published_by']}"
        yield "version", f"{published['version']}, {served}{older}; {who}{forced}"
    if adapter := facts["adapter"]:
        size = f"{decimal(adapter['served_bytes'])} served, {decimal(adapter['bytes'])} in all"
        yield "adapter", f"{adapter['digest']}, {size}, {adapter['wall_seconds']:.0f} s of training"
    for name, value in flattened(facts["metrics"] or {}).items():
        yield "", f"{name} {value}"
    for name, path in facts["lineage"].items():
        if name != "adapter":
            yield "from" if name == "quality" else "", path or f"{name}, which is not there"
    for name, address in facts["pictures"].items():
        yield name, str(address)
    for path in facts.get("written", {}).values():
        yield "written", path


def _settings(made: dict[str, Any]) -> str:
    from farm.lineage import short

    shown = ", ".join(f"{key} {short(value)}" for key, value in made.items() if value is not None)
    return f": {shown}" if shown else ""
