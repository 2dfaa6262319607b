"""The commands of README and documentation: fenced blocks, how each is checked, and code within the text."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_MARK = re.compile(r"\s*<!-- (parsed|needs): (.+) -->$")
_FENCE = re.compile(r"(\s*)(`{3,})(.*)$")
_ENDS = frozenset({"&&", "||", ";", "|", "&"})
_ASSIGNMENT = re.compile(r"[A-Z_]+=")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    check: `run`; `parsed`, where its commands and options are looked at; `needs`, what is not here. why: of the mark.
    """

    page: str
    line: int
    language: str
    text: str
    check: str
    why: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """In the order of the page. A mark is a comment on the line above the fence."""
    found, lines, above = [], iter(enumerate(page.read_text().splitlines(), 1)), ""
    for number, line in lines:
        if fence := _FENCE.match(line):
            indent, ticks, language = fence.groups()
            text = []
            for _, inside in lines:
                if inside.strip() == ticks:
                    break
                text.append(inside.removeprefix(indent))
            check, why = mark.groups() if (mark := _MARK.match(above)) else ("run", "")
            name = page.relative_to(ROOT).as_posix()
            found.append(Block(name, number, language, "\n".join(text) + "\n", check, why))
        above = line
    return found


def in_text(page: Path) -> Iterator[tuple[str, str]]:
    """What stands in backticks outside of blocks: its place, and the code."""
    fenced = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fenced ^= bool(_FENCE.match(line))
        for code in () if fenced else re.findall(r"`([^`]+)`", line):
            yield f"{page.relative_to(ROOT).as_posix()}:{number}", code


def commands(script: str) -> list[list[str]]:
    """The simple commands of a shell script, without redirections, assignments and what is fed to them."""
    script = re.sub(r"<<'(\w+)'\n.*?\n\1\n", "\n", script, flags=re.DOTALL).replace("\\\n", " ")
    found = []
    for line in script.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        command: list[str] = []
        words = iter(lexer)
        for word in words:
            if word in _ENDS:
                found.append(command)
                command = []
            elif word.startswith(("<", ">")):
                next(words)
            elif command or not _ASSIGNMENT.match(word):
                command.append(word)
        found.append(command)
    return [command for command in found if command]
