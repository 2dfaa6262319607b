"""Whether a command line could be run: its words against the programs' own parsers, nothing invoked."""

from __future__ import annotations

import re
import runpy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer.exceptions
import typer.main

from farm.cli import app

ROOT = Path(__file__).parents[2]
FARM = typer.main.get_command(app)


def problem(words: Sequence[str]) -> str | None:
    """What is wrong with a command; None where nothing is, and of a program that is not ours."""
    program, *rest = words
    match Path(program).name:
        case "farm":
            return refused(FARM, rest)
        case "python" if rest and rest[0].startswith(("jobs/", "bench/", "examples/")):
            return _script(*rest)
        case "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            return next((f"no target {w}" for w in rest if "=" not in w and w not in targets), None)
        case "ray":
            return unknown(_ray(), rest[: rest.index("--")] if "--" in rest else rest)
    return None


def refused(command: Any, words: Sequence[str], above: Any = None) -> str | None:
    """What the parser says to all words; None where it takes them. command: of typer, or of click, whose copy it is."""
    try:
        context = command.make_context(command.name or "farm", [*words], parent=above)
        if hasattr(command, "commands"):
            _, chosen, left = command.resolve_command(context, [*context._protected_args, *context.args])
            return refused(chosen, left, context)
    except typer.Exit as left:
        return None if left.exit_code == 0 else f"status {left.exit_code}"
    except typer.exceptions.TyperException as error:
        return str(error.format_message())  # type: ignore[attr-defined]
    return None


def unknown(command: Any, words: Sequence[str]) -> str | None:
    """The first word that names no command and no option: a mention such as `farm gc --dry-run` leaves the rest out."""
    for word in words:
        if word.startswith("-"):
            options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
            if word.partition("=")[0] not in options | {"--help"}:
                return f"{command.name} has no option {word}"
        elif hasattr(command, "commands"):
            if word not in command.commands:
                return f"{command.name} has no command {word}"
            command = command.commands[word]
    return None


def _script(path: str, *words: str) -> str | None:
    """A job is a typer command; of a bench and an example, whose parsers are their own, options are looked for."""
    script = ROOT / path
    if not script.is_file():
        return f"no script {path}"
    if path.startswith("jobs/"):
        job, name = typer.Typer(), re.findall(r"typer\.run\((\w+)\)", script.read_text())[-1]
        job.command()(runpy.run_path(str(script))[name])
        return refused(typer.main.get_command(job), words)
    text = "".join(file.read_text() for file in script.parent.glob("*.py"))
    return next((f"No such option: {word}" for word in words if word[:2] == "--" and f'"{word}"' not in text), None)


def _ray() -> Any:
    # Importing ray.serve 2.60 warns; as an error that would leave half of it behind for every other test.
    with warnings.catch_warnings(action="ignore"):
        from ray.scripts.scripts import cli

    return cli
