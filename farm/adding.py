"""Putting a new concept into a farm: what teaches it, where its line goes, and what that would make anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from farm.artifacts import find
from farm.catalogue import PACKAGED, Concept, load_catalogue, repeats
from farm.catalogue_file import Entry, appended, inserted, text_of
from farm.config import FarmConfig
from farm.config_file import check_catalogue
from farm.editors.procedural import ProceduralSettings
from farm.errors import UserError
from farm.plan import make_plan
from farm.spelling import near
from farm.store import Store
from farm.yaml_line import flow


@dataclass(frozen=True, kw_only=True)
class Addition:
    """What is to be written, and where: the whole text of a file. text: None where the concept is there already."""

    concept: Concept
    file: Path
    text: str | None


def taught(config: FarmConfig, teachers: Sequence[str], editor: str | None) -> Entry:
    """What a new entry says of its teacher. teachers: names of the farm's. editor: one of its own, as YAML.

    With neither, all of the farm's teachers, or in a farm without any the one that all its concepts have.

    Raises:
        UserError: there is no such teacher, or it cannot be known which.
    """
    if teachers and editor is not None:
        raise UserError("--editor: --teacher names one of the farm's; give one of the two.")
    for name in teachers:
        if name not in config.teachers:
            raise UserError(f"--teacher: the farm has no teacher {name!r}; {near(name, config.teachers)}")
    if teachers:
        return {"teachers": list(teachers)}
    if editor is not None:
        return {"editor": _mapping(editor)}
    if config.teachers:
        return {}
    editors = [concept.editor for concept in config.catalogue]
    if all(isinstance(one, ProceduralSettings) for one in editors):
        return {"editor": {"kind": "procedural"}}
    if editors[0] is not None and len(set(editors)) == 1:
        return {"editor": editors[0].model_dump(mode="json", exclude_unset=True) | {"kind": editors[0].kind}}
    raise UserError("--editor: the farm has no `teachers`, and its concepts different ones; say which: {kind: …}.")


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"--editor: {text!r} is no YAML mapping such as '{{kind: procedural, style: night}}'.")
    return value


def addition(path: Path, config: FarmConfig, entry: Entry, concept: Concept) -> Addition:
    """Where the entry goes: the catalogue's own file, or the list in the configuration at `path`.

    Raises:
        UserError: another concept is this edit already, or the catalogue comes with the package.
    """
    text = text_of(path)
    named = yaml.safe_load(text)["catalogue"]
    file = Path(named) if isinstance(named, str) and named not in PACKAGED else path
    known = {other.id: other for other in config.catalogue}
    if known.get(concept.id) == concept:
        return Addition(concept=concept, file=file, text=None)
    for other, what in repeats(concept, config.catalogue):
        raise UserError(f"{file}: {concept.id!r} is not added, for {other.id!r} is there with {what}.")
    if isinstance(named, list):
        return Addition(concept=concept, file=file, text=inserted(path, text, entry))
    if isinstance(named, str) and named not in PACKAGED:
        return Addition(concept=concept, file=file, text=appended(file, text_of(file), [*load_catalogue(named), entry]))
    raise UserError(
        f"{path}: catalogue: {flow(named)} comes with the package "
        "and cannot be added to; write your concepts into a file and name it here."
    )


def check_addition(path: Path, store: Store, config: FarmConfig, concept: Concept, *, rebuild: bool) -> None:
    """What can be known before anything is written.

    rebuild: that the base would be another one, and so every adapter made anew, is what is wanted.

    Raises:
        UserError: no teacher of the concept's can be used, or the base would be another one.
    """
    longer = config.model_copy(update={"catalogue": (*config.catalogue, concept)})
    check_catalogue(path, longer)
    plan = make_plan(longer)
    before = replace(plan, config=config).base
    if not rebuild and before.digest != plan.base.digest and find(store, before.path) is not None:
        raise UserError(
            f"{path}: base.representatives: {concept.id} would be one more to choose from, so that the base and every "
            "adapter are made anew; --rebuild says so, or list the base's concepts in base.concepts."
        )
