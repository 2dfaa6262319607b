"""The catalogue: what edits a farm offers. With the package come `ffhq` (260 faces) and `scenery` (20 landscapes)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from farm.editors import EditorSettings
from farm.editors.base import Prompt
from farm.errors import UserError
from farm.spelling import near
from farm.wording import Wording, plain

PACKAGED = {name: Path(__file__).with_name("concepts") / f"{name}.yaml" for name in ("ffhq", "scenery")}
"""The files of the catalogues that come with the package, by name."""

Slug = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=80)]
"""An id: lower-case words and digits joined by single hyphens, such as `vincent-van-gogh-style`."""

PaperSet = Literal["base", "random", "evaluation"]
"""The lists of the paper's appendix B.3."""


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("it is blank")
    return text


Text = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_not_blank)]
"""What a teacher or a text encoder reads."""


class Concept(BaseModel):
    """An edit: its id, the prompts that describe it, the kind of photo it is for, and its teachers.

    name: as people (and the paper, where it has the concept) spell it. prompt: the instruction; what the GAN's text
    encoder reads too. captions: of the photo and of the edited photo, for teachers that are text-to-image models.
    sets: the paper's lists it is in. editor: its own teacher. teachers: names among the farm's
    `teachers`, all of them when left out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Slug
    name: str = ""
    category: Slug = "other"
    prompt: Text
    captions: tuple[Text, Text] | None = None
    domain: Literal["face", "scenery"] = "scenery"
    sets: tuple[PaperSet, ...] = ()
    editor: EditorSettings | None = None
    teachers: tuple[Slug, ...] | None = None

    @model_validator(mode="after")
    def _one_or_the_other(self) -> Concept:
        if self.editor is not None and self.teachers is not None:
            raise ValueError("editor and teachers exclude each other: remove one of them")
        return self

    @property
    def reserved(self) -> bool:
        """Whether it is kept for evaluation, so that no base may learn it."""
        return "evaluation" in self.sets

    @property
    def title(self) -> str:
        """The name, or the id in words."""
        return self.name or self.id.replace("-", " ")

    @property
    def request(self) -> Prompt:
        """What its teachers are asked for."""
        photo = "a photo of a person" if self.domain == "face" else "a photo of a landscape"
        before, after = self.captions or (photo, self.prompt)
        return Prompt(instruction=self.prompt, before=before, after=after)


def load_catalogue(path_or_name: str | Path) -> list[dict[str, Any]]:
    """The concepts of a packaged catalogue (`ffhq`, `scenery`) or of a YAML list, as they are written there.

    Raises:
        UserError: the file cannot be read or is not a list of mappings.
    """
    path = PACKAGED.get(str(path_or_name), Path(path_or_name))
    try:
        return parse_list(path, path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give ffhq, scenery or the path of a YAML list of concepts."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text; save it as such.") from error


def parse_list(path: Path, text: str) -> list[dict[str, Any]]:
    """The mappings of a catalogue's text; none when it holds nothing but comments.

    Raises:
        UserError: it is not YAML or not a list of mappings; the sentence names `path`.
    """
    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-45
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}: is not YAML{place}: {problem}.") from error
    example = "- {id: pink-hair, prompt: give the person pink hair}"
    if not isinstance(document, list | None):
        raise UserError(f"{path}: a catalogue is a list of concepts; write each as a line such as `{example}`.")
    for number, entry in enumerate(document or (), 1):
        if not isinstance(entry, dict):
            raise UserError(f"{path}: entry {number} is not a mapping of keys; write it as `{example}`.")
    return document or []


def check_concepts(entries: Sequence[Mapping[str, Any]]) -> tuple[list[Concept], list[str]]:
    """The entries that are concepts, and one sentence for every mistake in the others."""
    concepts, mistakes = [], []
    for number, entry in enumerate(entries, 1):
        try:
            concepts.append(Concept.model_validate(entry))
        except ValidationError as error:
            label = repr(entry["id"]) if isinstance(entry.get("id"), str) else f"entry {number}"
            mistakes += [f"{label}: {_mistake(detail)}" for detail in error.errors()]
    return concepts, mistakes


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


def slug(text: str) -> str:
    """The id a name gets: `Élisabeth Vigée Le Brun painting` is `elisabeth-vigee-le-brun-painting`."""
    return "-".join(re.findall("[a-z0-9]+", plain(text)))


def base_concepts(concepts: Iterable[Concept]) -> list[str]:
    """The ids the paper's base learns, less what is reserved for evaluation: "Low Quality photo" is in both lists."""
    return [concept.id for concept in concepts if "base" in concept.sets and not concept.reserved]


def problems(concepts: Sequence[Concept], *, base: Collection[str] = (), complete: bool = False) -> list[str]:
    """What is wrong with a catalogue as a whole, one sentence a problem.

    Ids and, within a domain, prompts must be unique, and no two concepts may say the same in other words. base: the
    ids a base learns, none of them reserved. complete: every concept needs what the packaged ones have: a name, a
    category and captions. To be in both sets `base` and `evaluation` is no problem (see `base_concepts`).
    """
    found = [
        f"the id {concept_id!r} occurs {count} times; ids must be unique."
        for concept_id, count in Counter(concept.id for concept in concepts).items()
        if count > 1
    ]
    for concept in concepts:
        if concept.reserved and concept.id in base:
            found.append(f"{concept.id!r} is reserved for evaluation; take it out of the base's concepts.")
        if complete:
            has = {"name": concept.name, "category": concept.category != "other", "captions": concept.captions}
            if missing := [key for key, value in has.items() if not value]:
                found.append(f"{concept.id!r} has no {', '.join(missing)}.")
    worded = [(concept, _wording(concept)) for concept in concepts]
    for (one, said), (other, told) in combinations(worded, 2):
        if one.domain == other.domain and one.id != other.id and (what := said.repeated_by(told)):
            found.append(f"{one.id!r} and {other.id!r} have {what}; keep one of them.")
    return found


def repeats(concept: Concept, others: Iterable[Concept]) -> list[tuple[Concept, str]]:
    """Those of the others that are this very edit, each with what the two have in common: `the same id`, …"""
    said, found = _wording(concept), []
    for other in others:
        if other.id == concept.id:
            found.append((other, "the same id"))
        elif other.domain == concept.domain and (what := said.repeated_by(_wording(other))):
            found.append((other, what))
    return found


def _wording(concept: Concept) -> Wording:
    return Wording(concept.title, concept.prompt, artist=concept.category in ("painter", "photographer"))


def _mistake(detail: Any) -> str:
    """One of pydantic's errors about a concept as a sentence."""
    first, *rest = detail["loc"] or ("",)
    key = ".".join(map(str, detail["loc"]))
    match detail["type"]:
        case "extra_forbidden":
            return f"unknown key {key}; {'remove it.' if rest else near(key, Concept.model_fields)}"
        case "missing" | "too_long" if first == "captions":
            return "captions: there are two, of the photo and of the edited photo."
        case "missing":
            return f"the key {key} is missing."
        case "string_pattern_mismatch":
            return f"{key}: an id is lower-case words and digits joined by single hyphens, not {detail['input']!r}."
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ").rstrip(".")
    given = "" if isinstance(detail["input"], dict | list | tuple) else f", not {detail['input']!r}"
    return f"{key}: {message}{given}." if key else f"{message}."
