"""`farm push-hub`: a published adapter on the Hugging Face Hub."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from farm.errors import UserError
from farm.options import Config, Json, Override, load_config, naming
from farm.spelling import near


def push_hub(
    config: Config,
    concept: Annotated[str, typer.Argument(help="The concept's id.", show_default=False)],
    repo: Annotated[str, typer.Option("--repo", help="The model repository, user/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make the repository a private one.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="The branch; default main.")] = None,
    override: Override = None,
    as_json: Json = False,
) -> None:
    """Upload a published adapter's folder to the Hugging Face Hub, with your own token."""
    from farm.hub import push
    from farm.registry import Registry
    from farm.signing import open_keys
    from farm.store import open_store

    loaded = load_config(config, override or [])
    with naming(config):
        keys = open_keys(None, loaded.signing.public_keys)
        registry = Registry(open_store(loaded.store, loaded.cluster.store_patience_seconds), keys)
    entry = registry.get(concept)
    if entry is None:
        raise UserError(f"{concept!r} is not published in {registry.store.url}; {near(concept, list(registry.list()))}")
    pushed = push(registry.store, entry, repo, private=private, revision=revision, keys=keys)
    if as_json:
        facts = {"concept": concept, "version": entry.version, "digest": entry.digest}
        print(json.dumps({**facts, **vars(pushed)}, indent=1))
        return
    print(f"{concept}: version {entry.version}, {pushed.files} files of {pushed.size:,} bytes, is at {pushed.url}")
