"""`farm report`: the report of what the store holds now, built anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from farm.files import write_whole
from farm.options import Config, Json, Override, load_config, naming


def report(
    config: Config,
    override: Override = None,
    output: Annotated[
        Path | None, typer.Option("--out", help="Write it to this file as well.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Build the report of what there is now, one HTML file, and print where it is."""
    from farm.plan import make_plan
    from farm.reporting import rebuild
    from farm.store import open_store, where

    loaded = load_config(config, override or [])
    with naming(config):
        store = open_store(loaded.store, loaded.cluster.store_patience_seconds)
        key = rebuild(store, make_plan(loaded))
    page = store.get(key)
    if output is not None:
        write_whole(output, page)
    place = where(store, key)
    if as_json:
        print(json.dumps({"report": place, "key": key, "bytes": len(page), "file": str(output) if output else None}))
    else:
        print(output or place)
