"""Adding a concept to a catalogue's file, or to the list in a farm's configuration, whose text and comments stay."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from farm.catalogue import Concept, check_concepts, parse_list, slug
from farm.errors import UserError
from farm.yaml_line import flow

Entry = dict[str, Any]
"""A concept as a catalogue has it."""


def new_entry(
    concept_id: str,
    prompt: str,
    *,
    name: str = "",
    category: str = "other",
    before: str | None = None,
    after: str | None = None,
    domain: str = "scenery",
    taught: Entry | None = None,
) -> tuple[Entry, Concept]:
    """A catalogue entry, and the concept that it is.

    taught: its `teachers` or its `editor`; with none it has all of the farm's teachers.

    Raises:
        UserError: it is none; the sentence says what is wrong.
    """
    if slug(concept_id) != concept_id:
        raise UserError(f"{not_an_id(concept_id)}, such as {slug(concept_id) or 'sad-person'}.")
    if (before is None) != (after is None):
        raise UserError(f"{'--after' if after is None else '--before'} is missing; captions come in pairs.")
    given = {"id": concept_id, "name": name, "category": category, "domain": domain, "prompt": prompt}
    entry: Entry = {key: " ".join(value.split()) for key, value in given.items() if value != ""}
    if before is not None and after is not None:
        entry["captions"] = [" ".join(before.split()), " ".join(after.split())]
    entry |= taught or {}
    return entry, checked([entry], "concepts add")[0]


def checked(entries: Sequence[Entry], place: object) -> list[Concept]:
    """The concepts that the entries are. UserError for the first mistake in them; it names `place`."""
    concepts, mistakes = check_concepts(entries)
    if mistakes:
        raise UserError(f"{place}: {mistakes[0]}")
    return concepts


def not_an_id(text: str) -> str:
    return f"{text!r}: an id is lower-case words and digits joined by single hyphens"


def text_of(path: Path) -> str:
    """What is in a file, which need not be there; line ends as they are. UserError when it cannot be read."""
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text; save it as such.") from error


def appended(path: Path, text: str, entries: Sequence[Entry]) -> str:
    """The text of a catalogue with the last of the entries put behind the others.

    Raises:
        UserError: the list is written so that nothing can be.
    """
    line = flow(entries[-1])
    first = yaml.compose(text)
    indent = " " * first.start_mark.column if first else ""
    gap = "\n" if text and not text.endswith("\n") else ""
    longer = f"{text}{gap}{indent}- {line}\n"
    with suppress(UserError):
        if parse_list(path, longer) == entries:
            return longer
    raise UserError(f"{path}: nothing can be appended to this list; write it as lines such as `- {line}`.")


def inserted(path: Path, text: str, entry: Entry) -> str:
    """The text of a configuration with the entry at the end of its own `catalogue`.

    Raises:
        UserError: the list is written so that nothing can be put there.
    """
    document = yaml.safe_load(text)
    line = flow(entry)
    refusal = UserError(f"{path}: catalogue: nothing can be put into this list; write it as lines such as `- {line}`.")
    root = yaml.compose(text)
    assert isinstance(root, yaml.MappingNode)
    listed = next(value for key, value in root.value if key.value == "catalogue")
    if not isinstance(listed, yaml.SequenceNode) or listed.flow_style or not listed.value:
        raise refusal
    lines = text.splitlines(keepends=True)
    after = _last_line(listed) + 1
    if lines[after - 1][-1:] not in "\r\n":
        lines[after - 1] += "\n"
    end = "\r\n" if lines[after - 1].endswith("\r\n") else "\n"
    longer = "".join([*lines[:after], f"{' ' * listed.start_mark.column}- {line}{end}", *lines[after:]])
    with suppress(yaml.YAMLError):
        if yaml.safe_load(longer) == {**document, "catalogue": [*document["catalogue"], entry]}:
            return longer
    raise refusal


def _last_line(node: yaml.Node) -> int:
    """The line, from 0, on which a node's text ends. Of what is in block style the parser knows only what follows."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _last_line(last[1] if isinstance(last, tuple) else last)
    end: int = node.end_mark.line
    return end - (node.end_mark.column == 0 and end > node.start_mark.line)
