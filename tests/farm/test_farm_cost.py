"""Predictions from measured unit times, and how they are held against what work took."""

from __future__ import annotations

import heapq
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_farm import CONCEPTS, Cluster, copied, document_of, plan_of, write_config
from terminal import Terminal

from farm.artifacts import find
from farm.config_file import load_config
from farm.cost.left import Work
from farm.cost.predict import forecast, of_stage
from farm.cost.probe import probe
from farm.cost.rates import all_manifests, edit_key, kept_probe, known_rates, measured, planned_key, probe_key
from farm.cost.reconcile import predicted, reconcile
from farm.cost.slots import slots_of
from farm.errors import UserError
from farm.glance import Documents
from farm.plan import Plan
from farm.standing import look
from farm.store import LocalStore
from farm.todo import make_todo

NODES = {"small": {"per_hour": 3.6, "cpus": 2}, "large": {"per_hour": 36.0, "cpus": 8, "gpus": 2, "count": 3}}


def foretold(store: LocalStore, plan: Plan) -> Any:
    seen = look(Documents(store), plan)
    return forecast(store, plan, seen, make_todo(store, plan, seen))


def test_slots_and_prices_of_workers(tmp_path: Path) -> None:
    gpu = {"cpus": 2, "gpus": 0.5}
    changes: dict[str, Any] = {
        "cost": {"nodes": NODES},
        "cluster": {"adapters": gpu, "edit": {"cpus": 2, "workers": 3}},
    }
    config = plan_of(tmp_path, **changes).config
    edit, adapters = slots_of(config, "edit"), slots_of(config, "adapters")
    # A small node takes one worker of two CPUs for 3.6 an hour, a large one four for 36.
    assert (edit.node, edit.count) == ("small", 1) and edit.price == pytest.approx(0.001)
    assert (adapters.node, adapters.count) == ("large", 12) and adapters.price == pytest.approx(36 / 3600 / 4)
    pinned = plan_of(tmp_path, cost={"nodes": NODES, "stages": {"edit": "large"}}, cluster=changes["cluster"]).config
    assert (slots_of(pinned, "edit").node, slots_of(pinned, "edit").count) == ("large", 3)
    huge = plan_of(tmp_path, cost={"nodes": NODES}, cluster={"base": {"cpus": 64}}).config
    with pytest.raises(
        UserError, match=r"^cost.nodes: none of them has room for a worker of cluster.base, .* 64 CPUs\.$"
    ):
        slots_of(huge, "base")


@pytest.mark.parametrize(
    ("cost", "sentence"),
    [
        ({"stages": {"edit": "gpu"}}, "cost: stages.edit: nodes has no 'gpu', only nothing at all"),
        ({"nodes": {"gpu": {"per_hour": -1, "cpus": 1}}}, "cost.nodes.gpu.per_hour: should be greater than"),
        ({"nodes": {"gpu": {"per_hour": 1}}}, "the key cost.nodes.gpu.cpus is missing."),
        (
            {"nodes": {"gpu": {"per_hour": 1, "cpus": 1, "gpu": 4}}},
            "unknown key cost.nodes.gpu.gpu; did you mean gpus?",
        ),
        ({"currency": "euro"}, "cost.currency: "),
    ],
)
def test_mistakes_in_prices(tmp_path: Path, cost: dict[str, Any], sentence: str) -> None:
    path = tmp_path / "farm.yaml"
    path.write_text(yaml.safe_dump({**document_of(tmp_path / "store"), "cost": cost}))
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: {sentence}")


@settings(deadline=None)
@given(units=st.lists(st.integers(1, 50), min_size=1, max_size=12), slots=st.integers(1, 5), fits=st.booleans())
def test_no_order_of_the_work_takes_longer_than_predicted(
    units: list[int], slots: int, fits: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    nodes = {"node": {"per_hour": 3600.0, "cpus": 1, "count": slots}}
    config = plan_of(Path("nowhere"), cost={"nodes": nodes}).config
    works = [
        Work(path=f"{n}", stage="adapters", units=count, unit_seconds=0.5, at_once=count)
        for n, count in enumerate(units)
    ]
    line = of_stage(config, "adapters", works)
    # By hand: whoever is free first takes the next one.
    free = [0.0] * slots
    for count in units:
        heapq.heapreplace(free, free[0] + 0.5 * count)
    assert line.seconds is not None and line.seconds >= max(free) - 1e-9
    assert line.seconds <= 2 * max(free) + 1e-9
    assert line.work_seconds == pytest.approx(sum(units) / 2) == pytest.approx(line.money)
    assert line.slots == slots


def test_what_is_in_the_store_tells_what_the_rest_will_take(root: Path) -> None:
    store, plan = LocalStore(root), plan_of(root)
    made = [find(store, plan.adapter(c).path) for c in CONCEPTS]
    # 27 pairs are selected... as many as the losses say.
    images = sum(m.summary["losses"][-1]["step"] * 4 for m in made if m)
    seconds = sum(m.wall_seconds for m in made if m)
    rates = measured(all_manifests(store, plan))
    key = planned_key(plan, "adapter", plan.config.adapters.train)
    assert rates.of_key(key) == pytest.approx(seconds / images)
    edited = find(store, plan.edits("night").path)
    assert edited
    own = edit_key(plan.teachers["night"]["procedural"], 32)
    assert rates.of_key(own) == pytest.approx(edited.wall_seconds / edited.summary["images"])

    assert foretold(store, plan).artifacts == {} and foretold(store, plan).complete
    longer = plan_of(root, adapters__train__epochs=6)
    left = foretold(store, longer)
    (_, _, _, adapters) = left.stages
    pairs = made[0].summary["pairs"] if made[0] else 0
    steps = -(-6 * pairs // 4)
    assert adapters.artifacts == 4 and adapters.units == 4 * 4 * steps
    assert left.artifacts.keys() == {longer.adapter(c).path for c in CONCEPTS}
    assert sum(left.artifacts.values()) == pytest.approx(adapters.units * seconds / images, rel=0.01)
    assert left.money is None and left.nodes_money is None and left.complete
    # Another learning rate takes as long, and so does another seed; other networks were not measured.
    assert foretold(store, plan_of(root, adapters__train__learning_rate=1e-4)).complete
    wider = foretold(store, plan_of(root, model={"channels": 16}))
    assert not wider.complete and wider.unknown == tuple(
        f"{what}: nothing was measured" for what in ("base", "rank search", "adapter")
    )
    assert wider.stages[0].artifacts == 0 and wider.stages[1].work_seconds is None


def test_a_probe_does_a_few_units_for_real(tmp_path: Path) -> None:
    store, plan = LocalStore(tmp_path / "farm"), plan_of(tmp_path / "farm", cost={"nodes": NODES})
    before = foretold(store, plan)
    assert not before.complete and before.seconds == 0 and len(before.unknown) == 4
    said: list[str] = []
    found = probe(store, plan, said.append)
    assert [line.partition(":")[0] for line in said] == ["teacher procedural", "base", "adapter"]
    assert kept_probe(store, plan.config.name) == found
    assert {timed.what for timed in found.timed} == {"procedural", "base", "adapter"}
    assert all(timed.seconds > 0 for timed in found.timed)
    assert [*store.list()] == [probe_key(plan.config.name)]  # and nothing else of it is left
    after = foretold(store, plan)
    assert after.complete and after.seconds > 0 and after.money and after.nodes_money
    assert all("a probe on" in sentence for sentence in after.measured)
    per_image = {timed.what: timed.seconds / timed.units for timed in found.timed}
    assert after.stages[1].unit_seconds == pytest.approx(per_image["base"])
    store.put(probe_key(plan.config.name), b"{")
    assert kept_probe(store, plan.config.name) is None


def test_a_run_keeps_its_prediction_and_is_held_against_it(
    root: Path, tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copied(root, tmp_path / "farm")
    path = write_config(tmp_path / "farm.yaml", store.root, cost={"nodes": NODES})
    plan = plan_of(store.root)
    shutil.rmtree(store.path(plan.adapter("sepia").path))
    shutil.rmtree(store.path("runs"), ignore_errors=True)
    Cluster().stand_in(monkeypatch)
    status, _, err = terminal.farm("run", "--config", path)
    assert status == 0, err
    assert predicted(store).keys() == {plan.adapter("sepia").path}
    document = terminal.document("cost", "--config", path)
    assert document["left"]["artifacts"] == {} and document["done"]["predicted"]
    rows = {row["stage"]: row for row in document["done"]["stages"]}
    assert [rows[s]["artifacts"] for s in ("edit", "base", "ranks", "adapters")] == [8, 1, 1, 4]
    made = find(store, plan.adapter("sepia").path)
    assert made
    told = rows["adapters"]["foretold"]
    assert told["artifacts"] == 1 and told["actual"] == pytest.approx(made.wall_seconds)
    assert told["ratio"] == pytest.approx(told["actual"] / predicted(store)[made.path])
    (sepia,) = (row for row in document["done"]["concepts"] if row["id"] == "sepia")
    assert sepia["foretold"] == told and rows["edit"]["foretold"] is None
    priced = plan_of(store.root, cost={"nodes": NODES}).config
    money = sum(row["work_seconds"] * (slots_of(priced, stage).price or 0) for stage, row in rows.items())
    assert money and document["done"]["total"]["money"] == pytest.approx(money, abs=1e-4)
    text = terminal.good("cost", "--config", path)
    assert "nothing is left to do" in text and "actual / predicted" in text and "USD" in text
    page = terminal.good("report", "--config", path, "--out", tmp_path / "page.html").strip()
    assert page == str(tmp_path / "page.html") and "Predicted and actual" in Path(page).read_text()


def test_nothing_measured_says_what_to_do(tmp_path: Path, terminal: Terminal) -> None:
    path = write_config(tmp_path / "farm.yaml", tmp_path / "farm")
    out = " ".join(terminal.good("cost", "--config", path).split())
    assert "not known: base: nothing was measured" in out and "no prices: the section cost" in out
    assert f"`farm cost --probe --config {path}` does a few units and times them" in out
    assert "USD" not in out


def test_damaged_predictions_count_for_nothing(root: Path, tmp_path: Path) -> None:
    store = copied(root, tmp_path / "farm", "bases")
    store.put("runs/20260101T000000Z-aaaaaa/prediction.json", b"{}")
    plan = plan_of(store.root)
    base = find(store, plan.base.path)
    assert base
    found = reconcile(store, plan, [base])
    assert not found["predicted"] and found["total"]["foretold"] is None
    assert found["total"]["seconds"] == pytest.approx(base.wall_seconds, abs=0.001)
    assert known_rates(store, "stages", {})[0].by_key == {}


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(monkeypatch, capsys)
