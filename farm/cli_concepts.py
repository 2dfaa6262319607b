"""`farm concepts list`, `show`, `validate` and `add`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from farm.errors import UserError
from farm.files import write_whole
from farm.options import Json, Override, load_config, naming
from farm.spelling import near

if TYPE_CHECKING:
    from farm.catalogue import Concept
    from farm.config import FarmConfig

app = typer.Typer(help="The catalogue.", no_args_is_help=True)

FarmOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="The catalogue of this farm's YAML file.", show_default=False)
]
CatalogueOption = Annotated[
    str | None,
    typer.Option(
        "--catalogue",
        help="ffhq, scenery or a YAML list of concepts; ffhq and scenery when left out.",
        show_default=False,
    ),
]
ConceptId = Annotated[str, typer.Argument(metavar="ID", help="The concept's id.", show_default=False)]


@app.command("list")
def list_(
    config: FarmOption = None,
    catalogue: CatalogueOption = None,
    category: Annotated[str | None, typer.Option(help="Only this category.", show_default=False)] = None,
    chosen: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SET|KEY=VALUE",
            help="Only this list of the paper (base, random, evaluation), or with --config override a key; repeatable.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """The concepts of a farm, with what is published of them, or those of a catalogue."""
    from farm.catalogue import PaperSet

    overrides = [text for text in chosen or () if "=" in text]
    sets = {text for text in chosen or () if "=" not in text}
    if unknown := sorted(sets.difference(get_args(PaperSet))):
        raise UserError(
            f"--set {unknown[0]}: the sets are {', '.join(get_args(PaperSet))}; to override a key write key=value."
        )
    farm, every = _read(config, catalogue, overrides)
    if category is not None and category not in (categories := {concept.category for concept in every}):
        raise UserError(f"--category {category}: no concept is in it; {near(category, categories)}")
    concepts = [c for c in every if category in (None, c.category) and (not sets or sets & set(c.sets))]
    if farm is not None and config is not None:
        with naming(config):
            _list_farm(farm, concepts, as_json=as_json)
    elif as_json:
        _print_json({"concepts": [_record(concept) for concept in concepts]})
    else:
        for concept in concepts:
            print(f"{concept.id:<35} {concept.category:<12} {','.join(concept.sets) or '-':<15} {concept.prompt}")


def _list_farm(farm: FarmConfig, concepts: Sequence[Concept], *, as_json: bool) -> None:
    from farm.registry import Registry
    from farm.store import open_store

    store = open_store(farm.store)
    if as_json:
        from farm.plan import make_plan
        from farm.status import farm_status

        shown = {concept.id for concept in concepts}
        rows = farm_status(store, make_plan(farm))["concepts"]
        _print_json({"concepts": [row for row in rows if row["id"] in shown]})
        return
    published = Registry(store).list()
    for concept in concepts:
        entry = published.get(concept.id)
        version, teachers = f"v{entry.version}" if entry else "-", ",".join(farm.candidates(concept.id))
        print(f"{concept.id:<32} {version:<5} {teachers:<11} {concept.prompt}")


@app.command()
def show(
    concept_id: ConceptId,
    config: FarmOption = None,
    catalogue: CatalogueOption = None,
    override: Override = None,
    as_json: Json = False,
) -> None:
    """Everything about one concept."""
    from farm.catalogue import find_concept, slug
    from farm.catalogue_file import not_an_id

    _, concepts = _read(config, catalogue, override or [])
    if slug(concept_id) != concept_id:
        meant, ids = slug(concept_id), [concept.id for concept in concepts]
        raise UserError(f"{not_an_id(concept_id)}; {near(meant, [meant] if meant in ids else ids)}")
    concept = find_concept(concepts, concept_id, key="concept")
    if as_json:
        _print_json(_record(concept))
        return
    request = concept.request
    shown = {
        "id": concept.id,
        "name": concept.title,
        "category": concept.category,
        "domain": concept.domain,
        "sets": ", ".join(concept.sets) or "none",
        "base": "never, it is reserved for evaluation" if concept.reserved else "may learn it",
        "prompt": request.instruction,
        "before": request.before,
        "after": request.after,
        "teacher": concept.editor.kind if concept.editor else ", ".join(concept.teachers or ()) or "any of the farm's",
    }
    for key, value in shown.items():
        print(f"{key:<9} {value}")


@app.command()
def validate(
    config: FarmOption = None, catalogue: CatalogueOption = None, override: Override = None, as_json: Json = False
) -> None:
    """Look for mistakes and near-duplicates; exits with 1 when there are any."""
    from farm.catalogue import PACKAGED, check_concepts, load_catalogue, problems

    checked: list[dict[str, Any]] = []
    if config is not None:
        farm, concepts = _read(config, catalogue, override or [])
        assert farm is not None
        found = problems(concepts, base=farm.base.concepts)
        checked.append({"catalogue": str(config), "concepts": len(concepts), "problems": found})
    for name in _names(config, catalogue, override or []):
        entries = load_catalogue(name)
        concepts, mistakes = check_concepts(entries)
        found = mistakes + problems(concepts, complete=name in PACKAGED)
        checked.append({"catalogue": name, "concepts": len(entries), "problems": found})
    if as_json:
        _print_json({"catalogues": checked})
    else:
        for row in checked:
            for said in row["problems"] or [f"{row['concepts']} concepts, no problem found"]:
                print(f"{row['catalogue']}: {said}")
    if any(row["problems"] for row in checked):
        raise typer.Exit(1)


@app.command()
def add(
    concept_id: ConceptId,
    prompt: Annotated[str, typer.Option(help="The instruction, such as `make the person sad`.", show_default=False)],
    name: Annotated[str, typer.Option(help="As people spell it; the id in words when left out.")] = "",
    category: Annotated[str, typer.Option(help="What it is listed under.")] = "other",
    before: Annotated[str | None, typer.Option(help="A caption of the photo, `a photo of a person`.")] = None,
    after: Annotated[str | None, typer.Option(help="A caption of the edited photo, `a photo of a sad person`.")] = None,
    domain: Annotated[str, typer.Option(help="face or scenery.")] = "scenery",
    to: Annotated[Path, typer.Option(help="Your catalogue, a YAML list; made where there is none.")] = Path(
        "concepts.yaml"
    ),
    as_json: Json = False,
) -> None:
    """Add a concept at the end of your own catalogue, whose text and comments stay as they are."""
    from farm.catalogue import PACKAGED, load_catalogue, parse_list, repeats
    from farm.catalogue_file import appended, checked, new_entry, text_of

    if str(to) in PACKAGED:
        raise UserError(f"--to {to}: that catalogue comes with the package; give the path of a file of your own.")
    entry, concept = new_entry(
        concept_id, prompt, name=name, category=category, before=before, after=after, domain=domain
    )
    text = text_of(to)
    present = parse_list(to, text)
    for other, what in repeats(concept, checked(present, to)):
        raise UserError(f"{to}: {concept.id!r} is not added, for {other.id!r} is there with {what}.")
    write_whole(to.resolve(), appended(to, text, [*present, entry]).encode())
    known = [other for path in PACKAGED for other in checked(load_catalogue(path), path)]
    notes = [
        f"the packaged {other.id!r} has {what}" + (" and is reserved for evaluation" if other.reserved else "")
        for other, what in repeats(concept, known)
    ]
    if as_json:
        _print_json({"added": _record(concept), "to": str(to), "notes": notes})
        return
    print(f"{to}: added {concept.id}")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _read(config: Path | None, catalogue: str | None, overrides: list[str]) -> tuple[FarmConfig | None, list[Concept]]:
    """The farm, where one is given, and the concepts of it or of the catalogues asked for."""
    from farm.catalogue import load_catalogue
    from farm.catalogue_file import checked

    names = _names(config, catalogue, overrides)
    if config is None:
        return None, [concept for name in names for concept in checked(load_catalogue(name), name)]
    farm = load_config(config, overrides)
    return farm, list(farm.catalogue)


def _names(config: Path | None, catalogue: str | None, overrides: list[str]) -> list[str]:
    """The catalogues asked for, none when a farm is."""
    from farm.catalogue import PACKAGED

    if config is not None and catalogue is not None:
        raise UserError("--catalogue: the farm of --config has a catalogue of its own; give one of the two.")
    if config is None and overrides:
        raise UserError(f"--set {overrides[0]}: overrides a farm's configuration, so it needs --config.")
    if config is not None:
        return []
    return list(PACKAGED) if catalogue is None else [catalogue]


def _record(concept: Concept) -> dict[str, Any]:
    return {**concept.model_dump(mode="json"), "reserved": concept.reserved}


def _print_json(document: object) -> None:
    print(json.dumps(document, indent=1, ensure_ascii=False))
