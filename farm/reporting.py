"""A run's report in the store: `runs/<id>/report.html`, and beside it how the run ended."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict, ValidationError

from farm.artifacts import DOCUMENT_BYTES, MANIFEST, dump
from farm.objects import NotFoundError
from farm.plan import Plan
from farm.queue import Queue
from farm.store import Store
from farm.threads import in_threads

REPORT, PLAN, ENDED = "report.html", "plan.json", "ended.json"


class Ended(BaseModel):
    """How a run of a farm ended. failures: reason by concept. seconds: of this run by stage."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    farm: str
    failures: dict[str, str]
    seconds: dict[str, float]


def new_run_id() -> str:
    """Ids sort as their runs began."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def put_report(
    store: Store, plan: Plan, run_id: str, *, failures: Mapping[str, str], seconds: Mapping[str, float]
) -> str:
    """Build the report of a run, and put it with what it is of; the report's key."""
    from farm.report import build_report

    folder = f"runs/{run_id}"
    store.put(f"{folder}/{REPORT}", build_report(store, plan, failures=failures, stage_seconds=seconds))
    store.put(f"{folder}/{PLAN}", json.dumps(addresses(plan)).encode())
    ended = Ended(farm=plan.config.name, failures=dict(failures), seconds=dict(seconds))
    store.put(f"{folder}/{ENDED}", dump(ended))
    return f"{folder}/{REPORT}"


def latest_report(store: Store, plan: Plan) -> str | None:
    """The key of the newest report of exactly these artifacts."""
    plans = [key for key in store.list("runs/") if key.endswith(f"/{PLAN}")]
    for key in reversed(plans):
        report = key.removesuffix(PLAN) + REPORT
        if json.loads(store.get(key)) == addresses(plan) and store.exists(report):
            return report
    return None


def rebuild(store: Store, plan: Plan) -> str:
    """Build the report anew, of what the store holds now; its key, which is that of the last run of these artifacts."""
    latest, (failures, seconds) = latest_report(store, plan), how_it_stands(store, plan)
    run_id = latest.split("/")[1] if latest else new_run_id()
    return put_report(store, plan, run_id, failures=failures, seconds=seconds)


def how_it_stands(store: Store, plan: Plan) -> tuple[dict[str, str], dict[str, float]]:
    """What failed in this farm's last run and has not been made since, and the seconds of that run by stage."""

    def read(key: str) -> Ended | None:
        try:
            ended = Ended.model_validate_json(store.get(key, DOCUMENT_BYTES))
        except (ValidationError, NotFoundError):
            return None
        return ended if ended.farm == plan.config.name else None

    keys = [key for key in store.list("runs/") if key.endswith(f"/{ENDED}")]
    last = next((ended for ended in map(read, reversed(keys)) if ended), None)
    queued = {item.key: item for item in Queue(store, "adapters").failed()}
    failures = dict(last.failures) if last else {}
    for concept in plan.config.catalogue:
        if item := queued.get(plan.adapter_key(concept.id)):
            why = (item.error.strip() or "no reason given").splitlines()[-1]
            failures.setdefault(concept.id, f"adapter: {why}")
    known = [concept.id for concept in plan.config.catalogue if concept.id in failures]
    made = in_threads(lambda c: store.exists(f"{plan.adapter(c).path}/{MANIFEST}"), known, store.at_once)
    for concept_id, there in zip(known, made, strict=True):
        if there:
            del failures[concept_id]
    return failures, dict(last.seconds) if last else {}


def addresses(plan: Plan) -> list[str]:
    """The folders of the farm's adapters."""
    return [plan.adapter(concept.id).path for concept in plan.config.catalogue]
