"""The gate before publishing: adapters made bad on purpose, measured as every adapter is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_farm import copied, one_thread, plan_of
from torch import Tensor

from e2gan.features import UntrainedFeatures
from e2gan.lora import Adapter, crucial_layers, grow, new_adapter
from e2gan.lora_peft import load, save
from e2gan.model import Generator, build_generator
from farm.artifacts import open_artifact
from farm.config import AdaptersConfig
from farm.errors import UserError
from farm.gate import reasons
from farm.plan import Plan
from farm.publishing import publish_by_hand, unfit
from farm.registry import Registry
from farm.report import collect
from farm.stages.adapt import publish
from farm.stages.assess import Assessment, assess, latency_ms, measure
from farm.stages.ranks import read_ranks
from farm.status import farm_status
from farm.store import LocalStore, Store
from farm.weights import read_base

CONCEPT = "sepia"
PEFT = ("adapter_config.json", "adapter_model.safetensors")
RATIO, GAIN = "(adapters.max_l1_ratio)", "(adapters.gate.min_gain_over_base)"
VARIETY, CONTRAST = "(adapters.gate.min_variety)", "(adapters.gate.min_contrast)"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def store(root: Path) -> Store:
    return LocalStore(root)


@pytest.fixture(scope="module")
def plan(root: Path) -> Plan:
    return plan_of(root)


def files_of(store: Store, plan: Plan, concept: str = CONCEPT) -> dict[str, bytes]:
    artifact = open_artifact(store, plan.adapter(concept).path)
    return {name: artifact.read(name) for name in (*PEFT, "text.safetensors")}


def adapter_of(store: Store, plan: Plan) -> Adapter:
    return load(files_of(store, plan), base=plan.base.digest)


def assessed(store: Store, plan: Plan, adapter: Adapter | None = None, *, base: str | None = None) -> Assessment:
    """An adapter of the concept, its own where none is given; base: that its file names."""
    files = files_of(store, plan)
    text = safetensors.torch.load(files["text.safetensors"])["text"]
    if adapter is not None:
        files |= save(adapter, base=base or plan.base.digest)
    return assess(store, plan, CONCEPT, files, text)


def held(plan: Plan, found: Assessment, limits: AdaptersConfig | None = None) -> list[str]:
    """Why the gate does not let it pass, with the limits that are the default; also when read back from JSON."""
    limits = limits or AdaptersConfig()
    scores, checks = json.loads(json.dumps([found.scores, found.checks], allow_nan=False))
    told = reasons(limits, plan.base.digest, found.scores, found.checks)
    assert told == reasons(limits, plan.base.digest, scores, checks)
    return told


def changed(adapter: Adapter, **tensors: Tensor) -> Adapter:
    """The adapter with other tensors, their dots written `__`."""
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    assert named.keys() <= adapter.tensors.keys()
    return replace(adapter, tensors={**adapter.tensors, **named})


def idle(store: Store, plan: Plan) -> Adapter:
    """One that leaves the base as it is."""
    model, _ = read_base(store, plan.base.path)
    return new_adapter(build_generator(model, seed=0), read_ranks(store, plan), seed=0)


def only(told: list[str], *keys: str) -> bool:
    """Whether these are the keys of the reasons, in order."""
    assert len(told) == len(keys), told
    return all(reason.endswith(key) for reason, key in zip(told, keys, strict=True))


def test_a_good_adapter_passes(store: Store, plan: Plan) -> None:
    for concept in ("charcoal", "sepia"):  # one that the base has learned, one that it has not
        summary = open_artifact(store, plan.adapter(concept).path).manifest.summary
        assert reasons(AdaptersConfig(), plan.base.digest, summary["metrics"], summary["checks"]) == []
        assert summary["checks"]["in_base"] == (concept == "charcoal") and summary["checks"]["latency_ms"] > 0


def test_what_is_measured_is_what_is_committed(store: Store, plan: Plan) -> None:
    found, artifact = assessed(store, plan), open_artifact(store, plan.adapter(CONCEPT).path)
    scores = json.loads(json.dumps(found.scores))
    assert scores == artifact.manifest.summary["metrics"] == json.loads(artifact.read("metrics.json"))
    assert b"latency" not in artifact.read("metrics.json") + artifact.read("README.md")  # it is never the same twice
    assert artifact.manifest.summary["checks"].keys() == found.checks.keys()


def test_the_base_itself(store: Store, plan: Plan) -> None:
    """Nearer the teacher than the photo is, but by no merit of the adapter's."""
    found = assessed(store, plan, idle(store, plan))
    assert found.scores["l1"] == found.scores["l1_base"] < 0.9 * found.scores["l1_untouched"]
    assert only(held(plan, found), GAIN)
    dust = idle(store, plan)
    for name, tensor in dust.tensors.items():
        tensor += 1e-4 if name.endswith("lora_B") else 0
    assert only(held(plan, assessed(store, plan, dust)), GAIN)


def test_the_base_itself_is_enough_where_the_base_has_learned_the_concept(store: Store, plan: Plan) -> None:
    found = assessed(store, plan, idle(store, plan))
    assert not reasons(AdaptersConfig(), plan.base.digest, found.scores, {**found.checks, "in_base": True})
    worse = {**found.scores, "interval": {**found.scores["interval"], "gain": (-0.02, -0.01)}}
    assert only(reasons(AdaptersConfig(), plan.base.digest, worse, {**found.checks, "in_base": True}), GAIN)


BAD_PICTURES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[str, ...]]] = {
    "the photo left as it is": (lambda photos: photos, (RATIO, GAIN)),
    "the teacher's edit of one photo, for all": (lambda edits: edits[:1].expand_as(edits), (VARIETY,)),
    "every edit's own mean colour": (lambda edits: mean_colour(edits), (CONTRAST,)),
}
"""What is made of the photos or of the teacher's edits, and the keys it must be refused for, among others."""


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_pictures_that_no_small_adapter_makes(store: Store, plan: Plan, name: str) -> None:
    good = assessed(store, plan)
    photos, edits, _ = good.pictures
    make, keys = BAD_PICTURES[name]
    edited = make(photos if RATIO in keys else edits)
    scores = measure((photos, edits, edited), photos, UntrainedFeatures(), seed=0)
    told = reasons(AdaptersConfig(), plan.base.digest, scores, good.checks)
    assert set(keys) <= {f"({reason.rpartition('(')[2]}" for reason in told}
    perfect = measure((photos, edits, edits), photos, UntrainedFeatures(), seed=0)
    assert not reasons(AdaptersConfig(), plan.base.digest, perfect, good.checks)


def mean_colour(images: Tensor) -> Tensor:
    return images.float().mean(dim=(2, 3), keepdim=True).round().to(torch.uint8).expand_as(images)


def test_one_colour_and_so_one_picture_for_all_photos(store: Store, plan: Plan) -> None:
    good = adapter_of(store, plan)
    a, b = good.tensors["head.lora_A"], good.tensors["head.lora_B"]
    # What reaches the head is positive: this adds so much of it that every value ends at the top of its range.
    white = changed(good, head__lora_A=torch.full_like(a, 60.0), head__lora_B=torch.full_like(b, 60.0))
    found = assessed(store, plan, white)
    assert found.pictures[2].min() == 255
    assert found.scores["variety"] == found.scores["contrast"] == 0
    told = held(plan, found)
    assert only(told[-2:], VARIETY, CONTRAST) and RATIO in told[0]
    assert "its pictures differ from each other by 0.000, under 0.3 of the teacher's 0." in told[-2]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_weights_that_are_not_finite(store: Store, plan: Plan, value: float) -> None:
    """1e6 is none in float32: it becomes infinite in fp16, in which adapters are published."""
    good = adapter_of(store, plan)
    broken = good.tensors["head.lora_B"].clone()
    broken[0, 0] = value
    told = held(plan, assessed(store, plan, changed(good, head__lora_B=broken)))
    assert told == ["its weights hold values that are not finite: lower adapters.train.learning_rate"]


def test_the_ranks_of_another_search(store: Store, plan: Plan) -> None:
    good, (model, _) = adapter_of(store, plan), read_base(store, plan.base.path)
    wide = {layer: 2 * rank for layer, rank in good.ranks.items()}
    found = assessed(store, plan, grow(good, Generator(model), wide, seed=0))
    expected = [f"its rank at {layer} is {2 * rank}, the search's {rank}" for layer, rank in sorted(good.ranks.items())]
    assert held(plan, found) == expected and found.scores["l1"] == assessed(store, plan).scores["l1"]
    layer = next(iter(crucial_layers(Generator(model))))
    fewer = {name: rank for name, rank in good.ranks.items() if name != layer}
    kept = {name: tensor for name, tensor in good.tensors.items() if not name.startswith(f"{layer}.")}
    lacking = held(plan, assessed(store, plan, replace(good, ranks=fewer, tensors=kept)))
    assert f"its rank at {layer} is 0, the search's {good.ranks[layer]}" in lacking


def test_an_adapter_of_another_base(store: Store, plan: Plan) -> None:
    told = held(plan, assessed(store, plan, adapter_of(store, plan), base="0" * 32))
    assert told == [f"it is an adapter of base {'0' * 32}, not of base {plan.base.digest}"]


def test_a_slow_one(store: Store, plan: Plan) -> None:
    limits = AdaptersConfig.model_validate({"gate": {"max_latency_ms": 20}})
    found = assessed(store, plan)
    for latency, told in ((19.0, []), (20.5, ["one edit took 20.5 ms, over 20 (adapters.gate.max_latency_ms)"])):
        assert reasons(limits, plan.base.digest, found.scores, {**found.checks, "latency_ms": latency}) == told


def test_latency_is_the_median_of_edits_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now, durations = [0.0], iter([9.0, 0.3, 0.1, 0.2, 5.0, 0.25])

    def edit(*_: Any) -> None:
        now[0] += next(durations)

    monkeypatch.setattr("farm.stages.assess.edit_images", edit)
    monkeypatch.setattr("farm.stages.assess.time.perf_counter", lambda: now[0])
    nothing: Any = None
    assert latency_ms(nothing, nothing, nothing) == pytest.approx(250)


SHARES = st.floats(0.05, 1.5)


@settings(deadline=None)
@given(l1=SHARES, base=SHARES, distance=SHARES, variety=SHARES, contrast=SHARES, margin=st.floats(0, 0.5))
def test_the_limits_one_by_one(
    l1: float, base: float, distance: float, variety: float, contrast: float, margin: float
) -> None:
    """Every measure as a share of what it is held against."""
    gate = {"min_gain_over_base": margin, "max_distance_ratio": 0.8, "min_variety": 0.6, "min_contrast": 0.4}
    limits = AdaptersConfig.model_validate({"max_l1_ratio": 0.9, "gate": gate})
    gain = (1 - l1 / base) * base
    scores = {
        **{"l1": l1, "l1_untouched": 1.0, "l1_base": base, "gain": gain, "interval": {"gain": (gain, gain)}},
        **{"frechet": {"fd_untrained": 3 * distance}, "frechet_untouched": {"fd_untrained": 3.0}},
        **{"variety": variety / 4, "variety_teacher": 0.25, "contrast": contrast / 2, "contrast_teacher": 0.5},
    }
    checks = {"finite": True, "base": "b", "other_ranks": {}, "in_base": False, "latency_ms": 1e9}
    expected = [
        *(["(adapters.max_l1_ratio)"] if l1 > 0.9 else []),
        *([GAIN] if gain < margin * base else []),
        *(["(adapters.gate.max_distance_ratio)"] if 3 * distance > 0.8 * 3.0 else []),
        *([VARIETY] if variety / 4 < 0.6 * 0.25 else []),
        *([CONTRAST] if contrast / 2 < 0.4 * 0.5 else []),
    ]
    assert only(reasons(limits, "b", scores, checks), *expected)
    off = AdaptersConfig.model_validate({"max_l1_ratio": 0.9, "gate": {**gate, "enabled": False}})
    assert reasons(off, "b", scores, checks) == reasons(limits, "b", scores, checks)[: l1 > 0.9]


def test_in_quarantine_with_reason_and_picture_until_the_limit_is_laxer_or_it_is_forced(
    root: Path, tmp_path: Path
) -> None:
    store = copied(root, tmp_path / "farm", "sources", "selections", "edits", "quality", "bases", "ranks", "adapters")
    strict, lax = (plan_of(root, adapters__gate={"min_variety": share}) for share in (1.0, 0.2))
    spec = strict.adapter("charcoal")
    before = contents_of(store, spec.path)
    assert publish(store, strict, "charcoal") is None and not Registry(store).list()
    reason = unfit(strict, open_artifact(store, spec.path).manifest)
    assert reason is not None and reason.endswith(VARIETY)
    card = card_of(store, strict, "charcoal")
    assert (card.state, card.reason) == ("quarantined", reason) and card.picture is not None
    [row] = [row for row in farm_status(store, strict)["concepts"] if row["id"] == "charcoal"]
    assert (row["stages"]["published"], row["error"], row["published"]) == ("quarantined", reason, None)
    with pytest.raises(UserError, match=r"adapters\.gate\.min_variety\); --force publishes it all the same\.$"):
        publish_by_hand(store, strict, "charcoal")
    entry = publish_by_hand(store, strict, "charcoal", force=True)
    assert entry.forced == reason and card_of(store, strict, "charcoal").forced == reason
    Registry(store).unpublish("charcoal")
    withdrawn = card_of(store, lax, "charcoal")
    assert (withdrawn.state, withdrawn.reason) == ("not published", "taken out of service by hand")
    passed = publish(store, lax, "charcoal")
    assert passed is not None and passed.forced is None
    assert card_of(store, lax, "charcoal").state == "published"
    assert contents_of(store, spec.path) == before


def contents_of(store: Store, folder: str) -> Mapping[str, bytes]:
    return {key: store.get(key) for key in store.list(f"{folder}/")}


def card_of(store: Store, plan: Plan, concept: str) -> Any:
    cards = collect(store, plan, failures={}, stage_seconds={})["cards"]
    return next(card for card in cards if card.concept.id == concept)
