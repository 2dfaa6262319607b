"""Keeps docs/troubleshooting.md: every sentence of the code is in the section of its file, and the notes stay.

`python docs/tools/troubleshooting.py` puts in what is new, takes out what the code no longer says, and tells what is
still to be written. A section's files are named in a comment below its heading; the longest name that fits decides, so
`farm` takes what no other section does. A note is what is indented below a sentence.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from sentences import ROOT, Sentence, literal, sentences

PAGE = ROOT / "docs" / "troubleshooting.md"
_FROM = re.compile(r"<!-- from: (.*) -->")
_ENTRY = re.compile(r"- (`+) ?(.*?) ?\1$")
_DEVELOPERS = "e2gan/"
"""Mistakes of programs that call the library: what they say is all there is to say."""


@dataclass(eq=False)
class Section:
    """A heading, its text, and its sentences with their notes, each a list of lines."""

    head: list[str]
    files: list[str] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)


def read(text: str) -> list[Section]:
    """The page: what is before the first heading of a section is the first one, without files."""
    found = [Section([])]
    for line in text.splitlines():
        section = found[-1]
        if line.startswith("## "):
            found.append(Section([line]))
        elif section.files and (entry := _ENTRY.match(line)):
            section.notes[entry[2]] = []
        elif section.notes and line:
            section.notes[next(reversed(section.notes))].append(line.strip())
        elif not section.notes:
            section.head.append(line)
            if listed := _FROM.match(line):
                section.files = listed[1].split()
    return found


def write(sections: list[Section]) -> str:
    return "\n".join("\n".join(_lines(section)).rstrip("\n") + "\n" for section in sections)


def _lines(section: Section) -> Iterator[str]:
    yield from section.head
    for text, note in section.notes.items():
        ticks = "`" if "`" not in text else "``"
        pad = " " if text.startswith("`") or text.endswith("`") else ""
        yield f"- {ticks}{pad}{text}{pad}{ticks}"
        yield from (f"  {line}" for line in note)


def kept(sections: list[Section], said: list[Sentence]) -> list[str]:
    """Bring the sections up to what the code says; what is left for a person to do, a sentence each."""
    todo = []
    notes = {text: note for section in sections for text, note in section.notes.items() if note}
    renamed = {literal(text): text for text in notes}  # a hole has another name, no more
    for section in sections:
        section.notes = {}
    for sentence in sorted(said, key=lambda sentence: sections.index(home(sections, sentence.file))):
        section = home(sections, sentence.file)
        if not any(sentence.text in other.notes for other in sections):
            before = sentence.text if sentence.text in notes else renamed.get(literal(sentence.text), "")
            section.notes[sentence.text] = notes.pop(before, [])
            if not (section.notes[sentence.text] or helps(sentence)):
                todo.append(
                    f"{sentence.file}:{sentence.line} says {sentence.text!r}: write below it in {PAGE.name}, "
                    "indented by two, what it means and what to do."
                )
    todo += [f"{PAGE.name} has a note on {text!r}, which the code does not say: move it or drop it." for text in notes]
    return todo


def home(sections: list[Section], file: str) -> Section:
    """The section that names the file, or the nearest folder above it."""
    fits = [(len(name), section) for section in sections for name in section.files if _below(file, name)]
    return max(fits, key=lambda fit: fit[0])[1]


def _below(file: str, name: str) -> bool:
    return file == name or file.startswith(f"{name}/")


def helps(sentence: Sentence) -> bool:
    """Whether it says by itself what to do, or what has to be so."""
    words = literal(sentence.text)
    if sentence.file.startswith(_DEVELOPERS) or re.search(r"\b(must|needs?|needed|should|at least|at most)\b", words):
        return True
    return any(re.search(r"[a-z]{2}", part) for part in re.split(r"[;:](?=\s)", words)[1:] if len(part.split()) > 1)


def main() -> int:
    sections = read(PAGE.read_text())
    before = {text: note for section in sections for text, note in section.notes.items() if note}
    todo = kept(sections, sentences())
    after = {literal(text) for section in sections for text in section.notes}
    PAGE.write_text(write(sections))
    for text in sorted(before):
        if literal(text) not in after:  # the note is not lost: it is for a person to place
            print(f"taken out: {text}", *before[text], sep="\n  ")
    print("\n".join(todo) or f"{PAGE.name} has every sentence")
    return bool(todo)


if __name__ == "__main__":
    sys.exit(main())
