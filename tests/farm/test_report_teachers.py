"""The report's part on teachers, of a farm where some are compared and one cannot do its concept."""

from __future__ import annotations

from pathlib import Path

import pytest
from page import Page
from stage_farm import DOCUMENT, built, copied, plan_of
from tiny_onnx import unchanged

from farm.plan import Plan
from farm.report import build_report, collect
from farm.report.teachers import LEFT_OUT
from farm.stages.teach import teach
from farm.stages.units import Worker
from farm.standing import quarantined
from farm.store import LocalStore


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> tuple[LocalStore, Plan]:
    """Charcoal and cyanotype have good teachers, night has two to choose from, and sepia's changes nothing."""
    root: Path = tmp_path_factory.mktemp("taught")
    store = copied(built(tmp_path_factory.getbasetemp()), root / "farm", "sources", "selections")
    catalogue = [
        *DOCUMENT["catalogue"][:2],
        {"id": "night", "prompt": "at night"},
        {"id": "sepia", "prompt": "an old photograph", "teachers": ["nothing"]},
    ]
    teachers = {"nothing": unchanged(root / "unchanged.onnx"), "dark": {"kind": "procedural", "style": "night"}}
    plan = plan_of(store.root, catalogue=catalogue, teachers=teachers, comparison={"probes": 3})
    worker = Worker(store, plan)
    for concept in plan.config.catalogue:
        teach(store, plan, concept.id, worker)
    return store, plan


def test_numbers(farm: tuple[LocalStore, Plan]) -> None:
    store, plan = farm
    facts = collect(store, plan, failures={}, stage_seconds={})["teachers"]
    rows = {row["id"]: row for row in facts["rows"]}
    assert {name: row["teacher"] for name, row in rows.items()} == {
        "charcoal": "procedural",
        "cyanotype": "procedural",
        "night": "dark",
        "sepia": "nothing",
    }
    # 27 photos are selected; night's two teachers edited three of them before.
    assert [row["generated"] for row in rows.values()] == [27, 27, 27 + 2 * 3, 27]
    assert facts["images"] == pytest.approx((4 * 27 + 6) / 4) and facts["paper"] == 1000
    assert [row["good"] for row in rows.values()] == [27, 27, 27, 0]
    assert facts["good"] == 3 * 27 and facts["edits"] == 4 * 27
    assert rows["sepia"]["reasons"]["no-op"] == 27
    assert rows["sepia"]["quarantined"] == quarantined(store, plan, "sepia")
    (compared,) = facts["comparisons"]
    assert compared["teacher"] == "dark" and [name for name, _ in compared["scores"]] == ["dark", "nothing"]
    assert compared["parts"] == ["good", "structure", "strength", "consistency"]  # without CLIP
    assert len(facts["left_out"]) == LEFT_OUT and {edit["concept"] for edit in facts["left_out"]} == {"sepia"}


def test_the_page(farm: tuple[LocalStore, Plan]) -> None:
    store, plan = farm
    failures = {"sepia": f"quarantined: {quarantined(store, plan, 'sepia')}"}
    page = Page(build_report(store, plan, failures=failures, stage_seconds={}))
    text = " ".join(page.text.split())
    assert "Every concept's teacher made 28 images on average, where the paper's makes 1,000" in text
    assert "81 of 108 edits are good and learned from; left out for no-op (27)" in text
    assert "No CLIP weights are given" in text
    assert "quarantined only 0 of 27 edits are good" in text
    pictures = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert "night: rows photo, nothing, dark" in pictures
    assert sum(alt is not None and alt.endswith("photo and edit for sepia") for alt in pictures) == LEFT_OUT


def test_nothing_edited_yet(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "farm")
    facts = collect(LocalStore(tmp_path / "farm"), plan, failures={}, stage_seconds={})["teachers"]
    assert facts["images"] is None and not facts["comparisons"] and not facts["left_out"]
    Page(build_report(LocalStore(tmp_path / "farm"), plan, failures={}, stage_seconds={}))
