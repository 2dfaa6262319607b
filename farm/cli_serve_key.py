"""`farm serve-key`: keys of the endpoint."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from farm.errors import UserError
from farm.options import Json

app = typer.Typer(help="Keys of the endpoint.", no_args_is_help=True)


@app.callback()
def keys() -> None:
    """Keys of the endpoint."""


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Whose it is, for you to know: lower-case words joined by hyphens.")],
    admin: Annotated[bool, typer.Option("--admin", help="It opens /v1/admin too.")] = False,
    per_minute: Annotated[int | None, typer.Option(min=1, help="How many edits a minute it is good for.")] = None,
    as_json: Json = False,
) -> None:
    """Make a key: the key itself is shown once, and what goes into the configuration is its hash."""
    from pydantic import ValidationError

    from farm.serve.access import new_key
    from farm.serve.config import ApiKey

    key, hashed = new_key()
    try:
        made = ApiKey(name=name, sha256=hashed, admin=admin, per_minute=per_minute)
    except ValidationError as error:
        raise UserError(
            f"{name!r} is no name of a key: use lower-case words and digits joined by single hyphens."
        ) from error
    if as_json:
        print(json.dumps({"key": key, "entry": made.model_dump(exclude_defaults=True)}, indent=1))
        return
    entry = ", ".join(f"{field}: {_yaml(value)}" for field, value in made.model_dump(exclude_defaults=True).items())
    typer.echo("The key, which nobody can show again:", err=True)
    typer.echo(key)
    typer.echo("For the configuration's `serve.keys`, or `keys` in serve.yaml:", err=True)
    typer.echo(f"- {{{entry}}}")


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)
