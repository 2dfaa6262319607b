"""A farm from Python, in a script or a notebook: `from farm import Farm`."""

from __future__ import annotations

import html
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farm.config import FarmConfig
from farm.config_file import load_config
from farm.options import naming
from farm.store import Store, open_store
from farm.yaml_line import flow

if TYPE_CHECKING:
    import PIL.Image

    from farm.comparing import Comparison
    from farm.editing import Photo, PhotoEditor
    from farm.plan import Plan
    from farm.run import Outcome


class Farm:
    """One farm: its configuration, and what its store holds.

    config: the YAML file. overrides: of its keys, by their dotted names (`{"sources.size": 64}`), or as `--set` takes
    them.

    Every method raises UserError, a sentence, for a mistake in the configuration or the arguments.
    """

    def __init__(self, config: str | os.PathLike[str], overrides: Mapping[str, Any] | Sequence[str] = (), /) -> None:
        self.path = Path(config)
        given = overrides if not isinstance(overrides, Mapping) else [f"{k}={flow(v)}" for k, v in overrides.items()]
        self._overrides = list(given)
        self.config: FarmConfig = load_config(self.path, self._overrides)

    @cached_property
    def store(self) -> Store:
        """Where everything is kept."""
        with naming(self.path):
            return open_store(self.config.store, self.config.cluster.store_patience_seconds)

    @property
    def concepts(self) -> list[str]:
        """The ids of the catalogue."""
        return [concept.id for concept in self.config.catalogue]

    def run(self, stages: Sequence[str] | None = None, *, only: Sequence[str] = (), dry_run: bool = False) -> Outcome:
        """Photos in, published adapters and a report out, as `farm run`; goes on where an earlier run stopped.

        stages: of `concepts`, `base`, `ranks`, `adapters`; all when None. only: these concepts and what they need.
        """
        from farm import run as farm_run
        from farm.notebook import screen

        for concept_id in only:
            self.config.concept(concept_id)
        with naming(self.path):
            return farm_run.run(
                self.config, screen=screen(), stages=stages or farm_run.STAGES, only=only, dry_run=dry_run
            )

    def status(self) -> Status:
        """Every concept by stage; a table in a notebook."""
        from farm.status import farm_status

        with naming(self.path):
            return Status(farm_status(self.store, self._plan()))

    def show(self, concept: str) -> Shown:
        """One concept: how far it is, how good, what is served of it, and its pictures."""
        from farm import showing

        plan = self._plan()
        facts = showing.concept_facts(self.store, plan, concept)
        return Shown(facts, showing.pictures(self.store, plan, facts))

    def edit(
        self,
        photo: Photo,
        concept: str,
        *,
        version: int | None = None,
        strength: float = 1.0,
        side: int | None = None,
        size: int | None = None,
    ) -> PIL.Image.Image:
        """The photo edited with a published concept; a notebook shows it.

        photo: a path, a file's bytes, a Pillow image or uint8 `[h, w, 3]`. version: a published one; the current one
        when None. strength: 0 to 1. side: longest side that the network works at. size: longest side of the answer.
        """
        edited = self._editor.edit(photo, concept, version=version, strength=strength, side=side, size=size)
        return edited.image

    def compare(self, one: str, other: str, photo: Photo | None = None) -> Comparison:
        """Two published versions (`night@1`, `night@3`) or two concepts beside each other; a notebook shows it.

        photo: of this one; of some that nothing was trained on when None.
        """
        from farm.comparing import compare

        return compare(self._editor, self._plan() if photo is None else None, one, other, photo=photo)

    def __repr__(self) -> str:
        return f"Farm({str(self.path)!r}): {self.config.name}, {len(self.concepts)} concepts in {self.config.store}"

    @cached_property
    def _editor(self) -> PhotoEditor:
        from farm.editing import PhotoEditor

        with naming(self.path):
            return PhotoEditor(self.config, self.store)

    def _plan(self) -> Plan:
        """Made anew each time: photos and models may have changed."""
        from farm.plan import make_plan

        with naming(self.path):
            return make_plan(self.config)


@dataclass(frozen=True, repr=False)
class _Document(Mapping[str, Any]):
    """What a command prints with --json, as a mapping."""

    document: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.document[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.document)

    def __len__(self) -> int:
        return len(self.document)


class Status(_Document):
    """What `farm status --json` prints; a notebook shows its concepts as a table."""

    def __repr__(self) -> str:
        concepts = self["concepts"]
        served = sum(row["published"] is not None for row in concepts)
        return f"{self['farm']}: {served} of {len(concepts)} concepts are published"

    def _repr_html_(self) -> str:
        rows = [
            [row["id"], row["role"], *row["stages"].values(), row["published"] or "-", _ratio(row["metrics"])]
            for row in self["concepts"]
        ]
        head = ["concept", "role", "edits", "adapter", "published", "version", "L1 / untouched"]
        return f"<p>{html.escape(repr(self))}</p>{_table(head, rows)}"


@dataclass(frozen=True, repr=False)
class Shown(_Document):
    """What `farm show --json` prints. files: its pictures as WebP, by name."""

    files: dict[str, bytes]

    @property
    def preview(self) -> PIL.Image.Image | None:
        """Rows of small pictures: test photos, the teacher's edits, the adapter's; None before there is an adapter."""
        import io

        import PIL.Image

        return PIL.Image.open(io.BytesIO(self.files["preview"])) if "preview" in self.files else None

    def __repr__(self) -> str:
        return "\n".join(f"{key:<10} {text}" for key, text in self._lines())

    def _repr_html_(self) -> str:
        import base64

        table = _table([], [list(line) for line in self._lines()])
        if "preview" not in self.files:
            return table
        source = f"data:image/webp;base64,{base64.b64encode(self.files['preview']).decode()}"
        return f'{table}<p><img src="{source}" alt="photos, the teacher\'s edits, the adapter\'s"></p>'

    def _lines(self) -> list[tuple[str, str]]:
        from farm.showing import lines

        return list(lines(self.document))


def _ratio(metrics: Mapping[str, Any] | None) -> str:
    return f"{metrics['l1']:.3f} / {metrics['l1_untouched']:.3f}" if metrics else "-"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    above = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f'<td style="text-align:left">{html.escape(str(cell))}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table>{f'<tr>{above}</tr>' if head else ''}{body}</table>"
