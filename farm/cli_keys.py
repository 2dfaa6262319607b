"""`farm keys`: the keys that what is published is signed with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from farm.errors import UserError
from farm.options import Config, Json, Override, Told, load_config, naming

app = typer.Typer(help="Keys, and signatures of what is published.", no_args_is_help=True)


@app.command()
def new(
    path: Annotated[Path, typer.Argument(help="The file to write.", show_default=False)], as_json: Json = False
) -> None:
    """Make a private key, in a file that only you can read."""
    from farm.signing import new_key, public_text

    public = public_text(new_key(path))
    if as_json:
        print(json.dumps({"private_key": str(path), "public_key": public}, indent=1))
        return
    print(f"{path} holds a private key: keep it out of the store, and a copy of it in a safe place.\n")
    print(f"Where adapters are published:\n  signing: {{private_key: {path}, public_keys: [{public}]}}")
    print(f"Where they are only served:\n  signing: {{public_keys: [{public}]}}")


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="A private key's file.", show_default=False)], as_json: Json = False
) -> None:
    """Print the public half of a private key."""
    from farm.signing import public_text, read_public

    public = public_text(read_public(path))
    print(json.dumps({"public_key": public}, indent=1) if as_json else public)


@app.command()
def sign(config: Config, override: Override = None, as_json: Json = False) -> None:
    """Sign what was published before signatures were in use, or with another key. It counts as yours as it is then:
    `farm verify` first."""
    from farm.registry import Registry
    from farm.signing import open_keys
    from farm.store import open_store

    loaded = load_config(config, override or [])
    with naming(config):
        if not loaded.signing.public_keys:
            raise UserError("signing: is missing, so there is no key to sign with; `farm keys new FILE` makes one.")
        keys = open_keys(loaded.signing.private_key, loaded.signing.public_keys)
        keys.need_private()
        registry = Registry(open_store(loaded.store, loaded.cluster.store_patience_seconds), keys)
    failed, told = False, Told(as_json=as_json)
    for concept in registry.concepts():
        try:
            new = registry.sign(concept)
            told(f"{concept}: {'signed' if new else 'signed with this key already'}", concept=concept, changed=new)
        except UserError as error:
            failed = True
            told(str(error), concept=concept, changed=False, error=str(error))
    told.end("concepts")
    if failed:
        raise typer.Exit(1)
