"""What a worker that edits does: one unit at a time, measured at once and put into the store."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from pydantic import BaseModel, ConfigDict

from e2gan.pairs import Image, write_table
from farm.artifacts import MANIFEST, FileEntry, dump, read
from farm.device import gpu_used
from farm.editors import Editor, EditorSettings, Failed, edit_seed, open_editor
from farm.errors import IntegrityError, UserError
from farm.events import Spent
from farm.plan import Plan
from farm.quality.clip import ClipJudge
from farm.quality.measure import Measures, measure, read_measures, write_measures
from farm.stages.ingest import source_images
from farm.stages.select import selected_ids
from farm.store import NotFoundError, Store, where

UNIT_IMAGES = 50
"""Images a unit of work edits: what is redone when a worker dies."""
PANEL_IMAGES = 64
"""Photos that an edit is held against, to see that it is of its own photo and no other."""


class Receipt(BaseModel):
    """What a worker leaves of a unit, last of all: with it the unit is done.

    seconds: the teacher's. failed: how many images it did not edit. files: what was put, by name below the unit's
    folder. Receipts lie beside the artifact's files and are none of them: seconds are never the same twice.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    seconds: float
    failed: int
    files: dict[str, FileEntry]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Images that one teacher edits in one go.

    teacher: its name among the concept's candidates. folder, name: where in the store the results go. attempt: how
    often these images were edited before.
    """

    concept: str
    teacher: str
    folder: str
    name: str
    ids: tuple[str, ...]
    attempt: int = 0

    @property
    def files(self) -> tuple[str, str]:
        """The edits and their measures."""
        return f"images/{self.name}.parquet", f"measures/{self.name}.parquet"

    @property
    def receipt_key(self) -> str:
        return f"{self.folder}/receipts/{self.name}.json"

    def done(self, store: Store) -> bool:
        return store.exists(self.receipt_key)

    def receipt(self, store: Store) -> Receipt:
        """The receipt of a unit that is done; IntegrityError where it is damaged."""
        return read(Receipt, store=store, key=self.receipt_key, fix="delete it")[0]

    def measured(self, store: Store) -> Sequence[Measures]:
        """The measures of a unit that is done; IntegrityError where they are missing or damaged."""
        key = f"{self.folder}/{self.files[1]}"
        try:
            return read_measures(store.get(key))
        except (NotFoundError, ValueError) as error:
            raise IntegrityError(
                f"{where(store, key)} is damaged ({error}): delete {self.receipt_key} and, if it is there, "
                f"{self.folder}/{MANIFEST}, and run again."
            ) from error


def undone(store: Store, units: Sequence[Unit]) -> list[Unit]:
    """Those of a step's units that are not done, in one store call."""
    receipts = set(store.list(f"{units[0].folder}/receipts/"))
    return [unit for unit in units if unit.receipt_key not in receipts]


def cut_units(concept: str, teacher: str, folder: str, name: str, ids: Sequence[str], attempt: int = 0) -> list[Unit]:
    """Units of at most UNIT_IMAGES images, named `<name>-00000` and on."""
    return [
        Unit(
            concept=concept,
            teacher=teacher,
            folder=folder,
            name=f"{name}-{start // UNIT_IMAGES:05d}",
            ids=tuple(ids[start : start + UNIT_IMAGES]),
            attempt=attempt,
        )
        for start in range(0, len(ids), UNIT_IMAGES)
    ]


def edited_ids(store: Store, plan: Plan) -> list[str]:
    """The ids of all images a concept's teacher edits."""
    selected = selected_ids(store, plan)
    return [image_id for split in ("train", "validation", "test") for image_id in selected[split]]


class Worker:
    """A process that edits. It keeps the teacher it used last, the photos and CLIP from one unit to the next.

    Two threads may call `work`: one unit is edited at a time, and the one before is measured and stored meanwhile.
    """

    def __init__(self, store: Store, plan: Plan) -> None:
        self._store, self._plan = store, plan
        self._teaching = threading.Lock()
        self._opened: tuple[tuple[EditorSettings, str], Editor] | None = None
        self._refused: dict[tuple[EditorSettings, str], UserError] = {}

    def work(self, unit: Unit) -> Spent:
        """Edit a unit's images, measure them, put both as Parquet, and then the receipt; say what that took.

        A unit that another worker has done meanwhile is left as it is: another device may make other bytes.

        Raises:
            UserError: the teacher's model is missing or does not do this.
        """
        prompt = self._plan.config.concept(unit.concept).request
        seeds = [edit_seed(self._plan.config.seed, unit.concept, i, unit.attempt) for i in unit.ids]
        with self._teaching:
            began = time.monotonic()
            panel, clip = self._panel, self._clip  # CLIP's weights may be missing: better known before the edits
            photos = [self._photos[image_id] for image_id in unit.ids]
            try:
                editor = self._editor(unit)
                started = time.monotonic()
                edits = editor.edit(photos, prompt, seeds)
            except UserError as error:
                raise self._plan.config.of_teacher(error, unit.concept, unit.teacher) from error
            seconds = time.monotonic() - started
            gpu = gpu_used()
        measures = measure(unit.ids, photos, edits, panel, clip, prompt)
        made = {i: edit for i, edit in zip(unit.ids, edits, strict=True) if not isinstance(edit, Failed)}
        files = dict(zip(unit.files, (write_table(made), write_measures(measures)), strict=True))
        if unit.done(self._store):
            return Spent(time.monotonic() - began, seconds, images=len(unit.ids), **gpu)
        for name, data in files.items():
            self._store.put(f"{unit.folder}/{name}", data)
        entries = {name: FileEntry.of(data) for name, data in files.items()}
        receipt = Receipt(seconds=round(seconds, 3), failed=len(unit.ids) - len(made), files=entries)
        self._store.put(unit.receipt_key, dump(receipt))
        size = sum(map(len, files.values()))
        return Spent(time.monotonic() - began, seconds, size, len(unit.ids), **gpu)

    def _editor(self, unit: Unit) -> Editor:
        settings = self._plan.config.candidates(unit.concept)[unit.teacher]
        key = (settings, unit.concept if settings.kind == "procedural" else "")
        if key in self._refused:  # loading a model to find out again takes a minute, for every concept
            raise self._refused[key]
        if self._opened is None or self._opened[0] != key:
            self._opened = None  # let go of the one before: there may be room for one only
            try:
                fingerprint = self._plan.teachers[unit.concept][unit.teacher]
                self._opened = key, open_editor(settings, unit.concept, fingerprint)
            except UserError as error:
                self._refused[key] = error
                raise
        return self._opened[1]

    @property
    def _photos(self) -> dict[str, Image]:
        return source_images(self._store, self._plan.sources.path)

    @cached_property
    def _panel(self) -> list[Image]:
        ids = edited_ids(self._store, self._plan)
        step = max(1, len(ids) / PANEL_IMAGES)
        return [self._photos[ids[int(n * step)]] for n in range(min(PANEL_IMAGES, len(ids)))]

    @cached_property
    def _clip(self) -> ClipJudge | None:
        import torch

        path = self._plan.config.quality.clip
        return ClipJudge(path, device="cuda" if torch.cuda.is_available() else "cpu") if path else None
