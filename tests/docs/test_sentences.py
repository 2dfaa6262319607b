from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from blocks import ROOT
from sentences import Sentence, literal, sentences
from troubleshooting import PAGE, helps, home, kept, read, write

from farm.catalogue import load_catalogue
from farm.config_file import load_config
from farm.errors import UserError
from farm.images import decode
from farm.registry import Registry
from farm.serve.problems import BusyError, problem_of
from farm.serve.published import UnknownConceptError
from farm.sources import SourcesConfig, list_photos
from farm.store import LocalStore, open_store

SAID = sentences()


def test_the_page_has_every_sentence() -> None:
    sections = read(PAGE.read_text())
    before = {text for section in sections for text in section.notes}
    todo = kept(sections, SAID)
    after = {text for section in sections for text in section.notes}
    update = "run `python docs/tools/troubleshooting.py`"
    assert not after - before, f"{update}: these are new"
    assert not before - after, f"{update}: the code does not say these"
    assert not todo
    assert write(sections) == PAGE.read_text(), f"{update}: a sentence is in another section now"


def test_every_raised_user_error_is_read_or_passes_another_on() -> None:
    """Counted by a second, simpler reader: `raise UserError(…)` whose argument has a word of its own."""
    read_at = {(sentence.file, sentence.line) for sentence in SAID}
    missed = []
    for file in sorted((ROOT / "farm").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Raise(exc=ast.Call(func=ast.Name("UserError" | "StoreError" | "IntegrityError"), args=[told])):
                    words = re.sub(r"\{.*?\}", " ", ast.unparse(told)[2:-1])
                    place = (file.relative_to(ROOT).as_posix(), told.lineno)
                    if isinstance(told, ast.JoinedStr) and re.search(r"[a-z]{3} ", words) and place not in read_at:
                        missed.append(place)
    assert not missed


def matches(text: str, told: str) -> bool:
    """Whether what is told can be this sentence, alone or after the file that it is about."""
    holes = re.split(r"\{[^{}]*\}", text)
    return bool(re.search(".*".join(re.escape(part) for part in holes) + "$", told, re.DOTALL))


def told_by(tmp_path: Path) -> dict[str, Exception]:
    """Mistakes really made, in many rooms."""
    bad = tmp_path / "bad.yaml"
    mistakes = {
        "configuration": lambda: load_config(ROOT / "configs/demo.yaml", ["base.train.epoch=3"]),
        "kind": lambda: load_config(ROOT / "configs/demo.yaml", ["sources.kind=web"]),
        "override": lambda: load_config(ROOT / "configs/demo.yaml", ["epochs"]),
        "id": lambda: load_config(ROOT / "configs/demo.yaml", ["catalogue.0.id=A B"]),
        "file": lambda: load_config(bad),
        "catalogue": lambda: load_catalogue(str(bad)),
        "photos": lambda: list_photos(SourcesConfig(kind="folder", path=str(tmp_path / "none"))),
        "image": lambda: decode(b"no image", what="x.jpg"),
        "store": lambda: open_store("ftp://host/x"),
        "s3": lambda: open_store("s3://bucket?secret=1"),
        "history": lambda: Registry(LocalStore(tmp_path / "store")).rollback("night"),
    }
    told = {}
    for name, mistake in mistakes.items():
        with pytest.raises(UserError) as found:
            mistake()
        told[name] = found.value
    return told


def test_what_is_told_is_on_the_page(tmp_path: Path) -> None:
    entries = [text for section in read(PAGE.read_text()) for text in section.notes]
    told = {name: str(error) for name, error in told_by(tmp_path).items()}
    told |= {
        repr(e): problem_of(e)[0].detail for e in (BusyError(), UnknownConceptError("zombi", ("zombie",)), OSError())
    }
    for name, sentence in told.items():
        best = max(
            (text for text in entries if matches(text, sentence)), key=lambda text: len(literal(text)), default=""
        )
        assert len(literal(best).split()) >= 3, f"{name}: {sentence!r} is nowhere, the nearest is {best!r}"


class TestTheReader:
    SOURCE = """
class UserError(Exception): ...
class OwnError(UserError):
    def __init__(self, what): super().__init__(f"it is {what}, which was not wanted")
LIMIT = 16
def hint(word): return f"did you mean {word}?" if word else "there is none."
def again(settings): return "fetch it again"
def fails(path, error, n):
    problem = "is no file" if n else "is empty"
    place = f" at line {error.line + 1}" if error else ""
    if n == 1: raise UserError(f"{path}: key: has {n:,} of {LIMIT} bytes; {again(path)}.")
    if n == 2: raise UserError(f"{path!r} {problem}{place}; " + ("remove it." if n else f"keep {error.items[0]}."))
    if n == 3: raise UserError(f"{path}: {hint(error)}")
    if n == 4: raise UserError(str(error)) from error
    if n == 5: raise KeyError("not told")
    raise ValueError("one is " "enough")
"""

    @pytest.fixture
    def said(self, tmp_path: Path) -> list[str]:
        (tmp_path / "farm").mkdir()
        (tmp_path / "farm" / "one.py").write_text(self.SOURCE)
        return [sentence.text for sentence in sentences(tmp_path)]

    def test_reads(self, said: list[str]) -> None:
        assert said == [
            "it is {what}, which was not wanted",
            "{path}: key: has {n} of 16 bytes; fetch it again.",
            "'{path}' {problem}{place}; keep {items}.",
            "'{path}' {problem}{place}; remove it.",
            "{path}: did you mean {word}?",
            "{path}: there is none.",
            "one is enough",
        ]


class TestThePage:
    PAGE = """# Title

Text.

## One

Of it.

<!-- from: farm/one.py -->

- `a thing is wrong: {why}`
  Do this
  or that.
- `a thing is gone; make it`

## Two

<!-- from: farm -->

- ``use `farm run` or {…}``
"""
    SAID = (
        Sentence("a thing is wrong: {why}", "farm/one.py", 1),
        Sentence("a thing is gone; make it", "farm/one.py", 2),
        Sentence("use `farm run` or {…}", "farm/two.py", 1),
    )

    def test_a_page_that_is_whole_stays_as_it_is(self) -> None:
        sections = read(self.PAGE)
        assert write(sections) == self.PAGE
        assert "use `farm run` or {…}" in kept(sections, [*self.SAID])[0]  # it has no note
        assert write(sections) == self.PAGE

    def test_what_is_new_goes_to_the_room_of_its_file_and_notes_stay(self) -> None:
        sections = read(self.PAGE)
        kept(sections, [*self.SAID, Sentence("it is late; wait", "farm/new/room.py", 9)])
        page = write(sections)
        assert "- `a thing is wrong: {why}`\n  Do this\n  or that.\n" in page
        assert page.index("## Two") < page.index("- `it is late; wait`")

    def test_a_note_stays_when_only_a_hole_has_another_name(self) -> None:
        sections = read(self.PAGE)
        renamed = Sentence("a thing is wrong: {error}", "farm/one.py", 1)
        assert len(kept(sections, [renamed, *self.SAID[1:]])) == 1
        assert "- `a thing is wrong: {error}`\n  Do this\n  or that.\n" in write(sections)

    def test_a_note_on_what_is_not_said_is_told(self) -> None:
        todo = kept(read(self.PAGE), [*self.SAID[1:]])
        assert "'a thing is wrong: {why}', which the code does not say" in todo[-1]

    def test_the_longest_name_decides(self) -> None:
        sections = read(self.PAGE)
        assert home(sections, "farm/one.py") is sections[1]
        assert home(sections, "farm/one.pyx") is sections[2]

    @pytest.mark.parametrize(
        ("text", "enough"),
        [
            ("{path}: is not UTF-8 text; save it as such.", True),
            ("gpus must be a whole number, not {gpus}", True),
            ("The store {url} is full ({code}): free space there.", True),
            ("this key is not known", False),
            ("{concept} is not published: {problem}", False),
            ("'{name}' was never published in {url}; {…}", False),
        ],
    )
    def test_a_sentence_helps_or_wants_a_note(self, text: str, enough: bool) -> None:
        assert helps(Sentence(text, "farm/x.py", 1)) is enough
