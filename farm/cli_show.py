"""`farm show`: one concept, from prompt to what is served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

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
    for key, text in showing.lines(facts):
        console.print(f"{key:<10} {text}", highlight=False, markup=False, soft_wrap=True)
