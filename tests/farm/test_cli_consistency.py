"""The command line as a whole: what all commands share, what importing it costs, and what a pipe gets."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from stage_farm import CONCEPTS, write_config
from terminal import Terminal

from farm import cli
from farm.completion import ids

ROOT = Path(__file__).parents[2]
HEAVY = {
    "boto3", "cv2", "fastapi", "httpx", "jinja2", "numpy", "onnxruntime", "pandas", "peft", "PIL", "pyarrow",
    "pydantic", "ray", "scipy", "sklearn", "torch", "transformers", "yaml",
}  # fmt: skip
SCREENS = {"serve"}
"""Commands that print for people alone: they go on until somebody ends them."""


def commands(group: Any = None, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every command that does something, by what one types."""
    group = group or typer.main.get_command(cli.app)
    for inner, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{name}{inner} ")
        else:
            yield f"{name}{inner}", command


COMMANDS = dict(commands())


def options(command: Any) -> dict[str, Any]:
    return {flag: param for param in command.params for flag in param.opts if flag.startswith("-")}


def program(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The `farm` program in a process of its own, its output a pipe."""
    code = "from farm.cli import main; main()"
    kept = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TERM")}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**kept, "TERM": "xterm-256color", "COLUMNS": "100", **environment},
    )


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, runpy; sys.argv = ['farm', '--help']\n"
        "try:\n from farm.cli import main; main()\nexcept SystemExit: pass\n"
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "Usage: farm" in done.stdout
    assert not set(done.stderr.split()) & HEAVY


@pytest.mark.parametrize("name", COMMANDS)
def test_a_flag_means_the_same_everywhere(name: str) -> None:
    flags = options(COMMANDS[name])
    if "--config" in flags:
        assert flags["--config"] is flags["-c"] and "--set" in flags
    for flag in ("--json", "--dry-run", "--yes", "--force", "--all"):
        assert flag not in flags or flags[flag].is_flag, flag
    for flag in flags:
        assert re.fullmatch("-[a-z]|--[a-z]+(-[a-z]+)*", flag), flag
    assert COMMANDS[name].help and COMMANDS[name].help.rstrip().endswith("."), "what it does, in a sentence"


@pytest.mark.parametrize("name", COMMANDS)
def test_everything_a_script_may_want_has_json(name: str) -> None:
    assert ("--json" in options(COMMANDS[name])) == (name not in SCREENS)


def test_every_command_has_its_place_in_the_help_and_in_the_docs() -> None:
    group = typer.main.get_command(cli.app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        assert command.rich_help_panel in (cli.START, cli.BUILD, cli.LOOK, cli.PUBLISH, cli.SERVE, cli.STORE), name
    page = (ROOT / "docs/cli.md").read_text()
    assert not [name for name in COMMANDS if f"`farm {name}" not in page]
    said = group.epilog  # type: ignore[attr-defined]
    for status in ("0", "1", "2", "130", "143"):
        assert re.search(rf"\b{status} ", said) and f"| {status} |" in page


def test_the_docs_know_every_flag_of_the_new_commands() -> None:
    page = (ROOT / "docs/cli.md").read_text()
    for name in ("init", "doctor", "show", "compare", "add", "edit", "migrate"):
        for flag in options(COMMANDS[name]):
            assert flag in page or flag == "--help", f"farm {name} {flag}"


def test_no_colours_in_a_pipe_and_colours_where_they_are_forced(root: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "farm.yaml", root)
    asked: list[list[object]] = [["--help"], ["status", "-c", config], ["show", "sepia", "-c", config], ["fly"]]
    for arguments in asked:
        done = program(*arguments)
        assert "\x1b" not in done.stdout + done.stderr and done.returncode == (2 if arguments == ["fly"] else 0)
    assert "\x1b[" in program("--help", FORCE_COLOR="1").stdout


def test_an_interrupt_anywhere_is_status_130(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("farm.status.farm_status", interrupt)
    monkeypatch.setattr("farm.showing.concept_facts", interrupt)
    config = write_config(tmp_path / "farm.yaml", tmp_path / "store")
    assert terminal.farm("status", "-c", config)[0] == terminal.farm("show", "sepia", "-c", config)[0] == 130


# Completion


def complete(words: str) -> list[str]:
    """What bash is offered after these words."""
    asked = {"_FARM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    code = "import sys; sys.argv[0] = 'farm'; from farm.cli import app; app(prog_name='farm')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **asked}, cwd=ROOT
    )
    return done.stdout.split()


def test_a_shell_completes_commands_and_concepts(root: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "farm.yaml", root)
    assert complete("farm unp") == ["unpublish"]
    assert complete(f"farm show -c {config} c") == ["charcoal", "cyanotype"]
    assert complete(f"farm queue add -c {config} se") == ["sepia"]
    assert complete(f"farm show -c {tmp_path / 'none.yaml'} c") == []


def test_ids_of_every_kind_of_catalogue(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("# mine\n- {id: one, prompt: x}\n- id: two\n  prompt: y\n- {id: 'three', prompt: z}\n")
    config = tmp_path / "farm.yaml"

    def of(catalogue: object) -> list[str]:
        return ids(write_config(config, tmp_path / "store", catalogue=catalogue))

    assert ids(write_config(config, tmp_path / "store")) == list(CONCEPTS)
    assert of(str(own)) == ["one", "two", "three"]
    assert of({"from": "scenery", "only": ["sunset"]}) == ["sunset"]
    assert len(of("ffhq")) == 260 and len(of("scenery")) == 20
    for nonsense in (None, 3, {"from": "x"}, [1], str(tmp_path / "none")):
        assert of(nonsense) == []
    assert ids(None) == ids(tmp_path / "none.yaml") == []


def test_json_of_the_small_verbs(root: Path, tmp_path: Path, terminal: Terminal) -> None:
    config = write_config(tmp_path / "farm.yaml", root)
    assert terminal.document("queue", "add", "sepia", "-c", config)["items"] == [
        {"concept": "sepia", "changed": False, "said": "sepia: its adapter is there already"}
    ]
    assert terminal.document("queue", "resume", "-c", config) == {
        "queue": [{"changed": False, "said": "the queue is not paused"}]
    }
    [row] = terminal.document("publish", "sepia", "-c", config)["concepts"]
    assert (row["concept"], row["version"], row["changed"], row["published"]) == ("sepia", 1, False, True)
    made = terminal.document("keys", "new", tmp_path / "key.pem")
    assert terminal.document("keys", "show", tmp_path / "key.pem") == {"public_key": made["public_key"]}
    key = json.loads(terminal.farm("serve-key", "new", "alice", "--json")[1])
    assert key["entry"]["name"] == "alice" and key["key"].startswith("farm_")
