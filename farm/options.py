"""What several commands share: their options, and how they name the file a mistake is in."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from farm.config import FarmConfig
from farm.errors import UserError
from farm.stop import Stop, StoppedError

Config = Annotated[Path, typer.Option("--config", "-c", help="The farm's YAML file.", show_default=False)]
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
        key = str(error).partition(":")[0].partition(".")[0]
        raise UserError(f"{config}: {error}" if key in FarmConfig.model_fields else str(error)) from error
