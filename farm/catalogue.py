"""The catalogue: what edits a farm offers."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from farm.editors import EditorSettings
from farm.errors import UserError

Slug = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=80)]
"""An id: lower-case words and digits joined by single hyphens, such as `vincent-van-gogh-style`."""


class Concept(BaseModel):
    """An edit: its id, the prompt that describes it, the kind of photo it is for, and its teacher."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Slug
    prompt: Annotated[str, Field(min_length=1, max_length=1000)]
    domain: Literal["face", "scenery"] = "scenery"
    editor: EditorSettings


def find_concept(concepts: Sequence[Concept], concept_id: str, *, key: str) -> Concept:
    """The concept of that id.

    Raises:
        UserError: there is none; the sentence names `key` (where the id came from) and near ids.
    """
    for concept in concepts:
        if concept.id == concept_id:
            return concept
    raise UserError(
        f"{key}: there is no concept {concept_id!r} in the catalogue; {near(concept_id, [c.id for c in concepts])}"
    )


def near(word: str, words: Iterable[str]) -> str:
    """A hint for a mistyped word: `did you mean …?` or the list of what there is."""
    words = sorted(words)
    close = difflib.get_close_matches(word, words, n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(words) or 'none'}."
