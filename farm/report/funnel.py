"""How much entered every stage and how much left it, and what became of the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from farm.artifacts import Manifest
from farm.plan import Plan
from farm.report.cards import Card
from farm.report.pictures import Facts
from farm.report.teachers import Made


def funnel_of(
    plan: Plan,
    made: Mapping[str, Manifest | None],
    taught: Sequence[Made],
    cards: Sequence[Card],
    quarantine: Mapping[str, str | None],
) -> list[Facts]:
    """A row a stage, of those that something has entered. of: what is counted. rest: what did not leave it, and why."""
    rows: list[Facts] = []

    def row(stage: str, of: str, entered: int, left: int, **rest: int) -> None:
        if entered:
            told = {why.replace("_", " "): count for why, count in rest.items() if count}
            if more := entered - left - sum(told.values()):
                told["not yet"] = more
            rows.append({"stage": stage, "of": of, "entered": entered, "left": left, "rest": told})

    if sources := made["sources"]:
        used, skipped = sources.summary["photos"], len(sources.summary["skipped"])
        row("sources", "photos", used + skipped, used, skipped=skipped)
    if selection := made["selection"]:
        found, chosen = selection.summary["training_images"], selection.summary["train"]
        row("selection", "training images", found, chosen, not_chosen=found - chosen)
    ids = [concept.id for concept in plan.config.catalogue]
    compared = [found[0] for c, found in zip(ids, taught, strict=True) if plan.compared(c)]
    unfit = sum(m is not None and m.summary["teacher"] is None for m in compared)
    fit = sum(m is not None for m in compared) - unfit
    row("comparison", "concepts", len(compared), fit, no_teacher_fits=unfit)
    states = Counter(card.state for card in cards)
    edited = [found[1] for found in taught if found[1]]
    failed = sum(card.state == "failed" and card.teacher is None for card in cards)
    row("edits", "concepts", len(ids) - unfit, len(edited), failed=failed)
    checked = [found[2].summary for found in taught if found[2]]
    reasons = sum((Counter(summary["reasons"]) for summary in checked), Counter[str]())
    images, good = (sum(summary[key] for summary in checked) for key in ("images", "good"))
    if images:
        first = dict(reasons.most_common(4))  # an edit may have several reasons
        rows.append({"stage": "quality", "of": "edits", "entered": images, "left": good, "rest": first})
    bad = sum(quarantine[c] is not None for c in ids)
    row("quality", "concepts", len(edited), len(checked) - bad + unfit, quarantined=bad - unfit)
    adapters = [card for card in cards if card.ratio is not None or card.scores]
    failed = sum(card.state == "failed" and card.teacher is not None and not card.scores for card in cards)
    row("adapter", "concepts", len(ids) - bad, len(adapters), failed=failed, made_by_the_base=states["in the base"])
    held = sum(card.state == "quarantined" and quarantine[card.concept.id] is None for card in adapters)
    row("gate", "adapters", len(adapters), len(adapters) - held, quarantined=held)
    published = sum(card.state == "published" for card in adapters)
    row("registry", "adapters", len(adapters) - held, published, not_published=len(adapters) - held - published)
    return rows
