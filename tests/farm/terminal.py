"""The `farm` program and the jobs, run in this process."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from farm import cli

ROOT = Path(__file__).parents[2]


class Terminal:
    """Runs `farm` with arguments, the same first ones each time: exit status, standard output and standard error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *first: str) -> None:
        self.monkeypatch = monkeypatch
        self.capsys = capsys
        self.first = first
        monkeypatch.setenv("COLUMNS", "200")

    def farm(self, *arguments: object) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["farm", *self.first, *map(str, arguments)])
        return self._status(cli.main)

    def good(self, *arguments: object) -> str:
        """What it prints when all is well."""
        status, out, err = self.farm(*arguments)
        assert (status, err) == (0, "")
        return out

    def document(self, *arguments: object) -> Any:
        """What it prints with --json."""
        return json.loads(self.good(*arguments, "--json"))

    def job(self, name: str, *arguments: object) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", [f"jobs/{name}.py", *map(str, arguments)])
        return self._status(lambda: runpy.run_path(str(ROOT / f"jobs/{name}.py"), run_name="__main__"))

    def _status(self, command: Any) -> tuple[int, str, str]:
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            command()
        captured = self.capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    def mistake(self, *arguments: object) -> str:
        """The sentence a user's mistake is told with; the program prints nothing else and leaves with 2."""
        status, out, err = self.farm(*arguments)
        assert (status, out) == (2, "")
        assert err.startswith("error: ") and err.count("\n") == 1 and err[-2] in ".?"
        return err.removeprefix("error: ").rstrip()
