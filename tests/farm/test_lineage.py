"""What an artifact comes from, against the plan that made it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sound_adapters import put_adapter
from stage_farm import CONCEPTS, copied, edit_concept, plan_of, write_config
from terminal import Terminal

from farm.artifacts import Spec, commit, find
from farm.plan import Plan
from farm.registry import Registry
from farm.stages.ingest import ingest, split_ids
from farm.stages.select import select, selected_ids
from farm.store import LocalStore


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(monkeypatch, capsys, "lineage")


@pytest.fixture
def plan(root: Path) -> Plan:
    return plan_of(root)


def test_a_concept_goes_back_to_its_prompt_teacher_and_photos(
    terminal: Terminal, config: Path, root: Path, plan: Plan
) -> None:
    store = LocalStore(root)
    told = terminal.document("-c", config, "sepia")
    expected = {
        "sources": plan.sources,
        "selection": plan.selection,
        "base": plan.base,
        "ranks": plan.ranks,
        "adapter": plan.adapter("sepia"),
        **{f"edits {concept}": plan.edits(concept) for concept in CONCEPTS},
        **{f"quality {concept}": plan.quality(concept) for concept in CONCEPTS},
    }
    artifacts = told["artifacts"]
    assert artifacts.keys() == {spec.path for spec in expected.values()}
    folders = {spec.digest: spec.path for spec in expected.values()}
    for spec in expected.values():
        manifest = find(store, spec.path)
        assert manifest is not None
        facts = artifacts[spec.path]
        assert facts["inputs"] == {name: folders[digest] for name, digest in spec.inputs.items()}
        for name in ("stage", "version", "digest", "config", "seed", "packages", "created_at", "summary"):
            assert facts[name] == manifest.model_dump(mode="json")[name]
        assert list(artifacts).index(spec.path) > max([-1, *map(list(artifacts).index, facts["inputs"].values())])
    assert told["path"] == plan.adapter("sepia").path
    entry = Registry(store).get("sepia")
    assert entry is not None and told["release"] == entry.releases[-1].model_dump()
    edits = artifacts[plan.edits("sepia").path]
    assert edits["config"]["prompt"] == plan.config.concept("sepia").prompt
    assert edits["teacher"] == {"name": "procedural", "fingerprint": plan.teachers["sepia"]["procedural"]}
    assert artifacts[plan.selection.path]["source_ids"] == selected_ids(store, plan)
    photos = artifacts[plan.sources.path]["config"]["sources"]["photos"]
    assert [sha256 for _, sha256 in photos] == [sha256 for _, sha256 in plan.photos["photos"]]


def test_the_tree(terminal: Terminal, config: Path, root: Path, plan: Plan) -> None:
    lines = terminal.good("-c", config, "night").splitlines()
    text = "\n".join(lines)
    assert lines[0].startswith(plan.adapter("night").path)
    ids = split_ids(LocalStore(root), plan)["test"]
    for said in (
        "version 1, published",
        "seed: 0",
        "packages: e2gan-farm",
        "prompt: in the style night",
        "teacher procedural: kind procedural, style night, version 1",
        f"test: {len(ids)} images: {', '.join(ids[:3])}, …",
        "concepts: charcoal, cyanotype",
        "7 photographs, 42 images",
    ):
        assert text.count(said) == 1, said
    assert text.count(f"{plan.base.path}  ") == text.count(f"{plan.base.path} (above)") == 1
    for concept, times in (("charcoal", 1), ("night", 1), ("sepia", 0)):
        assert text.count(f"prompt: in the style {concept}") == times


def test_digests_may_be_cut_short(terminal: Terminal, config: Path, root: Path, plan: Plan) -> None:
    digest = plan.selection.digest
    for name in (digest, digest[:6], plan.selection.path):
        told = terminal.document("-c", config, name)
        assert told["path"] == plan.selection.path and told["release"] is None
        assert told["artifacts"].keys() == {plan.selection.path, plan.sources.path}
    assert terminal.mistake("-c", config, digest[:5]).endswith("give 6 digits of it or more.")
    absent = "0" * 12
    assert terminal.mistake("-c", config, absent).endswith(f"holds no artifact whose digest begins with {absent}.")
    assert terminal.mistake("-c", config, "sepya").endswith("nor a digest; did you mean sepia?")


def test_an_ambiguous_digest_names_the_candidates(terminal: Terminal, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    config = write_config(tmp_path / "farm.yaml", store.root)
    made = [
        commit(store, Spec(stage="x", version=1, folder=folder), {}, wall_seconds=0)
        for folder in ("edits/a", "edits/b")
    ]
    told = terminal.mistake("-c", config, made[0].digest[:8])
    assert told.endswith(f"give one of {made[0].path}, {made[1].path}.")
    assert terminal.document("-c", config, made[1].path)["path"] == made[1].path


def test_concepts_that_are_not_published(terminal: Terminal, tmp_path: Path) -> None:
    """The latest release of one that was unpublished; the newest adapter of one that never was published."""
    store = LocalStore(tmp_path / "store")
    config = write_config(tmp_path / "farm.yaml", store.root)
    entry = Registry(store).publish("night", **put_adapter(store, "night", "old"))
    put_adapter(store, "night", "other")
    Registry(store).unpublish("night")
    told = terminal.document("-c", config, "night")
    assert (told["path"], told["release"]["action"]) == (entry.adapter, "unpublished")
    fog = put_adapter(store, "fog", "only")
    told = terminal.document("-c", config, "fog")
    assert (told["path"], told["release"]) == (fog["adapter"], None)


def test_what_is_gone_or_damaged_is_said(terminal: Terminal, root: Path, plan: Plan, tmp_path: Path) -> None:
    store = copied(root, tmp_path / "store")
    config = write_config(tmp_path / "farm.yaml", store.root)
    store.delete(f"{plan.quality('charcoal').path}/manifest.json")
    store.put(f"{plan.edits('sepia').path}/manifest.json", b"{")
    artifacts = terminal.document("-c", config, "sepia")["artifacts"]
    assert artifacts[plan.base.path]["inputs"]["quality/charcoal"] is None
    assert "is damaged" in artifacts[plan.edits("sepia").path]["damaged"]
    text = terminal.good("-c", config, "sepia")
    assert f"quality/charcoal {plan.quality('charcoal').digest}, which is not in the store any more" in text
    assert "is damaged" in text
    store.delete(f"{plan.adapter('sepia').path}/manifest.json")
    assert "`farm verify` says what else is gone" in terminal.mistake("-c", config, "sepia")


def test_a_chosen_teacher_is_found_through_the_comparison(terminal: Terminal, tmp_path: Path) -> None:
    teachers: dict[str, Any] = {name: {"kind": "procedural", "style": name} for name in ("sepia", "night")}
    root = tmp_path / "store"
    catalogue = [{"id": c, "prompt": f"in the style {c}"} for c in ("charcoal", "cyanotype", "night", "sepia")]
    changes = {"teachers": teachers, "catalogue": catalogue}
    store, plan = LocalStore(root), plan_of(root, **changes)
    ingest(store, plan, lambda done, total: None)
    select(store, plan)
    manifest = edit_concept(store, plan, "night")
    name = manifest.summary["teacher"]
    assert name in teachers
    config = write_config(tmp_path / "farm.yaml", root, **changes)
    told = terminal.document("-c", config, plan.edits("night").path)
    facts = told["artifacts"][plan.edits("night").path]
    assert facts["teacher"] == {"name": name, "fingerprint": plan.teachers["night"][name]}
    assert f"teacher {name}: kind procedural, style {name}" in terminal.good(
        "-c", config, plan.edits("night").digest[:10]
    )
    store.delete(f"{plan.comparison('night').path}/manifest.json")
    assert (
        "teacher"
        not in terminal.document("-c", config, plan.edits("night").path)["artifacts"][plan.edits("night").path]
    )
