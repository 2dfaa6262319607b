"""The report of small farms whose artifacts are written by hand, as the stages would write them."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from page import Page
from sound_adapters import put_adapter as put_any_adapter

from farm.artifacts import Spec, commit
from farm.config import FarmConfig
from farm.plan import Plan, make_plan
from farm.queue import Queue, owner_name
from farm.registry import Registry
from farm.report import build_report, collect
from farm.report.cards import parameter_count
from farm.report.charts import curve_of
from farm.reporting import how_it_stands, latest_report, put_report, rebuild
from farm.stages.pretrain import PREVIEW_CONCEPTS
from farm.store import LocalStore, Store

SCORES = {"sepia": (0.10, 0.40), "charcoal": (0.30, 0.60), "neon": (0.39, 0.40), "winter": (0.05, 0.25)}
"""L1 and untouched L1; neon is not good enough to publish."""

SCRIPT = '<script src="https://evil.example/x.js">alert("1") & \'2\'</script>'


@pytest.fixture(scope="module")
def plan() -> Plan:
    prompts = {"sepia": "an old photograph", "charcoal": "a drawing", "neon": SCRIPT, "winter": "snow", "fog": "fog"}
    document = {
        "name": "small-farm",
        "store": "unused",
        "sources": {"size": 64, "crops_per_photo": 4},
        "selection": {"clusters": 3},
        "catalogue": [{"id": i, "prompt": p, "editor": {"kind": "procedural"}} for i, p in prompts.items()],
        "base": {"concepts": ["sepia"]},
        "ranks": {"concepts": ["charcoal"]},
    }
    return make_plan(FarmConfig.model_validate(document))


def sheet(rows: int, columns: int = 3, side: int = 40, seed: int = 0) -> bytes:
    """What `picture_sheet` writes: lossless, 2 px apart."""
    size = (rows * (side + 2) - 2, columns * (side + 2) - 2, 3)
    noise = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(noise).save(buffer, format="WEBP", lossless=True)
    return buffer.getvalue()


def weights(*shapes: tuple[int, ...]) -> bytes:
    """A safetensors file of zeros in fp16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for number, shape in enumerate(shapes):
        start, end = end, end + 2 * int(np.prod(shape))
        header[f"t{number}"] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)


def scores(concept: str) -> dict[str, Any]:
    l1, untouched = SCORES[concept]
    named, other = {"fd_untrained": 1.25}, {"fd_untrained": 2.5}
    paired = {"n": 4, "l1": l1, "l1_untouched": untouched, "psnr": 21.5, "ssim": 0.8125, "frechet": named}
    base = {"l1_base": 2 * l1, "gain": l1, "interval": {"gain": [0.9 * l1, 1.1 * l1]}, "frechet_base": other}
    spread = dict.fromkeys(("variety", "variety_teacher", "contrast", "contrast_teacher"), 0.5)
    return {**paired, **base, **spread, "frechet_untouched": other}


def put(store: Store, spec: Spec, files: Mapping[str, bytes], **summary: Any) -> None:
    commit(store, spec, files, wall_seconds=7.0, device_seconds=5.0, summary=summary)


def put_adapter(store: Store, plan: Plan, concept: str, *, published: bool = True) -> None:
    files = {"adapter_model.safetensors": weights((4, 10), (10, 4)), "preview.webp": sheet(3)}
    losses = [{"step": step, "l1": 1 / step} for step in range(10, 110, 10)]
    checks = {"finite": True, "base": plan.base.digest, "other_ranks": {}, "in_base": False, "latency_ms": 4.5}
    put(store, plan.adapter(concept), files, metrics=scores(concept), checks=checks, losses=losses, pairs=12)
    if published:
        spec = plan.adapter(concept)
        Registry(store).publish(
            concept, adapter=spec.path, digest=spec.digest, base=plan.base.digest, metrics=scores(concept)
        )


def put_farm(store: Store, plan: Plan) -> None:
    """A farm where neon is not good enough, fog has no adapter, and the base concept has one of its own."""
    skipped = [{"name": "<b>broken</b>.jpg", "reason": "not an image"}]
    put(store, plan.sources, {"photos.json": b"{}"}, photos=7, skipped=skipped, images=28)
    counts = {"train": 3, "validation": 4, "test": 4, "training_images": 20}
    put(store, plan.selection, {"selection.json": b"{}"}, **counts)
    for concept in plan.config.catalogue:
        put(store, plan.edits(concept.id), {}, images=11, teacher="procedural", failed=0)
        checked = {"images": 11, "good": 11, "left_out": {}, "reasons": {}, "attempts": 0, "rescued": 0}
        put(store, plan.quality(concept.id), {}, **checked, quarantined=None)
    base = {"generator.safetensors": weights((100, 20), (345,)), "preview.webp": sheet(3)}
    put(store, plan.base, base, metrics={"sepia": scores("sepia")}, losses=[{"step": 5, "l1": 0.5}])
    rounds = [
        {"ranks": {"stem": 1, "up1": 1, "up2": 1}, "score": 3.5},
        {"ranks": {"stem": 1, "up1": 2, "up2": 2}, "score": 2.25},
        {"ranks": {"stem": 1, "up1": 4, "up2": 4}, "score": 2.375},
    ]
    ranks = {"ranks": rounds[1]["ranks"], "score": "fd_untrained", "concepts": {"charcoal": rounds}}
    put(store, plan.ranks, {"ranks.json": json.dumps(ranks).encode()}, ranks=ranks["ranks"])
    for name in SCORES:
        put_adapter(store, plan, name, published=name != "neon")


def report(store: Store, plan: Plan, **options: Any) -> bytes:
    return build_report(store, plan, **{"failures": {}, "stage_seconds": {}, **options})


def test_a_whole_farm(tmp_path: Path, plan: Plan) -> None:
    store = LocalStore(tmp_path)
    put_farm(store, plan)
    failures = {"fog": "the teacher <i>gave up</i>"}
    html = report(store, plan, failures=failures, stage_seconds={"edits": 12.0, "report": 3.25})
    page = Page(html)
    for concept in plan.config.catalogue:
        assert f"c-{concept.id}" in {card.get("id") for card in page.of("article")}
        assert concept.prompt in page.text
    for fact in ("2,345 parameters", "7 photos used", "1 skipped", "28 source images", "3 clusters", "hashing"):
        assert fact in page.text
    assert failures["fog"] in page.text and "<i>" not in html.decode()
    assert "fd_untrained" in page.text and not re.search(r"\bFID\b", page.text.replace("is not FID", ""))
    assert "1.25" in page.text and "0.250" in page.text and "12.0 s" in page.text and "3.2 s" in page.text
    assert len(page.of("img")) == len(SCORES) + 1
    assert all(image["loading"] == "lazy" and image["alt"] for image in page.of("img"))
    assert len(html) < 2_000_000
    assert report(store, plan, failures=failures, stage_seconds={"edits": 12.0, "report": 3.25}) == html


def test_nothing_is_loaded_and_prompts_are_text(tmp_path: Path, plan: Plan) -> None:
    store = LocalStore(tmp_path)
    put_farm(store, plan)
    html = report(store, plan)
    page = Page(html)
    assert {"href": "#c-neon"} in page.of("a")  # from the table of what wants attention to its picture
    assert SCRIPT in page.text and "<b>broken</b>.jpg" in page.text
    assert page.of("script") == [{}] and not page.of("link") and "<b>broken" not in html.decode()
    script = html.decode().partition("<script>")[2].partition("</script>")[0]
    (policy,) = (meta["content"] for meta in page.of("meta") if "http-equiv" in meta)
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    assert "fetch" not in script and "://" not in script
    for _, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("src", "href"):
                assert value is not None and value.startswith(("data:image/webp;base64,", "#"))
            elif name != "data-words":  # what can be looked for, prompts as they are
                assert "://" not in (value or "")
    style = html.decode().partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style


def test_numbers_and_order(tmp_path: Path, plan: Plan) -> None:
    store = LocalStore(tmp_path)
    put_farm(store, plan)
    facts = collect(store, plan, failures={"fog": "no"}, stage_seconds={"ranks": 2.0})
    cards = {card.concept.id: card for card in facts["cards"]}
    assert list(cards) == ["winter", "sepia", "charcoal", "neon", "fog"]
    assert [cards[name].ratio for name in SCORES] == pytest.approx([0.25, 0.5, 0.975, 0.2])
    assert [cards[name].role for name in ("sepia", "charcoal", "neon")] == ["base", "rank search", "adapter"]
    assert cards["fog"].ratio is None and cards["fog"].version is None and cards["sepia"].version == 1
    summary = facts["summary"]
    assert summary["ratio"] == pytest.approx((0.25 + 0.5 + 0.975 + 0.2) / 4)
    assert summary["unseen"] == pytest.approx((0.975 + 0.2) / 2)
    assert summary["states"] == {"published": 3, "quarantined": 1, "failed": 1}
    assert summary["parameters"] == [80]
    assert summary["largest"] == summary["size"] == len(weights((4, 10), (10, 4)))
    [(_, state, why, _)] = [row for row in facts["trouble"] if row[0] == "neon"]
    told = "L1 to the teacher 0.390 is over 0.95 of the untouched photo's 0.400 (adapters.max_l1_ratio)"
    assert (state, why) == ("quarantined", told)
    assert facts["ranks"]["searches"] == [("charcoal", [3.5, 2.25, 2.375], 1)]
    assert facts["ranks"]["layers"] == [(["stem"], (1, 1, 1), 1), (["up1", "up2"], (1, 2, 4), 2)]
    costs = {cost["stage"]: cost for cost in facts["costs"]}
    assert costs["ranks"] == {"stage": "ranks", "artifacts": 1, "run": 2.0, "longest": 7.0, "device": 5.0}
    assert costs["adapter"]["device"] == 20 and costs["edits"]["artifacts"] == 5


def test_an_empty_farm_and_every_stage_of_a_partial_one(tmp_path: Path, plan: Plan) -> None:
    page = Page(report(LocalStore(tmp_path / "empty"), plan, failures={"base": "out of memory"}))
    assert "—" in page.text and "out of memory" in page.text and not page.of("img")
    whole = LocalStore(tmp_path / "whole")
    put_farm(whole, plan)
    single = (plan.sources, plan.selection, plan.base, plan.ranks)
    for spec in (*single, plan.edits("neon"), plan.adapter("winter")):
        key = f"{spec.path}/manifest.json"
        manifest = whole.get(key)
        whole.delete(key)
        page = Page(report(whole, plan))
        assert all(concept.prompt in page.text for concept in plan.config.catalogue)
        whole.put_if_absent(key, manifest)


def test_the_base_concept_needs_no_adapter(tmp_path: Path, plan: Plan) -> None:
    facts = collect(LocalStore(tmp_path), plan, failures={}, stage_seconds={})
    states = {card.concept.id: card.state for card in facts["cards"]}
    assert states == {"sepia": "in the base", **dict.fromkeys(("charcoal", "neon", "winter", "fog"), "not made")}
    assert [name for name, *_ in facts["trouble"]] == ["charcoal", "fog", "neon", "winter"]


def test_damage_is_told_and_the_rest_shown(tmp_path: Path, plan: Plan) -> None:
    store = LocalStore(tmp_path)
    put_farm(store, plan)
    store.put(f"{plan.adapter('winter').path}/preview.webp", b"no picture")
    store.put(f"{plan.base.path}/manifest.json", b"{")
    store.put(f"{plan.ranks.path}/ranks.json", b"{}")
    page = Page(report(store, plan))
    facts = collect(store, plan, failures={}, stage_seconds={})
    troubles = {name: (state, why) for name, state, why, _ in facts["trouble"]}
    assert {"winter", "base", "ranks"} <= troubles.keys()
    assert all(troubles[name][0] == "failed" for name in ("winter", "base", "ranks"))
    assert "preview.webp is not the file that was put there" in page.text
    assert facts["summary"]["ratios"] == 3


def test_another_adapter_in_the_registry_is_not_this_one(tmp_path: Path, plan: Plan) -> None:
    store = LocalStore(tmp_path)
    put_adapter(store, plan, "winter", published=False)
    Registry(store).publish("winter", **put_any_adapter(store, "winter", "old"))
    facts = collect(store, plan, failures={}, stage_seconds={})
    card = facts["cards"][0]
    assert (card.concept.id, card.state, card.version) == ("winter", "not published", 1)
    assert card.reason == "good enough, but not in the registry; version 1 in the registry is another adapter"


def test_curves_and_parameter_counts() -> None:
    assert curve_of([]) is None
    curve = curve_of([{"step": step, "l1": 2.0 if step == 1 else 1.0} for step in range(1, 1001)])
    assert curve is not None and curve["points"].startswith("0,1.0 ") and curve["points"].endswith("100,12.0")
    assert len(curve["points"].split()) <= 40 and (curve["first"], curve["last"], curve["step"]) == (2.0, 1.0, 1000)
    flat = curve_of([{"step": 3, "l1": 0.0}])
    assert flat is not None and flat["points"] == "100,23.0"
    assert parameter_count(weights((2, 3), (4,), ())) == 11


def test_the_base_shows_as_many_concepts_as_its_sheet_has(tmp_path: Path, plan: Plan) -> None:
    """It has three rows of the first eight only; a base of the packaged catalogue learns 23."""
    store = LocalStore(tmp_path)
    learned = {f"concept-{n}": scores("sepia") for n in range(11)}
    files = {"generator.safetensors": weights((2, 3)), "preview.webp": sheet(3 * PREVIEW_CONCEPTS)}
    put(store, plan.base, files, metrics=learned, losses=[{"step": 5, "l1": 0.5}])
    base = collect(store, plan, failures={}, stage_seconds={})["base"]
    assert [name for name, _, _ in base["concepts"]] == [*learned][:PREVIEW_CONCEPTS]
    assert {(p.width, p.height) for *_, p in base["concepts"]} == {(3 * 42 - 2, 3 * 42 - 2)}
    assert [name for name, _ in base["others"]] == [*learned][PREVIEW_CONCEPTS:]
    assert "concept-10 (L1 0.100, untouched 0.400)" in Page(report(store, plan)).text


def test_the_page_keeps_within_its_bytes(tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    put_farm(store, plan)
    whole = report(store, plan)
    said = len(re.sub(rb"data:image/webp;base64,[^\"]*", b"", whole))
    monkeypatch.setattr("farm.report.PAGE_BYTES", said + 20_000)
    small = report(store, plan)
    assert len(small) <= said + 20_000 < len(whole)
    assert len(Page(small).of("img")) == len(Page(whole).of("img"))


def test_the_funnel_accounts_for_every_concept(tmp_path: Path, plan: Plan) -> None:
    store = LocalStore(tmp_path)
    put_farm(store, plan)
    rows = collect(store, plan, failures={"fog": "adapter: out of memory"}, stage_seconds={})["funnel"]
    found = [(row["stage"], row["of"], row["entered"], row["left"], row["rest"]) for row in rows]
    assert found == [
        ("sources", "photos", 8, 7, {"skipped": 1}),
        ("selection", "training images", 20, 3, {"not chosen": 17}),
        ("edits", "concepts", 5, 5, {}),
        ("quality", "edits", 55, 55, {}),
        ("quality", "concepts", 5, 5, {}),
        ("adapter", "concepts", 5, 4, {"failed": 1}),
        ("gate", "adapters", 4, 3, {"quarantined": 1}),
        ("registry", "adapters", 3, 3, {}),
    ]


def test_every_trouble_comes_with_its_command(tmp_path: Path, plan: Plan) -> None:
    store = LocalStore(tmp_path)
    put_farm(store, plan)
    Registry(store).unpublish("winter")
    queue = Queue(store, "adapters")
    queue.enqueue(plan.adapter_key("fog"), {"concept": "fog"})
    lease = queue.lease(owner_name(), 60)
    assert lease and queue.fail(lease, "Traceback\nDivergedError: no longer finite", 1)
    failures, _ = how_it_stands(store, plan)
    assert failures == {"fog": "adapter: DivergedError: no longer finite"}
    trouble = collect(store, plan, failures=failures | {"base": "lost"}, stage_seconds={})["trouble"]
    assert {name: remedy for name, *_, remedy in trouble} == {
        "base": "farm run --config FARM.yaml",
        "fog": "farm queue retry fog --config FARM.yaml",
        "neon": "farm publish --force neon --config FARM.yaml",
        "winter": "farm publish winter --config FARM.yaml",
    }


def test_a_report_built_anew_knows_how_the_last_run_ended(tmp_path: Path, plan: Plan) -> None:
    store = LocalStore(tmp_path)
    put_farm(store, plan)
    failures = {"fog": "edits: the teacher gave up", "sepia": "adapter: diverged, but it was made since"}
    key = put_report(store, plan, "20260101T000000Z-aaaaaa", failures=failures, seconds={"edits": 3.0})
    assert how_it_stands(store, plan) == ({"fog": "edits: the teacher gave up"}, {"edits": 3.0})
    assert rebuild(store, plan) == key == latest_report(store, plan)
    text = Page(store.get(key)).text
    assert "the teacher gave up" in text and "but it was made since" not in text
    store.delete("runs/20260101T000000Z-aaaaaa/plan.json")
    assert rebuild(store, plan) != key
