"""A farm's configuration file: read, overridden, completed from its catalogue, checked; a mistake is one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from farm.catalogue import Slug, base_concepts, check_concepts, find_concept, load_catalogue
from farm.config import CONFIG_VERSION, FarmConfig
from farm.editors import KINDS
from farm.errors import UserError
from farm.spelling import near


class _Excerpt(BaseModel):
    """`catalogue: {from: ffhq, only: [old-person, zombie]}`: some concepts of a longer list."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(alias="from")
    only: tuple[Slug, ...] = Field(min_length=1)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> FarmConfig:
    """Read a farm's YAML, apply `key=value` overrides (keys dotted, values YAML) and check everything.

    `catalogue` may be a list of concepts, the path of a YAML file that holds one, `ffhq` or `scenery` (the packaged
    ones), or `{from: <one of these>, only: [ids]}`. Without `base.concepts` and `base.representatives`
    the base learns what the catalogue marks for it.

    Raises:
        UserError: the file cannot be read, is not YAML, or a key or value is wrong.
    """
    path = Path(path)
    document = _read_yaml(path)
    if not isinstance(document, dict):
        raise UserError(f"{path}: a farm's configuration is a mapping of keys, see configs/demo.yaml.")
    for override in overrides:
        _override(document, override)
    _check_version(path, document.get("version", CONFIG_VERSION))
    try:
        _fill_in(path, document)
        config = FarmConfig.model_validate(document)
    except ValidationError as error:
        raise UserError(f"{path}: {_sentence(error)}") from error
    check_catalogue(path, config)
    given = [part for override in overrides for part in ("--set", override)]
    return config.given_by(["--config", str(path), *given])


def _check_version(path: Path, version: object) -> None:
    """Before anything else: what a newer version's keys mean is not known here."""
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise UserError(f"{path}: version: should be a whole number, {CONFIG_VERSION} today, not {version!r}.")
    if version > CONFIG_VERSION:
        raise UserError(
            f"{path}: version: the file is of version {version} and this farm reads {CONFIG_VERSION}; install a newer "
            "e2gan-farm (docs/upgrading.md)."
        )


def _fill_in(path: Path, document: dict[str, Any]) -> None:
    """Read the catalogue where the document only names it, and take the base's concepts from it where it lists none."""
    named = document.get("catalogue")
    if isinstance(named, str):
        document["catalogue"] = load_catalogue(named)
    elif isinstance(named, dict):
        excerpt = _Excerpt.model_validate(named)
        listed = {concept.get("id"): concept for concept in load_catalogue(excerpt.source)}
        for concept_id in excerpt.only:
            if concept_id not in listed:
                hint = near(concept_id, [str(known) for known in listed])
                raise UserError(f"{path}: catalogue.only: {excerpt.source} has no concept {concept_id!r}; {hint}")
        document["catalogue"] = [listed[concept_id] for concept_id in excerpt.only]
    base = document.get("base")
    if isinstance(base, dict) and not {"concepts", "representatives"} & base.keys() and named is not None:
        listed_concepts = document["catalogue"] if isinstance(document["catalogue"], list) else []
        marked = base_concepts(check_concepts([entry for entry in listed_concepts if isinstance(entry, dict)])[0])
        if marked:
            base["concepts"] = marked


def check_catalogue(path: Path, config: FarmConfig) -> None:
    """UserError where concepts, teachers, base and ranks do not fit together."""
    ids = [concept.id for concept in config.catalogue]
    twice = sorted({i for i in ids if ids.count(i) > 1})
    if twice:
        raise UserError(f"{path}: catalogue: the id {twice[0]!r} occurs twice; ids must be unique.")
    for key, names in (("base.concepts", config.base.concepts), ("ranks.concepts", config.ranks.concepts)):
        for name in names:
            find_concept(config.catalogue, name, key=f"{path}: {key}")
    for concept in config.catalogue:
        for name in concept.teachers or ():
            if name not in config.teachers:
                hint = near(name, config.teachers)
                raise UserError(f"{path}: catalogue: {concept.id}: teachers: there is no teacher {name!r}; {hint}")
        if not config.candidates(concept.id):
            raise UserError(
                f"{path}: catalogue: {concept.id} has no teacher; give it an editor, or the farm some `teachers`."
            )
    if config.base.representatives is not None and config.base.representatives > len(config.eligible):
        raise UserError(
            f"{path}: base.representatives: {config.base.representatives} concepts cannot be chosen among the "
            f"{len(config.eligible)} that are neither kept for evaluation nor in ranks.concepts."
        )
    both = sorted(set(config.base.concepts) & set(config.ranks.concepts))
    if both:
        raise UserError(f"{path}: ranks.concepts: {both[0]!r} is also in base.concepts; search ranks on others.")


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give the path of a YAML file such as configs/demo.yaml."
        ) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date such as 2024-13-45
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}: is not YAML{place}: {problem}.") from error


def _override(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: write key=value, for example --set adapters.train.epochs=5.")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"--set {override}: {text!r} is not a YAML value.") from error
    *parents, last = key.split(".")
    here: Any = document
    for name in parents:
        here = (
            here[int(name)]
            if isinstance(here, list) and name.isdigit() and int(name) < len(here)
            else (here.setdefault(name, {}) if isinstance(here, dict) else None)
        )
    if isinstance(here, dict):
        here[last] = value
    elif isinstance(here, list) and last.isdigit() and int(last) < len(here):
        here[int(last)] = value
    else:
        raise UserError(f"--set {override}: the configuration has no place {key}.")


def _sentence(error: ValidationError) -> str:
    """The first mistake as one sentence with its dotted key."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part not in KINDS)
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        close = difflib.get_close_matches(str(first["loc"][-1]), _keys_at(first["loc"][:-1]), n=1)
        return f"unknown key {place}; " + (
            f"did you mean {close[0]}?" if close else "remove it, see configs/demo.yaml."
        )
    if first["type"] in ("missing", "missing_keyword_only_argument"):
        return f"the key {place} is missing."
    if first["type"] == "union_tag_not_found":
        return f"the key {place}.kind is missing."
    if first["type"] == "union_tag_invalid":
        kinds = first["ctx"]["expected_tags"].replace(", ", " or ")
        return f"{place}.kind: should be {kinds}, not {first['ctx']['tag']!r}."
    if first["type"] == "string_pattern_mismatch":
        return f"{place}: an id is lower-case words and digits joined by single hyphens, not {first['input']!r}."
    secret = place.startswith("signing")  # a key in the wrong place
    given = "" if secret or isinstance(first["input"], dict | list) else f", not {first['input']!r}"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ").rstrip(".")
    return f"{place}: {message}{given}."


def _keys_at(place: Sequence[str | int]) -> list[str]:
    """The keys there can be at a place, which is as pydantic gives it: with indices and the tags of unions."""
    schema = FarmConfig.model_json_schema()
    here = schema
    for part in place:
        if "anyOf" in here:  # of an optional one, what it may be besides None
            here = here["anyOf"][0]
        if isinstance(part, int):
            here = here["items"]
        elif "discriminator" in here:
            here = {"$ref": here["discriminator"]["mapping"][part]}
        elif "patternProperties" in here:  # a mapping with keys of the user's
            (here,) = here["patternProperties"].values()
        else:
            here = here["properties"][part]
        if "$ref" in here:
            here = schema["$defs"][here["$ref"].rpartition("/")[2]]
    return list(here["properties"])
