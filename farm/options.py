"""What several commands share: their options, and how they name the file a mistake is in."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm.errors import UserError
from farm.stop import Stop, StoppedError

if TYPE_CHECKING:
    from farm.config import FarmConfig


def concept_ids(context: typer.Context, incomplete: str) -> list[str]:
    """What a shell offers for a concept: the ids of the farm's catalogue, as far as its file can be read quickly."""
    from farm.completion import ids

    return [name for name in ids(context.params.get("config")) if name.startswith(incomplete)]


Config = Annotated[Path, typer.Option("--config", "-c", help="The farm's YAML file.", show_default=False)]
Concept = Annotated[str, typer.Argument(help="The concept's id.", show_default=False, autocompletion=concept_ids)]
Override = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a configuration key; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class LogFormat(StrEnum):
    """What a run shows on standard error: bars and sentences, or its events as lines of JSON."""

    HUMAN = "human"
    JSON = "json"


Log = Annotated[LogFormat, typer.Option("--log", help="Standard error: for people, or a line of JSON an event.")]


def _complain(line: str) -> None:
    print(line, file=sys.stderr)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> FarmConfig:
    """See `farm.config_file.load_config`, which takes longer to import than `farm --help` may take."""
    from farm.config_file import load_config as load

    return load(path, overrides)


class Told:
    """What became of several things: a line each for people, as soon as it is known, or all at the end as JSON."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._rows: list[dict[str, Any]] = []

    def __call__(self, line: str, **facts: Any) -> None:
        if self._as_json:
            self._rows.append({**facts, "said": line})
        else:
            print(line)

    def end(self, key: str) -> None:
        """Print the JSON: a list under this key, each with what is known of it and the line that people read."""
        if self._as_json:
            print(json.dumps({key: self._rows}, indent=1))


@contextmanager
def resumable(grace_seconds: float = 0, say: Callable[[str], None] = _complain) -> Iterator[Stop]:
    """Ctrl-C ends what goes on from the store with a word and status 130; SIGTERM, after a grace period, with 143."""
    stop = Stop(grace_seconds)
    try:
        with stop.on_sigterm():
            yield stop
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from here")
        raise typer.Exit(130) from None
    except StoppedError:
        say("stopped; the same command goes on from here")
        raise typer.Exit(143) from None


@contextmanager
def naming(config: Path) -> Iterator[None]:
    """Put the configuration's file in front of a mistake that names one of its keys."""
    try:
        yield
    except UserError as error:
        from farm.config import FarmConfig

        key = str(error).partition(":")[0].partition(".")[0]
        raise UserError(f"{config}: {error}" if key in FarmConfig.model_fields else str(error)) from error
