"""`farm edit` and `compare`: photos edited by published adapters, without a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farm.errors import UserError
from farm.files import write_whole
from farm.options import Config, Json, Override, load_config, naming

if TYPE_CHECKING:
    import PIL.Image

    from farm.comparing import Side as Compared

Side = Annotated[
    int | None, typer.Option("--side", min=16, help="Longest side the network works at; default serve.max_side.")
]
FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


def edit(
    config: Config,
    source: Annotated[Path, typer.Argument(help="The photo.", show_default=False)],
    target: Annotated[
        Path, typer.Argument(help="Where the edited photo goes: .png, .jpg or .webp.", show_default=False)
    ],
    concept: Annotated[str, typer.Option("--concept", help="The concept's id.", show_default=False)],
    version: Annotated[
        int | None, typer.Option("--version", min=1, help="A published version; default the current one.")
    ] = None,
    strength: Annotated[float, typer.Option("--strength", min=0, max=1, help="A factor on the adapter.")] = 1.0,
    side: Side = None,
    size: Annotated[
        int | None,
        typer.Option("--size", min=1, max=4096, help="Longest side of the answer; default as worked at."),
    ] = None,
    quality: Annotated[int, typer.Option("--quality", min=1, max=100, help="Of a JPEG or WebP.")] = 90,
    override: Override = None,
    as_json: Json = False,
) -> None:
    """Edit one photo with a published concept, without a server."""
    from farm.editing import PhotoEditor, open_photo

    loaded = load_config(config, override or [])
    _check_name(target)
    photo = open_photo(source)
    with naming(config):
        editor = PhotoEditor(loaded)
    edited = editor.edit(photo, concept, version=version, strength=strength, side=side, size=size)
    _write(target, edited.image, quality)
    width, height = edited.image.size
    if as_json:
        facts = {"concept": concept, "version": edited.version, "digest": edited.digest}
        print(json.dumps({"file": str(target), "width": width, "height": height, **facts}, indent=1))
    else:
        print(f"{target}  {width}x{height}  {concept} v{edited.version} {edited.digest}")


def compare(
    config: Config,
    one: Annotated[str, typer.Argument(metavar="A", help="CONCEPT or CONCEPT@VERSION.", show_default=False)],
    other: Annotated[str, typer.Argument(metavar="B", help="CONCEPT or CONCEPT@VERSION.", show_default=False)],
    photo: Annotated[
        Path | None, typer.Option("--photo", help="Of this photo; default some of the farm's test photos.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The picture; default A-B.webp.", show_default=False),
    ] = None,
    side: Side = None,
    override: Override = None,
    as_json: Json = False,
) -> None:
    """Two published versions, `night@1 night@3`, or two concepts, beside each other in one picture."""
    from farm.comparing import compare as beside
    from farm.editing import PhotoEditor
    from farm.plan import make_plan

    loaded = load_config(config, override or [])
    target = out or Path(f"{one}-{other}.webp".replace("@", "-v"))
    _check_name(target)
    with naming(config):
        editor = PhotoEditor(loaded)
        plan = make_plan(loaded) if photo is None else None
    found = beside(editor, plan, one, other, photo=photo, side=side)
    _write(target, found.picture, 90)
    if as_json:
        rows = [
            {"concept": s.concept, "version": s.release.version, "digest": s.release.digest, "metrics": s.metrics}
            for s in found.sides
        ]
        print(json.dumps({"file": str(target), "sides": rows}, indent=1))
        return
    _print_metrics(found.sides)
    print(target)


def _print_metrics(sides: tuple[Compared, Compared]) -> None:
    from rich.console import Console
    from rich.table import Table

    from farm.showing import flattened

    table = Table("", *(side.label for side in sides))
    table.add_row("adapter", *(side.release.digest[:12] for side in sides))
    table.add_row("base", *(side.release.base[:12] for side in sides))
    table.add_row("published", *(side.release.published_at for side in sides))
    flat = [flattened(side.metrics) for side in sides]
    for name in dict.fromkeys(name for metrics in flat for name in metrics):
        table.add_row(name, *(metrics.get(name, "-") for metrics in flat))
    Console().print(table)


def _check_name(target: Path) -> None:
    if target.suffix.lower() not in FORMATS:
        raise UserError(f"{target}: the edited photo's name must end in {', '.join(FORMATS)}.")


def _write(target: Path, image: PIL.Image.Image, quality: int) -> None:
    from farm.images import encode

    write_whole(target, encode(image, FORMATS[target.suffix.lower()], quality=quality))  # type: ignore[arg-type]
