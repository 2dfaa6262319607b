"""What a change of the configuration makes anew, and what it leaves where it is."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_farm import CONCEPTS, DOCUMENT, plan_of

from farm.errors import UserError
from farm.plan import VERSIONS, Plan

EDITS = {f"edits/{c}" for c in CONCEPTS}
QUALITY = {f"quality/{c}" for c in CONCEPTS}
ADAPTERS = {f"adapter/{c}" for c in CONCEPTS}
ALL = {"sources", "selection", "base", "ranks"} | EDITS | QUALITY | ADAPTERS

CHANGES: dict[str, tuple[Any, set[str]]] = {
    "seed": (1, ALL),
    "sources__crops_per_photo": (7, ALL),
    "sources__split": ({"train": 0.4, "validation": 0.3, "test": 0.3}, ALL),
    "selection__clusters": (8, ALL - {"sources"}),
    "selection__method": ("random", ALL - {"sources"}),
    "catalogue__3__prompt": ("an old photograph", {"edits/sepia", "quality/sepia", "adapter/sepia"}),
    "catalogue__3__captions": (("a photo", "a sepia photo"), {"edits/sepia", "quality/sepia", "adapter/sepia"}),
    "catalogue__3__name": ("Sepia", set()),
    "catalogue__3__domain": ("scenery", set()),
    "catalogue__3__editor__style": ("fog", {"edits/sepia", "quality/sepia", "adapter/sepia"}),
    "catalogue__2__prompt": ("at night", {"edits/night", "quality/night", "ranks"} | ADAPTERS),
    "catalogue__0__prompt": ("in charcoal", {"edits/charcoal", "quality/charcoal", "base", "ranks"} | ADAPTERS),
    "quality__min_good": (0.25, {"base", "ranks"} | QUALITY | ADAPTERS),
    "quality__retries": (1, {"base", "ranks"} | QUALITY | ADAPTERS),
    "text__path": ("elsewhere", {"base", "ranks"} | ADAPTERS),
    "model__channels": (16, {"base", "ranks"} | ADAPTERS),
    "base__concepts": (["cyanotype", "charcoal"], {"base", "ranks"} | ADAPTERS),
    "base__train__epochs": (2, {"base", "ranks"} | ADAPTERS),
    "base__train__adversarial_start": (0.25, {"base", "ranks"} | ADAPTERS),
    "ranks__train__epochs": (2, {"ranks"} | ADAPTERS),
    "ranks__tolerance": (0.5, {"ranks"} | ADAPTERS),
    "ranks__patience": (2, {"ranks"} | ADAPTERS),
    "adapters__lora__scale": (2.0, {"ranks"} | ADAPTERS),
    "evaluation__inception": ("weights.pt", {"ranks"} | ADAPTERS),
    "adapters__train__epochs": (4, ADAPTERS),
    "name": ("other", set()),
    "store": ("elsewhere", set()),
    "base__train__checkpoint_every": (7, set()),
    "ranks__train__checkpoint_every": (7, set()),
    "adapters__train__checkpoint_every": (7, set()),
    "adapters__max_l1_ratio": (0.5, set()),
    "adapters__gate__enabled": (True, set()),
    "adapters__gate__min_variety": (0.9, set()),
    "adapters__max_attempts": (5, set()),
    "adapters__lease_seconds": (5, set()),
    "cluster__cpus": (1, set()),
    "cluster__adapters__cpus": (2, set()),
    "serve__port": (9000, set()),
}
"""By key: another value, and what it makes anew."""


def digests(plan: Plan) -> dict[str, str]:
    single = {name: getattr(plan, name).digest for name in ("sources", "selection", "base", "ranks")}
    stages = ("edits", "quality", "adapter")
    return single | {f"{s}/{c.id}": getattr(plan, s)(c.id).digest for c in plan.config.catalogue for s in stages}


def made_anew(**changes: Any) -> set[str]:
    before, after = digests(plan_of(Path("unused"))), digests(plan_of(Path("unused"), **changes))
    return {name for name in before if before[name] != after[name]}


def test_everything_has_its_address_before_anything_is_made(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "store")
    found = digests(plan)
    assert found.keys() == ALL
    assert len(set(found.values())) == len(ALL)
    assert plan.adapter("sepia").path == f"adapters/sepia/{found['adapter/sepia']}"
    assert plan.edits("sepia").path == f"edits/sepia/{found['edits/sepia']}"
    assert plan.sources.path == f"sources/bundled/{found['sources']}"
    assert plan.adapter_key("sepia") == f"sepia-{found['adapter/sepia']}"
    assert plan.adapter("sepia").inputs == {
        "base": found["base"],
        "ranks": found["ranks"],
        "quality/sepia": found["quality/sepia"],
    }
    assert not (tmp_path / "store").exists()
    assert digests(plan_of(tmp_path / "store")) == found


@pytest.mark.parametrize("key", CHANGES)
def test_one_change(key: str) -> None:
    value, expected = CHANGES[key]
    assert made_anew(**{key: value}) == expected


@settings(max_examples=30, deadline=None)
@given(keys=st.sets(st.sampled_from(sorted(CHANGES)), min_size=2, max_size=6))
def test_several_changes_make_anew_what_each_of_them_does(keys: set[str]) -> None:
    expected = set().union(*(CHANGES[key][1] for key in keys))
    assert made_anew(**{key: CHANGES[key][0] for key in keys}) == expected


def test_another_concept_in_the_catalogue_changes_nothing_that_is_there() -> None:
    winter = {"id": "winter", "prompt": "snow", "editor": {"kind": "procedural"}}
    catalogue = [winter, *reversed(DOCUMENT["catalogue"])]
    assert made_anew(catalogue=catalogue) == set()


def test_the_order_of_the_searched_concepts_does_not_matter() -> None:
    one, two = (plan_of(Path("unused"), ranks__concepts=order) for order in (["night", "sepia"], ["sepia", "night"]))
    assert one.ranks.digest == two.ranks.digest


@pytest.mark.parametrize("stage", sorted(VERSIONS.keys() - {"comparison", "representatives"}))
def test_a_stages_version_makes_it_and_what_follows_anew(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    follows = {
        "sources": ALL,
        "selection": ALL - {"sources"},
        "edits": ALL - {"sources", "selection"},
        "quality": {"base", "ranks"} | QUALITY | ADAPTERS,
        "base": {"base", "ranks"} | ADAPTERS,
        "ranks": {"ranks"} | ADAPTERS,
        "adapter": ADAPTERS,
    }
    before = digests(plan_of(Path("unused")))
    monkeypatch.setitem(VERSIONS, stage, VERSIONS[stage] + 1)
    after = digests(plan_of(Path("unused")))
    assert {name for name in before if before[name] != after[name]} == follows[stage]


def test_photographs_count_by_name_and_content_not_by_place(tmp_path: Path) -> None:
    for seed in range(4):
        (tmp_path / "one").mkdir(exist_ok=True)
        noise = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        PIL.Image.fromarray(noise).save(tmp_path / f"one/{seed}.png")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    folder = {"sources__kind": "folder", "sources__path": str(tmp_path / "one")}
    one, two = plan_of(tmp_path, **folder), plan_of(tmp_path, **{**folder, "sources__path": str(tmp_path / "two")})
    assert digests(one) == digests(two)
    (tmp_path / "two/0.png").unlink()
    fewer = digests(plan_of(tmp_path, **{**folder, "sources__path": str(tmp_path / "two")}))
    assert {name for name in fewer if fewer[name] != digests(one)[name]} == ALL


TEACHERS = {"one": {"kind": "procedural", "style": "fog"}, "two": {"kind": "procedural", "style": "night"}}


def compared(prompt: str = "in the style sepia", **changes: Any) -> Plan:
    """A farm where sepia has two teachers, and the others one each of their own."""
    catalogue = [*DOCUMENT["catalogue"][:3], {"id": "sepia", "prompt": prompt}]
    return plan_of(Path("unused"), **{"catalogue": catalogue, "teachers": TEACHERS, **changes})


@pytest.mark.parametrize(
    "change",
    [
        {"comparison": {"probes": 4}},
        {"teachers": {**TEACHERS, "two": {"kind": "procedural", "style": "winter"}}},
        {"quality": {"min_good": 0.25}},  # it decides which teacher is acceptable
        {"prompt": "an old photograph"},
    ],
)
def test_a_concept_with_several_teachers_depends_on_their_comparison(change: dict[str, Any]) -> None:
    plan, changed, alone = compared(), compared(**change), plan_of(Path("unused"))
    assert [c for c in CONCEPTS if plan.compared(c)] == ["sepia"]
    assert plan.edits("sepia").inputs["comparison"] == plan.comparison("sepia").digest
    assert plan.edits("night").digest == changed.edits("night").digest == alone.edits("night").digest
    assert changed.comparison("sepia").digest != plan.comparison("sepia").digest
    assert changed.edits("sepia").digest != plan.edits("sepia").digest


def test_a_base_of_representatives_depends_on_all_it_may_choose_from() -> None:
    def chosen(**changes: Any) -> Plan:
        return plan_of(Path("unused"), base={"representatives": 2}, **changes)

    plan = chosen()
    eligible = ["charcoal", "cyanotype", "sepia"]  # night is searched
    assert plan.representatives.inputs == {f"quality/{c}": plan.quality(c).digest for c in eligible}
    assert plan.base.inputs == {"representatives": plan.representatives.digest}
    assert chosen(catalogue__3__prompt="an old photograph").base.digest != plan.base.digest
    assert chosen(catalogue__2__prompt="dark").base.digest == plan.base.digest
    assert chosen(base__representatives=1).base.digest != plan.base.digest


def test_what_concepts_share_is_worked_out_once() -> None:
    """A farm of 280 concepts would otherwise hash its base 280 times, and with it all the base depends on."""
    plan = plan_of(Path("unused"))
    for name in ("sources", "selection", "base", "ranks"):
        assert getattr(plan, name) is getattr(plan, name)


def test_plans_travel_to_workers() -> None:
    plan = plan_of(Path("unused"))
    there = pickle.loads(pickle.dumps(plan))
    assert digests(there) == digests(plan)
    assert there.seed("adapter", "sepia") == plan.seed("adapter", "sepia")


def test_seeds_are_stable_and_apart() -> None:
    plan = plan_of(Path("unused"))
    assert plan.seed("base") == 230448479
    assert plan.seed("adapter", "sepia") == 2325104674
    assert plan_of(Path("unused"), seed=7).seed("ranks", "night/0") == 4261227444
    plans = [plan_of(Path("unused"), seed=seed) for seed in range(3)]
    seeds = [p.seed(stage, c) for p in plans for stage in ("ranks", "adapter") for c in CONCEPTS]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_the_scores_name_is_that_of_its_features() -> None:
    assert plan_of(Path("unused")).score_name == "fd_untrained"
    assert plan_of(Path("unused"), evaluation__inception="weights.pt").score_name == "clean_fid"


def test_a_missing_teacher_or_photographs_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sepia: editor\.style: there is no procedural style 'sepja'; did you mean"):
        plan_of(tmp_path, catalogue__3__editor__style="sepja")
    onnx = {"kind": "onnx", "path": str(tmp_path / "none.onnx")}
    with pytest.raises(UserError, match=r"sepia: editor\.path: there is no file .*none\.onnx"):
        plan_of(tmp_path, catalogue__3__editor=onnx)
    with pytest.raises(UserError, match=r"^sources\.path: there is no folder .*/none"):
        plan_of(tmp_path, sources__kind="folder", sources__path=str(tmp_path / "none"))
