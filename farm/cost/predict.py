"""What is left of a farm's work will take and cost, from measured unit times.

The time of a stage is that of its slots working through it: all the work over the slots, and the longest piece once
more but for a slot's share of it, which no order of the pieces exceeds (Graham, 1969). Stages come one after another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict

from farm.artifacts import Manifest
from farm.config import FarmConfig
from farm.cost.left import Left, Work
from farm.cost.prices import STAGES, StageName
from farm.cost.rates import Rates, all_manifests, known_rates
from farm.cost.slots import kept, slots_of
from farm.plan import Plan
from farm.standing import Seen
from farm.store import Store
from farm.todo import Todo


class StagePrediction(BaseModel):
    """A stage's work that is left. artifacts: how many are to be made. units: of `of`. unit_seconds: of one, by one
    worker. work_seconds: of all workers together; gpu_seconds: of the GPUs they hold; seconds: from its beginning to
    its end. None: not measured; money is also None where nodes have no prices."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: StageName
    artifacts: int
    units: float
    of: str
    unit_seconds: float | None
    work_seconds: float | None
    gpu_seconds: float | None
    slots: int
    node: str | None
    seconds: float | None
    money: float | None


class Prediction(BaseModel):
    """What is left of a farm's work, as it was known at `made_at`.

    artifacts: seconds of every artifact that was missing, by its folder, as far as they are known. seconds: of the
    whole run, work_seconds, gpu_seconds and money: of all stages, of which some may be unknown: `complete` says so.
    nodes_money: what all nodes cost that are kept to the end. measured, assumed, unknown: sentences.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    farm: str
    made_at: str
    currency: str
    stages: tuple[StagePrediction, ...]
    artifacts: dict[str, float]
    work_seconds: float
    gpu_seconds: float
    seconds: float
    money: float | None
    nodes_money: float | None
    complete: bool
    measured: tuple[str, ...]
    assumed: tuple[str, ...]
    unknown: tuple[str, ...]


def forecast(store: Store, plan: Plan, seen: Seen, todo: Todo) -> Prediction:
    """`predict` from what the store holds: artifacts, and the last probe.

    Raises:
        UserError: see `farm.cost.slots`.
    """
    manifests = all_manifests(store, plan)
    return predict(plan, seen, todo, manifests, known_rates(store, plan.config.name, manifests))


def predict(
    plan: Plan, seen: Seen, todo: Todo, manifests: Mapping[str, Manifest], rates: Sequence[Rates]
) -> Prediction:
    """What is left, from the first of `rates` that knows a unit.

    seen, todo: the farm as it is. manifests: every artifact of the store, of which some tell what was still unknown.

    Raises:
        UserError: see `farm.cost.slots`.
    """
    told = Left(plan, seen, manifests, rates)
    works = [*told.edits(todo), *told.base(todo), *told.ranks(todo), *told.adapters(todo)]
    slots = {stage: slots_of(plan.config, stage) for stage in STAGES}
    stages = tuple(of_stage(plan.config, stage, [w for w in works if w.stage == stage]) for stage in STAGES)
    if any(line.artifacts for line in stages):
        counts = ", ".join(f"{slots[s].count} for {s}" for s in STAGES)
        told.assume(f"workers at once: {counts} (from {slots['edit'].known})")
        told.assume(
            "starting Ray, nodes and models, cutting and choosing photos, and measuring and storing are not counted"
        )
    known = [line for line in stages if line.work_seconds is not None]
    artifacts = {work.path: work.seconds for work in works if work.seconds is not None}
    for line in known:
        if line.stage == "ranks" and plan.ranks.path in artifacts:  # its searches go on side by side
            artifacts[plan.ranks.path] = line.seconds or 0.0
    seconds = sum(line.seconds or 0 for line in known)
    money = [line.money for line in known if line.money is not None]
    return Prediction(
        farm=plan.config.name,
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        currency=plan.config.cost.currency,
        stages=stages,
        artifacts={path: round(took, 3) for path, took in artifacts.items()},
        work_seconds=sum(line.work_seconds or 0 for line in known),
        gpu_seconds=sum(line.gpu_seconds or 0 for line in known),
        seconds=seconds,
        money=sum(money) if plan.config.cost.nodes else None,
        nodes_money=kept(plan.config, seconds),
        complete=len(known) == len(stages),
        measured=tuple(told.measured),
        assumed=tuple(told.assumed),
        unknown=tuple(told.unknown),
    )


def of_stage(config: FarmConfig, stage: StageName, works: Sequence[Work]) -> StagePrediction:
    slots, worker = slots_of(config, stage), getattr(config.cluster, stage)
    seconds = [work.seconds for work in works]
    known = [s for s in seconds if s is not None]
    complete = len(known) == len(works)
    units = sum(work.units for work in works)
    # All workers of the base are at it from its beginning to its end.
    together = config.base.workers if stage == "base" else 1
    total = sum(known) * together if complete else None
    longest = max((min(work.at_once, work.units) * (work.unit_seconds or 0) for work in works), default=0.0)
    count = 1 if stage == "base" else slots.count
    return StagePrediction(
        stage=stage,
        artifacts=len(works),
        units=units,
        of="images edited" if stage == "edit" else "images trained on",
        unit_seconds=sum(known) / units if units and complete else None,
        work_seconds=total,
        gpu_seconds=None if total is None else total * worker.gpus,
        slots=together if stage == "base" else count,
        node=slots.node,
        seconds=sum(known) / count + longest * (1 - 1 / count) if complete else None,
        money=None if total is None or slots.price is None else total * slots.price,
    )
