"""All that a farm knows of one concept, in one document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

from rich.filesize import decimal

from farm.artifacts import MANIFEST, Artifact, Manifest, find
from farm.errors import IntegrityError
from farm.lineage import short
from farm.plan import Plan
from farm.queue import Queue
from farm.registry import read_record
from farm.status import farm_status
from farm.store import NotFoundError, Store

PRESIGNED_SECONDS = 3600
"""How long the address of a picture in a bucket is good for."""

Facts = dict[str, Any]


def concept_facts(store: Store, plan: Plan, concept_id: str) -> Facts:
    """`{"id", "prompt", …, "stages", "error", "teacher", "edits", "adapter", "metrics", "published", "lineage",
    "pictures"}`; `docs/cli.md` says what is in each.

    The adapter is the one that the configuration makes, or where that is not there yet, the published one.

    Raises:
        UserError: there is no such concept in the catalogue.
    """
    concept = plan.config.concept(concept_id)
    row = next(row for row in farm_status(store, plan)["concepts"] if row["id"] == concept_id)
    record = read_record(store, concept_id)
    adapter = find(store, plan.adapter(concept_id).path)
    if adapter is None and record is not None:
        adapter = find(store, record.adapter)
    quality, edits = find(store, plan.quality(concept_id).path), find(store, plan.edits(concept_id).path)
    candidates = plan.teachers[concept_id]
    chosen = edits.summary["teacher"] if edits else next(iter(candidates)) if len(candidates) == 1 else None
    return {
        "id": concept_id,
        "name": concept.title,
        "prompt": concept.prompt,
        "captions": [concept.request.before, concept.request.after],
        "category": concept.category,
        "domain": concept.domain,
        "role": row["role"],
        "stages": row["stages"],
        "error": row["error"],
        "teacher": {"name": chosen, "candidates": list(candidates), **(candidates[chosen] if chosen else {})},
        "edits": _edits(quality),
        "attempts": _attempts(store, plan, concept_id),
        "adapter": _adapter(adapter),
        "metrics": adapter.summary["metrics"] if adapter else None,
        "published": None
        if record is None
        else {
            **record.model_dump(include={"version", "action", "digest", "base", "published_at", "published_by"}),
            "forced": record.forced,
            "versions": len(record.releases),
            "served": record.published,
            "current": row["current"],
        },
        "lineage": _lineage(store, plan, concept_id, adapter),
        "pictures": {
            name: _address(store, key) for name, key in picture_keys(store, plan, concept_id, adapter).items()
        },
    }


def picture_keys(store: Store, plan: Plan, concept_id: str, adapter: Manifest | None) -> dict[str, str]:
    """The keys of what there is to see: `preview`, and `teachers` where several were compared."""
    keys = {}
    if adapter is not None and "preview.webp" in adapter.files:
        keys["preview"] = f"{adapter.path}/preview.webp"
    if plan.compared(concept_id):
        path = plan.comparison(concept_id).path
        if store.exists(f"{path}/{MANIFEST}"):
            keys["teachers"] = f"{path}/sheet.webp"
    return keys


def pictures(store: Store, plan: Plan, facts: Mapping[str, Any]) -> dict[str, bytes]:
    """The pictures of a document of `concept_facts`, each checked against its manifest, and a small one of `preview`.

    Raises:
        IntegrityError: one is damaged.
    """
    from farm.stages.pictures import middle_column

    adapter = find(store, facts["adapter"]["path"]) if facts["adapter"] else None
    found = {}
    for name, key in picture_keys(store, plan, facts["id"], adapter).items():
        path, _, file = key.rpartition("/")
        manifest = find(store, path)
        if manifest is None:
            raise IntegrityError(f"{path} is not in {store.url} any more; run `farm run` to make it.")
        found[name] = Artifact(store, manifest).read(file)
    if "preview" in found:
        found["small"] = middle_column(found["preview"])
    return found


def lines(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A document of `concept_facts` for people: a key and a text a line."""
    yield "concept", f"{facts['id']}, {facts['category']}, {facts['domain']}, {facts['role']}"
    yield "prompt", facts["prompt"]
    teacher = facts["teacher"]
    made = {k: v for k, v in teacher.items() if k not in ("name", "candidates")}
    yield "teacher", f"{teacher['name'] or 'not chosen yet'}{_settings(made)}"
    yield "stages", ", ".join(f"{name} {state}" for name, state in facts["stages"].items())
    if facts["error"]:
        yield "error", facts["error"]
    if edits := facts["edits"]:
        reasons = "".join(f", {count} {reason}" for reason, count in edits["reasons"].items())
        yield "edits", f"{edits['good']} of {edits['images']} are good{reasons}"
    if any(facts["attempts"].values()):
        yield "attempts", f"{facts['attempts']['edits']} further edits, {facts['attempts']['adapter']} trainings begun"
    if published := facts["published"]:
        served = "served" if published["served"] else "not served"
        older = "" if published["current"] or not published["served"] else ", not what the configuration makes now"
        forced = f", forced: {published['forced']}" if published["forced"] else ""
        who = f"{published['action']} {published['published_at']} by {published['published_by']}"
        yield "version", f"{published['version']}, {served}{older}; {who}{forced}"
    if adapter := facts["adapter"]:
        size = f"{decimal(adapter['served_bytes'])} served, {decimal(adapter['bytes'])} in all"
        yield "adapter", f"{adapter['digest']}, {size}, {adapter['wall_seconds']:.0f} s of training"
    for name, value in flattened(facts["metrics"] or {}).items():
        yield "", f"{name} {value}"
    for name, path in facts["lineage"].items():
        if name != "adapter":
            yield "from" if name == "quality" else "", path or f"{name}, which is not there"
    for name, address in facts["pictures"].items():
        yield name, str(address)
    for path in facts.get("written", {}).values():
        yield "written", path


def flattened(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The numbers of an adapter's metrics by name, with their intervals where they have any."""
    intervals = metrics.get("interval", {})
    found = {}
    for name, value in metrics.items():
        inner = value if isinstance(value, dict) and name != "interval" else {name: value}
        for key, number in inner.items():
            if isinstance(number, int | float):
                low, high = intervals.get(key, (None, None))
                spread = "" if low is None else f" ({low:.3f} to {high:.3f})"
                label = key if inner is not value or name in ("frechet", "kid") else f"{key} ({name.split('_')[-1]})"
                shown = f"{number:.3f}" if abs(number) >= 0.01 or not number else f"{number:.2g}"
                found[label] = f"{shown}{spread}" if isinstance(number, float) else str(number)
    return found


def _edits(quality: Manifest | None) -> Facts | None:
    return None if quality is None else {k: quality.summary[k] for k in ("images", "good", "reasons", "rescued")}


def _attempts(store: Store, plan: Plan, concept_id: str) -> Facts:
    """Further attempts at edits, and how often the adapter's training was begun and given back."""
    quality, queue, key = (
        find(store, plan.quality(concept_id).path),
        Queue(store, "adapters"),
        plan.adapter_key(concept_id),
    )
    items = {item.key: item for item in (*queue.pending(), *queue.failed())}
    edits = quality.summary["attempts"] if quality else 0
    return {"edits": edits, "adapter": items[key].attempts if key in items else 0}


def _adapter(adapter: Manifest | None) -> Facts | None:
    if adapter is None:
        return None
    facts = adapter.model_dump(include={"path", "digest", "created_at", "wall_seconds", "device_seconds"})
    weights = ("adapter_config.json", "adapter_model.safetensors", "text.safetensors")
    sizes = {name: entry.size for name, entry in adapter.files.items()}
    return {**facts, "bytes": sum(sizes.values()), "served_bytes": sum(sizes.get(name, 0) for name in weights)}


def _lineage(store: Store, plan: Plan, concept_id: str, adapter: Manifest | None) -> dict[str, str | None]:
    """The folders it comes from, None for one that is not there; `farm lineage` has all of it."""
    specs = {
        "quality": plan.quality(concept_id),
        "edits": plan.edits(concept_id),
        "ranks": plan.ranks,
        "base": plan.base,
        "selection": plan.selection,
        "sources": plan.sources,
    }
    if plan.compared(concept_id):
        specs["comparison"] = plan.comparison(concept_id)
    there = {name: spec.path if store.exists(f"{spec.path}/{MANIFEST}") else None for name, spec in specs.items()}
    return {"adapter": adapter.path if adapter else None, **there}


def _address(store: Store, key: str) -> str | None:
    """A path, or for an hour an address that needs no credentials; None when it is gone."""
    try:
        address = store.presigned_url(key, PRESIGNED_SECONDS)
    except NotFoundError:
        return None
    return unquote(urlsplit(address).path) if address.startswith("file:") else address


def _settings(made: Mapping[str, Any]) -> str:
    shown = ", ".join(f"{key} {short(value)}" for key, value in made.items() if value is not None)
    return f": {shown}" if shown else ""
