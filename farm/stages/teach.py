"""What a concept's teachers still have to do, step by step: compared, then editing, then edited again where it was bad.

Every step is known from what the store holds, so whoever comes next goes on where the last one stopped.
"""

from __future__ import annotations

from typing import Literal

from farm.artifacts import find
from farm.plan import Plan
from farm.stages.compare import commit_comparison, comparison_units, teacher_of
from farm.stages.edit import commit_edits, edit_units
from farm.stages.quality import judge_edits
from farm.stages.units import Unit, Worker, undone
from farm.store import Store

Goal = Literal["comparison", "quality"]
"""How far to go: only choose the teachers, or all the way to checked edits."""


def advance(store: Store, plan: Plan, concept_id: str, goal: Goal = "quality") -> list[Unit]:
    """Commit what is complete and return the units to work on next; none when the concept has reached the goal.

    Called again when those are done. A concept that no teacher edits well reaches the goal with its comparison.
    """
    if plan.compared(concept_id):
        if find(store, plan.comparison(concept_id).path) is None:
            if todo := undone(store, comparison_units(store, plan, concept_id)):
                return todo
            commit_comparison(store, plan, concept_id)
        if teacher_of(store, plan, concept_id) is None:
            return []
    if goal == "comparison" or find(store, plan.quality(concept_id).path) is not None:
        return []
    if find(store, plan.edits(concept_id).path) is None:
        if todo := undone(store, edit_units(store, plan, concept_id)):
            return todo
        commit_edits(store, plan, concept_id)
    return judge_edits(store, plan, concept_id)


def teach(store: Store, plan: Plan, concept_id: str, worker: Worker, goal: Goal = "quality") -> None:
    """Do all of it here, without Ray."""
    while units := advance(store, plan, concept_id, goal):
        for unit in units:
            worker.work(unit)
