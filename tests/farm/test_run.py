"""A run: which stages it does, what it leaves behind, and what it says when it cannot go on. Ray is stood in for."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from mlflow import MlflowClient
from rich.console import Console
from stage_farm import CONCEPTS, Cluster, contents, copied, document_of, one_thread, plan_of

from farm.artifacts import find
from farm.config import FarmConfig
from farm.errors import UserError
from farm.events import events_of
from farm.progress import Screen
from farm.queue import Queue
from farm.registry import Registry
from farm.run import STAGES, Outcome, run
from farm.store import LocalStore, Store
from farm.todo import make_todo


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def said() -> Screen:
    return Screen(Console(record=True, file=io.StringIO(), width=500))


def config_of(root: Path, **changes: Any) -> FarmConfig:
    return FarmConfig.model_validate(document_of(root, **changes))


def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "ray" or name.startswith("ray.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("ray", "farm.cluster"):
        monkeypatch.setitem(sys.modules, name, None)


def without_reports(root: Path) -> dict[str, bytes]:
    """Nor what else a stage does not make: what a run read, and the mark of a store's layout."""
    kept = ("runs/", "glance/", "farm.json")
    return {key: data for key, data in contents(root).items() if not key.startswith(kept)}


def lines(screen: Screen) -> list[str]:
    return screen.console.export_text().splitlines()


def events(store: Store, outcome: Outcome) -> list[dict[str, Any]]:
    return [event.facts for event in events_of(store, outcome.run_id)]


def test_a_dry_run_lists_the_steps_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Screen
) -> None:
    no_ray(monkeypatch)
    outcome = run(config_of(tmp_path / "store"), screen=said, dry_run=True)
    everyone = ", ".join(CONCEPTS)
    assert lines(said) == [
        "would ingest the photographs",
        "would choose the training images",
        f"would edit 4 concepts: {everyone}",
        "would pretrain the base",
        "would search the ranks",
        f"would train the adapters of 4 concepts: {everyone}",
        f"would publish 4 concepts: {everyone}",
    ]
    assert outcome.report is None and not outcome.failures and outcome.built == 0
    assert contents(tmp_path / "store") == {}


def test_a_dry_run_of_a_farm_half_done(root: Path, tmp_path: Path, said: Screen) -> None:
    copied(root, tmp_path / "farm", "sources", "selections", "edits", "quality", "bases", "ranks")
    before = contents(tmp_path / "farm")
    run(config_of(tmp_path / "farm", catalogue__3__prompt="an old photograph"), screen=said, dry_run=True)
    assert lines(said) == [
        "would edit 1 concept: sepia",
        "would train the adapters of 4 concepts: charcoal, cyanotype, night, sepia",
        "would publish 4 concepts: charcoal, cyanotype, night, sepia",
    ]
    run(config_of(root), screen=said, dry_run=True)
    assert lines(said)[-1] == "nothing to do: it is all in the store"
    assert contents(tmp_path / "farm") == before


def test_a_dry_run_of_one_stage_lists_its_steps_alone(tmp_path: Path, said: Screen) -> None:
    run(config_of(tmp_path / "store"), screen=said, stages=["base"], dry_run=True)
    assert lines(said) == ["would pretrain the base"]


def test_a_whole_run_equals_its_stages_called_one_by_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Screen
) -> None:
    cluster = Cluster()
    cluster.stand_in(monkeypatch)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = (tmp_path / "mlruns").as_uri()
    outcome = run(config_of(tmp_path / "store", tracking={"mlflow": mlflow}), screen=said)
    store = LocalStore(tmp_path / "store")
    assert not outcome.failures and not outcome.unpublished
    assert list(outcome.seconds) == ["sources", "selection", "edits", "base", "ranks", "adapter"]
    assert outcome.built == 6
    assert cluster.connections == 1
    edits, adapters = ([f"{what} {c}" for c in CONCEPTS] for what in ("edits", "adapter"))
    assert cluster.done == [*edits, "base", "ranks", *adapters]
    assert outcome.report and store.get(outcome.report).lstrip().startswith(b"<!doctype html>")

    plan = plan_of(root)
    for spec in (plan.sources, plan.selection, plan.base, plan.ranks, plan.edits("night"), plan.adapter("night")):
        here, there = find(store, spec.path), find(LocalStore(root), spec.path)
        assert here and there and here.files == there.files
    assert {c: e.version for c, e in Registry(store).list().items()} == dict.fromkeys(CONCEPTS, 1)

    told = events(store, outcome)
    assert [e["stage"] for e in told if e["state"] == "started" and "concept" not in e] == ["run", *outcome.seconds]
    assert [e["concept"] for e in told if e["stage"] == "publish"] == list(CONCEPTS)
    adapters = [e["state"] for e in told if e["stage"] == "adapter" and "concept" in e]
    assert adapters == ["started", "done"] * len(CONCEPTS)
    assert (told[-1]["stage"], told[-1]["state"], told[-1]["failures"]) == ("run", "done", {})

    client = MlflowClient(tracking_uri=mlflow)
    [experiment] = [found for found in client.search_experiments() if found.name == plan.config.name]
    tracked = {found.info.run_name: found for found in client.search_runs([experiment.experiment_id])}
    assert tracked.keys() == {"base", *CONCEPTS}
    assert all(found.data.tags["farm.run"] == outcome.run_id for found in tracked.values())
    assert tracked["night"].data.params["digest"] == plan.adapter("night").digest


def test_a_finished_farm_does_nothing_and_does_not_start_ray(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Screen
) -> None:
    no_ray(monkeypatch)
    copied(root, tmp_path / "farm")
    first = run(config_of(tmp_path / "farm"), screen=said)
    before = contents(tmp_path / "farm")
    again = run(config_of(tmp_path / "farm"), screen=said)
    assert lines(said) == ["everything is in the store already: nothing to do"] * 2
    assert first.report and again.report == first.report == f"runs/{first.run_id}/report.html"
    assert again.run_id != first.run_id and again.built == 0
    assert contents(tmp_path / "farm") == before


def test_the_report_shown_is_that_of_these_adapters(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Screen
) -> None:
    Cluster().stand_in(monkeypatch)
    copied(root, tmp_path / "farm")
    old = run(config_of(tmp_path / "farm"), screen=said)
    changed = config_of(tmp_path / "farm", catalogue__3__prompt="an old photograph")
    new = run(changed, screen=said)
    assert new.report != old.report
    assert run(changed, screen=said).report == new.report
    # The first farm's adapters are all there, but its sepia is not the one published.
    back = run(config_of(tmp_path / "farm"), screen=said)
    entry = Registry(LocalStore(tmp_path / "farm")).get("sepia")
    assert entry is not None and entry.version == 3 and entry.digest == plan_of(root).adapter("sepia").digest
    assert back.report not in (None, new.report)


def test_a_changed_prompt_is_all_that_is_made_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Screen
) -> None:
    cluster = Cluster()
    cluster.stand_in(monkeypatch)
    copied(root, tmp_path / "farm")
    before = without_reports(tmp_path / "farm")
    run(config_of(tmp_path / "farm", catalogue__3__prompt="an old photograph"), screen=said)
    assert cluster.done == ["edits sepia", "adapter sepia"]
    after = without_reports(tmp_path / "farm")
    assert {key for key in before if after[key] != before[key]} == {"registry/sepia.json"}


def test_one_concepts_failure_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Screen
) -> None:
    cluster = Cluster("sepia")
    cluster.stand_in(monkeypatch)
    outcome = run(config_of(tmp_path), screen=said)
    assert outcome.failures == {"sepia": "edits: the teacher gave up"}
    store = LocalStore(tmp_path)
    assert list(Registry(store).list()) == ["charcoal", "cyanotype", "night"]
    assert "adapter sepia" not in cluster.done
    [failed] = [event for event in events(store, outcome) if event["state"] == "failed"]
    assert (failed["stage"], failed["concept"], failed["traceback"]) == ("edits", "sepia", "Traceback")
    assert outcome.report and b"the teacher gave up" in store.get(outcome.report)

    mended = Cluster()
    mended.stand_in(monkeypatch)
    assert run(config_of(tmp_path), screen=said).failures == {}
    assert mended.done == ["edits sepia", "adapter sepia"]
    assert list(Registry(store).list()) == list(CONCEPTS)


def test_a_failed_concept_of_the_base_ends_the_run_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Screen
) -> None:
    cluster = Cluster("cyanotype")
    cluster.stand_in(monkeypatch)
    with pytest.raises(UserError, match=r"^base\.concepts: cyanotype has no edits: edits: the teacher gave up"):
        run(config_of(tmp_path), screen=said)
    assert cluster.done == ["edits charcoal", "edits night", "edits sepia"]


def test_an_adapter_not_good_enough_is_kept_and_told(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Screen
) -> None:
    cluster = Cluster()
    cluster.stand_in(monkeypatch)
    copied(root, tmp_path / "farm", "sources", "selections", "edits", "quality", "bases", "ranks", "adapters")
    strict = config_of(tmp_path / "farm", adapters__max_l1_ratio=0.01)
    outcome = run(strict, screen=said)
    assert cluster.done == [] and not outcome.failures
    assert outcome.unpublished.keys() == set(CONCEPTS)
    assert "is over 0.01 of the untouched photo's" in outcome.unpublished["sepia"]
    assert outcome.unpublished["sepia"].endswith("(adapters.max_l1_ratio)")
    assert not Registry(LocalStore(tmp_path / "farm")).list()
    # A laxer bound publishes what is there.
    assert make_todo(LocalStore(tmp_path / "farm"), plan_of(tmp_path / "farm")).publish == CONCEPTS
    run(config_of(tmp_path / "farm"), screen=said)
    assert cluster.done == []
    assert list(Registry(LocalStore(tmp_path / "farm")).list()) == list(CONCEPTS)


@pytest.mark.parametrize(
    ("folders", "stage", "says"),
    [
        ((), "base", "base.concepts: charcoal has no edits: run jobs/build_concepts.py or `farm run` first."),
        ((), "ranks", "the base of this farm is not in {url}; run jobs/pretrain_base.py or `farm run` first."),
        ((), "adapters", "the base of this farm is not in {url}; run jobs/pretrain_base.py or `farm run` first."),
        (("bases",), "ranks", "ranks.concepts: night has no edits: run jobs/build_concepts.py or `farm run` first."),
        (
            ("bases",),
            "adapters",
            "the rank search of this farm is not in {url}; run jobs/search_ranks.py or `farm run` first.",
        ),
    ],
)
def test_a_stage_without_its_inputs_names_the_job_to_run_first(
    root: Path,
    tmp_path: Path,
    folders: tuple[str, ...],
    stage: str,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    said: Screen,
) -> None:
    no_ray(monkeypatch)
    for folder in folders:
        copied(root, tmp_path / "farm", folder)
    with pytest.raises(UserError) as caught:
        run(config_of(tmp_path / "farm"), screen=said, stages=[stage])
    assert str(caught.value) == says.format(url=(tmp_path / "farm").as_uri())


def test_stages_run_one_by_one_in_any_call(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Screen
) -> None:
    cluster = Cluster()
    cluster.stand_in(monkeypatch)
    done = []
    for stage in STAGES:
        outcome = run(config_of(tmp_path), screen=said, stages=[stage])
        assert not outcome.failures
        done.append(len(cluster.done))
    assert done == [4, 5, 6, 10]
    assert not make_todo(LocalStore(tmp_path), plan_of(tmp_path))
    assert without_reports(tmp_path).keys() == without_reports(root).keys()


def test_adapters_without_edits_fail_alone(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Screen
) -> None:
    cluster = Cluster()
    cluster.stand_in(monkeypatch)
    copied(root, tmp_path / "farm", "sources", "selections", "edits", "quality", "bases", "ranks")
    changed = config_of(tmp_path / "farm", catalogue__3__prompt="an old photograph")
    outcome = run(changed, screen=said, stages=["adapters"])
    assert outcome.failures == {"sepia": "it has no edits: run jobs/build_concepts.py first"}
    assert list(Registry(LocalStore(tmp_path / "farm")).list()) == ["charcoal", "cyanotype", "night"]


def test_skipped_photographs_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Screen) -> None:
    """With names that look like the terminal's markup."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(3):
        noise = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        PIL.Image.fromarray(noise).save(folder / f"{seed}.png")
    (folder / "[red]a.png").write_text("no picture")
    (folder / "[red]b[").mkdir()
    (folder / "[red]b[/blue].png").write_text("no picture")
    sources = {"kind": "folder", "path": str(folder), "size": 32, "crops_per_photo": 2}
    cluster = Cluster()
    cluster.stand_in(monkeypatch)
    run(config_of(tmp_path / "farm", sources=sources, selection={}), screen=said, stages=["concepts"])
    skipped = [line.strip() for line in lines(said) if line.startswith("  skipped ")]
    assert [line.partition(":")[0] for line in skipped] == ["skipped [red]a.png", "skipped [red]b[/blue].png"]


def test_an_item_left_by_a_driver_that_died_after_its_commit_is_dropped(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Screen
) -> None:
    Cluster().stand_in(monkeypatch)
    store = copied(root, tmp_path / "farm")
    queue, plan = Queue(store, "adapters"), plan_of(root)
    queue.enqueue(plan.adapter_key("night"), {"concept": "night"})
    queue.enqueue("of-another-farm", {"concept": "night"})
    store.delete("registry/night.json")
    run(config_of(tmp_path / "farm"), screen=said)
    assert [item.key for item in queue.pending()] == ["of-another-farm"]
