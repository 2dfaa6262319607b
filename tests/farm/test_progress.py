from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from farm.progress import LINE_SECONDS, Screen


def screen(**options: Any) -> tuple[Screen, io.StringIO]:
    file = io.StringIO()
    return Screen(Console(file=file, width=100, **options)), file


def test_a_log_gets_a_line_now_and_then_and_one_when_done(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("farm.progress.time.monotonic", lambda: clock[0])
    shown, file = screen()
    with shown.bar("edits") as bar:
        for done in range(101):
            bar.update(done, 100, "charcoal")
            clock[0] += 1
    lines = file.getvalue().splitlines()
    assert lines[0] == "edits      0/100  0 s  charcoal"
    assert lines[1] == f"edits      {LINE_SECONDS:.0f}/100  10 s  charcoal"
    assert lines[-1] == "edits      100/100  100 s  charcoal"
    assert len(lines) == 11


def test_a_finished_bar_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farm.progress.time.monotonic", lambda: 1000.0)
    shown, file = screen()
    with shown.bar("ranks") as bar:
        for done, total in ((6, 6), (6, 6), (1, 6), (2, 6), (6, 6)):
            bar.update(done, total)
    assert [line.split()[1] for line in file.getvalue().splitlines()] == ["6/6", "1/6", "6/6"]


def test_lines_are_neither_marked_up_nor_broken() -> None:
    shown, file = screen()
    long = "failed: [bold]sepia[/bold]: [/nothing] " + "word " * 100 + "end"
    shown.say(long)
    assert file.getvalue() == long + "\n"


def test_a_terminal_gets_a_bar_that_stays() -> None:
    shown, file = screen(force_terminal=True)
    with shown.bar("base") as bar:
        bar.update(3, 10, "l1 0.250")
        shown.say("a line above it")
        bar.update(10, 10, "l1 0.125")
    text = file.getvalue()
    assert "base" in text and "10/10" in text and "l1 0.125" in text and "a line above it" in text


def test_results_have_standard_output_to_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Screen()
    shown.say("how far it is")
    with shown.bar("edits") as bar:
        bar.update(1, 1)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("how far it is\nedits      1/1")
