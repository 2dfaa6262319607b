"""`farm init`: a farm's configuration from four answers."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from farm.errors import UserError
from farm.files import write_whole
from farm.options import Json

Answer = TypeVar("Answer")

Given = Annotated[
    list[str] | None,
    typer.Option(
        "--concept",
        metavar="ID[=PROMPT]",
        help="A concept, or several with commas between them; repeatable.",
        show_default=False,
    ),
]


def init(
    file: Annotated[Path, typer.Argument(help="The YAML file to write.")] = Path("farm.yaml"),
    photos: Annotated[
        str | None,
        typer.Option("--photos", help="The folder of your photographs; '' for those in the packages."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", help="filters, an ONNX file or a folder of them, or a kind of diffusion model."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="The diffusion model, a folder or a hub id; its usual one if left out."),
    ] = None,
    concept: Given = None,
    store: Annotated[
        str | None, typer.Option("--store", help="Where all is kept: a folder or s3://bucket/prefix.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing; what is not given is chosen.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write a farm's configuration, commented and ready to run, from four answers.

    It asks for photographs, teacher, concepts and store, or takes them from its options.
    """
    from farm import start
    from farm.catalogue import slug

    if file.is_dir():
        raise UserError(f"{file}: is a folder; give the name of the file to write, such as {file / 'farm.yaml'}.")
    if file.exists() and not force:
        raise UserError(f"{file}: is there already; --force writes over it, or give another name.")
    name = slug(file.stem) or "farm"
    ask = _Questions(asks=not yes)
    chosen = ask(
        "Teacher: filters, an ONNX file or a folder of them, or one of\n  " + ", ".join(start.DIFFUSION),
        teacher,
        start.FILTERS,
        lambda answer: start.find_teacher(answer, model),
    )
    found = ask(
        "Folder of photographs (empty: those in the packages)", photos, "", lambda a: start.find_photos(a, chosen)
    )
    entries = ask(
        "Concepts, ID or ID=PROMPT, with ; or , between them",
        None if concept is None else ";".join(concept),
        ", ".join(start.offered(chosen)),
        lambda answer: start.find_concepts(_items(answer), chosen),
    )
    place = ask("Store: a folder or s3://bucket/prefix", store, f"work/{name}", str)
    text = start.configuration(
        start.Answers(file=str(file), name=name, photos=found, teacher=chosen, concepts=entries, store=place)
    )
    write_whole(file, text.encode())
    ids = [entry["id"] for entry in entries]
    if as_json:
        print(json.dumps({"file": str(file), "photos": found.count, "teacher": chosen.kind, "concepts": ids}, indent=1))
        return
    print(f"{file}: {found.count} photographs, {len(ids)} concepts ({', '.join(ids)})")
    print(f"next: farm doctor --config {file}, then farm run --config {file}")


class _Questions:
    """Asks for what was not given; with `asks` false takes what would have been offered."""

    def __init__(self, *, asks: bool) -> None:
        self._asks = asks

    def __call__(self, question: str, given: str | None, offered: str, understand: Callable[[str], Answer]) -> Answer:
        if given is not None or not self._asks:
            return understand(offered if given is None else given)
        if not sys.stdin.isatty():
            raise UserError(
                "farm init: nobody is there to ask; give --photos, --teacher, --concept and --store, or --yes for what "
                "would be offered."
            )

        def answered(text: str) -> Answer:
            try:
                return understand(text.strip())
            except UserError as error:  # asked again
                raise typer.BadParameter(str(error)) from error

        result: Answer = typer.prompt(
            question, default=offered, show_default=bool(offered), value_proc=answered, err=True
        )
        return result


def _items(answer: str) -> list[str]:
    """`a, b` and `a=one, two; b` are two each: a prompt may have commas."""
    items = []
    for part in re.split(r"[;\n]", answer):
        names, equals, prompt = part.partition("=")
        *alone, last = names.split(",")
        items += [name for name in (*alone, f"{last}{equals}{prompt}") if name.strip()]
    return items
