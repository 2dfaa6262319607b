"""A few units of every kind of work, done for real and timed: what a farm's first prediction is made of.

Each teacher edits a few photos; a base of the farm's size, and an adapter of it, are trained on them for a few steps.
Nothing of it is kept but the times.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from statistics import median

import numpy as np
import torch

from e2gan.batches import ConceptPairs
from e2gan.config import TrainConfig
from e2gan.lora import new_adapter, searched_ranks
from e2gan.lora_attach import attach
from e2gan.model import Generator, build_generator
from e2gan.pairs import Image, Pairs
from e2gan.train import Progress, train
from farm.artifacts import dump
from farm.catalogue import Concept
from farm.cost.rates import Probe, Timed, edit_key, planned_key, probe_key
from farm.editors import Failed, edit_seed, open_editor
from farm.errors import UserError
from farm.plan import Plan
from farm.sources import Photo, crops, read_photos
from farm.stages.judge import text_embedding
from farm.store import Store

PHOTOS = 8
"""Photos that a teacher edits; one more comes before them, for what a first edit takes longer."""
STEPS, WARM_STEPS = 12, 4
"""Training steps, and how many of them are not timed."""


def probe(store: Store, plan: Plan, say: Callable[[str], None]) -> Probe:
    """Time the units of a farm on this machine, and keep what was found in the store.

    Raises:
        UserError: no photo can be used, or a teacher's model is missing.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    photos = _photos(plan)
    found = (*_edits(plan, photos, say), *_trainings(plan, photos, device, say))
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.node()} (CPU)"
    made = Probe(made_at=datetime.now(UTC).isoformat(timespec="seconds"), machine=name, timed=found)
    store.put(probe_key(plan.config.name), dump(made))
    return made


def _photos(plan: Plan) -> dict[str, Image]:
    found: dict[str, Image] = {}
    for photo in read_photos(plan.config.sources):
        if isinstance(photo, Photo):
            found |= crops(photo, plan.config.sources, plan.config.seed)
        if len(found) > PHOTOS:
            return dict(list(found.items())[: PHOTOS + 1])
    if len(found) < 2:
        raise UserError("sources.path: there are no two photos that could be edited and timed; give more of them.")
    return found


def _edits(plan: Plan, photos: dict[str, Image], say: Callable[[str], None]) -> Iterator[Timed]:
    """Every teacher once, with the first concept that may have it."""
    first: dict[str, Concept] = {}
    for concept in plan.config.catalogue:
        for name in plan.teachers[concept.id]:
            first.setdefault(name, concept)
    for name, concept in first.items():
        say(f"teacher {name}: {len(photos) - 1} photos")
        settings, fingerprint = plan.config.candidates(concept.id)[name], plan.teachers[concept.id][name]
        seeds = [edit_seed(plan.config.seed, concept.id, image_id) for image_id in photos]
        images = list(photos.values())
        try:
            editor = open_editor(settings, concept.id, fingerprint)
            editor.edit(images[:1], concept.request, seeds[:1])
            started = time.perf_counter()
            edits = editor.edit(images[1:], concept.request, seeds[1:])
        except UserError as error:
            raise plan.config.of_teacher(error, concept.id, name) from error
        seconds = time.perf_counter() - started
        del editor  # there may be room for one only
        if failed := [edit.reason for edit in edits if isinstance(edit, Failed)]:
            say(f"teacher {name}: {len(failed)} of {len(edits)} edits failed, first: {failed[0]}")
        side = plan.config.sources.size
        yield Timed(what=name, key=edit_key(fingerprint, side), units=len(edits), seconds=seconds)


def _trainings(
    plan: Plan, photos: dict[str, Image], device: torch.device, say: Callable[[str], None]
) -> Iterator[Timed]:
    """A few steps of the base, of an adapter, and of a round of the rank search where that trains otherwise."""
    config = plan.config
    text = text_embedding(config, config.catalogue[0].prompt)
    mirrored = {image_id: np.ascontiguousarray(image[:, ::-1]) for image_id, image in photos.items()}
    pairs = ConceptPairs(concept="probe", text=text, pairs=Pairs.from_images(photos, mirrored, list(photos)))
    seen = set[str]()
    kinds = (
        ("base", config.base.train, config.cluster.base.cpus),
        ("adapter", config.adapters.train, config.cluster.adapters.cpus),
        ("adapter", config.ranks.train, config.cluster.ranks.cpus),
    )
    for what, training, cpus in kinds:
        key = planned_key(plan, what, training)
        if key in seen:
            continue
        seen.add(key)
        generator = build_generator(config.model, seed=config.seed)
        if what == "adapter":
            ranks = searched_ranks(generator)
            attach(generator, new_adapter(generator, ranks, scale=config.adapters.lora.scale, seed=0))
        say(f"{what}: {STEPS} steps of {training.batch_size} images")
        with _threads(cpus):
            seconds = _step_seconds(generator, pairs, training, device)
        yield Timed(what=what, key=key, units=training.batch_size, seconds=seconds)


def _step_seconds(generator: Generator, pairs: ConceptPairs, training: TrainConfig, device: torch.device) -> float:
    """The median time of a step, of those after the first ones, with all the losses that the last ones have."""
    copies = -(-training.batch_size // len(pairs.pairs))
    concepts = [replace(pairs, concept=f"probe-{n}") for n in range(copies)]  # an epoch is a batch at least
    epochs = STEPS * training.batch_size / (copies * len(pairs.pairs))
    few = replace(training, epochs=epochs, adversarial_start=0.0, schedule="constant")
    reached: list[float] = []

    def progress(done: Progress) -> None:
        reached.append(time.perf_counter())

    train(generator, concepts, few, seed=0, device=device, on_progress=progress, progress_every=1)
    return median(after - before for before, after in pairwise(reached[WARM_STEPS - 1 :]))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """As many as the stage's workers have."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
