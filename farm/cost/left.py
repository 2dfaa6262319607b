"""The work that is left of a farm, artifact by artifact, and where what is said of it is from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from e2gan.config import TrainConfig
from e2gan.train import total_steps
from farm.artifacts import Manifest, find
from farm.cost.prices import StageName
from farm.cost.rates import Rates, edit_key, planned_key
from farm.plan import Plan
from farm.stages.units import UNIT_IMAGES
from farm.standing import Seen, base_concepts
from farm.todo import Todo

SEARCH_ROUNDS = 4
"""Rounds of a rank search where none was seen: 1, 2, 4, 8, as the paper's and the demo's."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """An artifact that is missing. units: images. unit_seconds: None where that was not measured. at_once: the part of
    it that one worker does in one go."""

    path: str
    stage: StageName
    units: float
    unit_seconds: float | None
    at_once: float

    @property
    def seconds(self) -> float | None:
        return None if self.unit_seconds is None else self.units * self.unit_seconds


class Left:
    """The work that is left, and where what is said of it is from."""

    def __init__(self, plan: Plan, seen: Seen, manifests: Mapping[str, Manifest], rates: Sequence[Rates]) -> None:
        self._plan, self._found, self._manifests, self._rates = plan, seen.store, manifests, rates
        self.measured: list[str] = []
        self.assumed: list[str] = []
        self.unknown: list[str] = []
        self._of_teacher: dict[str, set[str]] = {}
        self._count()

    def assume(self, sentence: str) -> None:
        if sentence not in self.assumed:
            self.assumed.append(sentence)

    def _count(self) -> None:
        """How many images a teacher edits, and how many of them are trained on."""
        config, selection = self._plan.config, find(self._found, self._plan.selection.path)
        if selection:
            self._edited = sum(int(selection.summary[split]) for split in ("train", "validation", "test"))
            self._trained = int(selection.summary["train"])
        else:
            images, split = len(self._plan.photos["photos"]) * config.sources.crops_per_photo, config.sources.split
            training = round(images * split.train)
            self._trained = min(config.selection.clusters or training, training)
            self._edited = self._trained + images - training
            self.assume(f"every photo can be used: {self._edited:,} images a concept, {self._trained:,} to train on")

    def edits(self, todo: Todo) -> Iterable[Work]:
        """Comparisons, edits and further attempts."""
        plan, probes = self._plan, self._plan.config.comparison.probes
        for concept_id in todo.comparisons:
            seconds = [self._edit_seconds(concept_id, name) for name in plan.teachers[concept_id]]
            path, units = plan.comparison(concept_id).path, float(probes * len(seconds))
            yield Work(path=path, stage="edit", units=units, unit_seconds=_mean(seconds), at_once=probes)
        again = self._again() if todo.edits else 0.0
        for concept_id in todo.edits:
            a_unit = self._concept_seconds(concept_id)
            made = find(self._found, plan.edits(concept_id).path) or self._manifests.get(plan.edits(concept_id).path)
            first, after = plan.edits(concept_id).path, plan.quality(concept_id).path
            work = Work(path=first, stage="edit", units=self._edited, unit_seconds=a_unit, at_once=UNIT_IMAGES)
            if made is None:
                yield work
            if again:
                yield replace(work, path=after, units=self._edited * again)

    def base(self, todo: Todo) -> Iterable[Work]:
        plan, config = self._plan, self._plan.config
        if todo.base:
            learned = len(base_concepts(self._found, plan)) or config.base.representatives or 0
            images = images_of(config.base.train, learned * self._pairs)
            seconds = self._train_seconds("base", planned_key(plan, "base", config.base.train))
            yield Work(path=plan.base.path, stage="base", units=images, unit_seconds=seconds, at_once=images)

    def ranks(self, todo: Todo) -> Iterable[Work]:
        plan, config = self._plan, self._plan.config
        if todo.ranks:
            rounds = SEARCH_ROUNDS
            self.assume(f"{rounds} rounds of the rank search a concept, each as fast as an adapter's training")
            images = rounds * images_of(config.ranks.train, self._pairs)
            seconds = self._train_seconds("rank search", planned_key(plan, "adapter", config.ranks.train))
            count = len(config.ranks.concepts)
            yield Work(path=plan.ranks.path, stage="ranks", units=count * images, unit_seconds=seconds, at_once=images)

    def adapters(self, todo: Todo) -> Iterable[Work]:
        plan, config = self._plan, self._plan.config
        if todo.adapters:
            images = images_of(config.adapters.train, self._pairs)
            seconds = self._train_seconds("adapter", planned_key(plan, "adapter", config.adapters.train))
            for concept_id in todo.adapters:
                path = plan.adapter(concept_id).path
                yield Work(path=path, stage="adapters", units=images, unit_seconds=seconds, at_once=images)

    @property
    def _pairs(self) -> int:
        """Pairs of a concept to train on."""
        good, images = self._summed("good"), self._summed("images")
        if not images:
            self.assume("every edit is good")
            return self._trained
        return max(1, round(self._trained * good / images))

    def _again(self) -> float:
        """Further attempts, as a share of the edits."""
        attempts, images = self._summed("attempts"), self._summed("images")
        if not images and self._plan.config.quality.retries:
            self.assume("no edit has to be made again")
        return attempts / images if images else 0.0

    def _summed(self, key: str) -> int:
        """Over all concepts whose edits were judged."""
        return sum(int(m.summary[key]) for m in self._manifests.values() if m.stage == "quality")

    def _concept_seconds(self, concept_id: str) -> float | None:
        """Of an edit by the teacher the concept has, or by any of those it may get."""
        names = list(self._plan.teachers[concept_id])
        if self._plan.compared(concept_id):
            comparison = find(self._found, self._plan.comparison(concept_id).path)
            if comparison and comparison.summary["teacher"]:
                names = [comparison.summary["teacher"]]
            else:
                self.assume("a concept whose teachers are still to be compared gets one of middling speed")
        return _mean([self._edit_seconds(concept_id, name) for name in names])

    def _edit_seconds(self, concept_id: str, name: str) -> float | None:
        key = edit_key(self._plan.teachers[concept_id][name], self._plan.config.sources.size)
        return self._known(f"teacher {name}", lambda rates: rates.of_key(key) or self._alike(rates, name))

    def _alike(self, rates: Rates, name: str) -> float | None:
        """Of the same teacher with another filter or instruction of this farm."""
        found = [seconds for key in self._keys(name) if (seconds := rates.of_key(key)) is not None]
        return fmean(found) if found else None

    def _keys(self, name: str) -> set[str]:
        """Of all the farm's edits by this teacher."""
        if name not in self._of_teacher:
            own = [named[name] for named in self._plan.teachers.values() if name in named]
            self._of_teacher[name] = {edit_key(one, self._plan.config.sources.size) for one in own}
        return self._of_teacher[name]

    def _train_seconds(self, what: str, key: str) -> float | None:
        return self._known(what, lambda rates: rates.of_key(key))

    def _known(self, what: str, look: Callable[[Rates], float | None]) -> float | None:
        for rates in self._rates:
            if (seconds := look(rates)) is not None:
                sentence = f"{what}: {pace(seconds)} an image, from {rates.source}"
                if not any(said.startswith(f"{what}: ") for said in self.measured):
                    self.measured.append(sentence)
                return seconds
        if (sentence := f"{what}: nothing was measured") not in self.unknown:
            self.unknown.append(sentence)
        return None


def images_of(train: TrainConfig, pairs: int) -> float:
    """How many images a training goes through."""
    return float(total_steps(train, pairs) * train.batch_size)


def _mean(seconds: Sequence[float | None]) -> float | None:
    known = [s for s in seconds if s is not None]
    return fmean(known) if len(known) == len(seconds) else None


def pace(seconds: float) -> str:
    """Of one image, for people."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
