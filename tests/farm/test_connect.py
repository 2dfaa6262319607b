"""What nodes take, counted and refused without Ray, and Ray's token, which nobody else may read."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from farm.cluster.connect import keep_token_private
from farm.cluster.placement import Launcher, Node, bundle, check, launcher, packed, worker_options
from farm.config import BaseConfig, ClusterConfig, Resources
from farm.errors import UserError

ROOT = Path(__file__).parents[2]
GB = 10**9


def node(cpus: float = 0, gpus: float = 0, memory_gb: float = 0, **labels: str) -> Node:
    """As Ray describes it: what a node has none of is left out."""
    has = {"CPU": cpus, "GPU": gpus, "memory": memory_gb * GB, "object_store_memory": GB, "node:10.0.0.1": 1}
    return Node({name: amount for name, amount in has.items() if amount}, {"ray.io/node-id": "a1", **labels})


def test_a_worker_is_not_split_over_two_nodes() -> None:
    assert packed(Resources(cpus=2), [node(3), node(3)]) == 2


def test_workers_are_counted_on_the_nodes_they_may_run_on_and_up_to_the_limit() -> None:
    nodes = [node(4, farm="edit"), node(8, farm="train"), node(2)]
    assert packed(Resources(), nodes) == 14
    assert packed(Resources(labels={"farm": "train"}), nodes) == 8
    assert packed(Resources(labels={"farm": "!train"}), nodes) == 6
    assert packed(Resources(workers=3), nodes) == 3
    assert packed(Resources(workers=99), nodes) == 14
    assert packed(Resources(cpus=16), nodes) == packed(Resources(), []) == 1  # that waits, and is seen to


shares = st.one_of(
    st.integers(0, 8).map(Fraction),
    st.integers(2, 9).map(lambda parts: Fraction(1, parts)),
)


@given(
    cpus=st.integers(1, 8),
    share=shares,
    memory=st.one_of(st.none(), st.integers(1, 64)),
    has=st.tuples(st.integers(0, 64), st.integers(0, 8), st.integers(0, 512)),
)
def test_a_node_takes_as_many_as_exact_arithmetic_says(
    cpus: int, share: Fraction, memory: int | None, has: tuple[int, int, int]
) -> None:
    counts = [Fraction(has[0]) // cpus]
    counts += [has[1] // share] if share else []
    counts += [has[2] // memory] if memory else []
    worker = Resources(cpus=cpus, gpus=float(share), memory_gb=memory)
    assert node(*has).takes(worker) == min(counts)


# What Ray 2.60 did with each of them.
@pytest.mark.parametrize(
    ("wanted", "runs_on"),
    [
        ("edit", {"edit"}),
        ("!edit", {"cpu", None}),
        ("in(edit,cpu)", {"edit", "cpu"}),
        ("!in(edit,cpu)", {None}),
        ("!other", {"edit", "cpu", None}),
        ("other", set()),
    ],
)
def test_labels_mean_what_they_mean_to_ray(wanted: str, runs_on: set[str | None]) -> None:
    nodes = {label: node(1, **({"farm": label} if label else {})) for label in ("edit", "cpu", None)}
    worker = Resources(labels={"farm": wanted})
    assert {label for label, there in nodes.items() if there.takes(worker)} == runs_on


def test_what_ray_is_told_of_a_worker() -> None:
    worker = Resources(cpus=4, gpus=0.5, memory_gb=16, labels={"farm": "in(edit,train)"}, workers=2)
    assert worker_options(worker) == {
        "num_cpus": 4,
        "num_gpus": 0.5,
        "memory": 16 * GB,
        "label_selector": {"farm": "in(edit,train)"},
    }
    assert bundle(worker) == {"CPU": 4, "GPU": 0.5, "memory": 16 * GB}
    assert worker_options(Resources()) == {"num_cpus": 1, "num_gpus": 0, "label_selector": {}}
    assert bundle(Resources()) == {"CPU": 1, "GPU": 0}


HEAD, SMALL, LARGE = node(0, farm="head"), node(8, 1, 32.4, farm="edit"), node(48, 0, 192, farm="train")


def refusal(together: dict[str, Any] | None = None, coming: Launcher | None = None, **stages: dict[str, Any]) -> str:
    """What is said of these stages on three nodes, "" when it is nothing. together: of the base's workers."""
    base = BaseConfig.model_validate({"representatives": 1, **together}) if together else None
    try:
        check(ClusterConfig.model_validate(stages), [HEAD, SMALL, LARGE], coming, base)
    except UserError as error:
        assert re.fullmatch(r"[^\n]+\.", str(error))
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"cpus": 48}, ""),
        ({"cpus": 8, "gpus": 1, "memory_gb": 32.4, "labels": {"farm": "edit"}}, ""),
        (
            {"cpus": 49},
            "cluster.edit.cpus: a worker wants 49 CPUs and the largest node has 48; "
            "set cluster.edit.cpus to at most 48 or add larger nodes.",
        ),
        (
            {"gpus": 2},
            "cluster.edit.gpus: a worker wants 2 GPUs and the largest node has 1; "
            "set cluster.edit.gpus to at most 1 or add larger nodes.",
        ),
        (
            {"memory_gb": 40, "labels": {"farm": "edit"}},
            "cluster.edit.memory_gb: a worker wants 40 GB of memory and the largest node with farm=edit has 32.4; "
            "set cluster.edit.memory_gb to at most 32.4 or add larger nodes.",
        ),
        (
            {"gpus": 0.5, "labels": {"farm": "train"}},
            "cluster.edit.gpus: a worker wants 0.5 GPU and the largest node with farm=train has 0; "
            "set cluster.edit.gpus to at most 0 or add larger nodes.",
        ),
        (
            {"labels": {"farm": "head"}},
            "cluster.edit.cpus: a worker wants 1 CPU and the largest node with farm=head has 0; add larger nodes.",
        ),
        (
            {"labels": {"farm": "edti"}},
            "cluster.edit.labels: a worker wants a node with farm=edti and there are farm=edit, farm=head, farm=train; "
            "correct it or start a node with `ray start --labels`.",
        ),
        (
            {"labels": {"zone": "a"}},
            "cluster.edit.labels: a worker wants a node with zone=a and there are no such labels; "
            "correct it or start a node with `ray start --labels`.",
        ),
        (
            {"cpus": 16, "gpus": 1},
            "cluster.edit: a worker wants 16 CPUs, 1 GPU and no one node has it all; add larger nodes.",
        ),
    ],
)
def test_what_no_node_can_take_is_refused(edit: dict[str, Any], says: str) -> None:
    assert refusal(edit=edit) == says


def test_every_stage_is_looked_at() -> None:
    for stage in ("edit", "base", "ranks", "adapters"):
        assert refusal(**{stage: {"cpus": 64}}).startswith(f"cluster.{stage}.cpus: a worker wants 64 CPUs ")


def test_the_bases_workers_must_fit_together() -> None:
    large = {"cpus": 16, "labels": {"farm": "train"}}
    assert refusal(base=large) == refusal({"workers": 3}, base=large) == ""
    assert refusal({"workers": 4}, base=large) == (
        "base.workers: 4 workers of 16 CPUs start together and the nodes take 3 of them; "
        "set base.workers to at most 3 or add nodes."
    )
    assert refusal({"workers": 8, "min_workers": 3}, base=large) == ""
    assert refusal({"workers": 8, "min_workers": 4}, base=large).startswith("base.min_workers: 4 workers of 16 CPUs ")


TYPES: dict[str, Any] = {
    "max_workers": 5,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 96}},
        "spot": {"resources": {"CPU": 8, "GPU": 4}, "labels": {"farm": "spot"}, "max_workers": 3},
        "cpu": {"resources": {"CPU": 16}, "labels": {"farm": "cpu"}},
        "off": {"resources": {"CPU": 1000}, "max_workers": 0},
    },
}
COMING = Launcher.model_validate(TYPES)


def test_what_an_autoscaler_may_bring_counts() -> None:
    spot = {"gpus": 4, "labels": {"farm": "spot"}}
    assert refusal(edit=spot).startswith("cluster.edit.labels: a worker wants a node with farm=spot ")
    assert refusal(coming=COMING, edit=spot) == ""
    assert refusal({"workers": 3}, COMING, base=spot) == ""
    assert refusal({"workers": 4}, COMING, base=spot).startswith("base.workers: 4 workers of 1 CPU, 4 GPUs start ")
    assert refusal(coming=COMING, edit={"gpus": 5}).startswith(
        "cluster.edit.gpus: a worker wants 5 GPUs and the largest"
    )
    assert refusal(coming=COMING, edit={"cpus": 49}).startswith("cluster.edit.cpus: a worker wants 49 CPUs ")


@pytest.mark.parametrize(
    ("worker", "together"),
    [
        ({"gpus": 1}, 12),  # three spot machines
        ({"cpus": 8}, 10),  # five of 16 CPUs
        ({"cpus": 8, "labels": {"farm": "spot"}}, 3),
        ({"cpus": 8, "workers": 4}, 4),
        ({"cpus": 16, "gpus": 1}, 1),
    ],
)
def test_what_may_come_is_asked_for_before_it_is_there(worker: dict[str, Any], together: int) -> None:
    assert packed(Resources.model_validate(worker), [], COMING) == together
    assert packed(Resources.model_validate(worker), [node(1)], COMING) == together


def test_the_launchers_file(tmp_path: Path) -> None:
    path = tmp_path / "bootstrap.yaml"
    path.write_text(yaml.safe_dump({**TYPES, "cluster_name": "mine", "provider": {"type": "aws"}}))
    assert launcher(str(path)) == COMING
    ours = launcher(str(ROOT / "cluster.yaml"))
    assert packed(Resources(cpus=4, gpus=1), [], ours) == 8 * 1 + 2 * 4
    assert packed(Resources(cpus=4, gpus=1, labels={"farm": "train"}), [], ours) == 2 * 4


@pytest.mark.parametrize("text", ["a: [", "- a\n", "provider: {}\n", "available_node_types: {edit: 3}\n", None])
def test_a_file_that_describes_no_nodes(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "bootstrap.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=rf"^cluster.autoscaling: {path} cannot be read as [^\n]+\.$"):
        launcher(str(path))


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where Ray keeps its token, in a home without one, of a user whose files are open to all."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    before = os.umask(0)
    yield tmp_path / ".ray" / "auth_token"
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_token_is_made_for_its_owner_alone(token: Path) -> None:
    keep_token_private(make=True)
    made = token.read_text()
    assert re.fullmatch(r"[0-9a-f]{64}", made)
    assert (mode(token), mode(token.parent)) == (0o600, 0o700)
    assert list(token.parent.iterdir()) == [token]
    keep_token_private(make=True)
    assert token.read_text() == made


def test_processes_that_start_at_once_agree_on_a_token(token: Path) -> None:
    def made(_: int) -> str:
        keep_token_private(make=True)
        return token.read_text()

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(made, range(32)))) == 1


def test_a_token_that_others_can_read_is_closed(token: Path) -> None:
    token.parent.mkdir()
    token.write_text("old")
    assert mode(token) == 0o666
    keep_token_private(make=False)
    assert (mode(token), token.read_text()) == (0o600, "old")
    token.chmod(0o400)
    keep_token_private(make=True)
    assert (mode(token), token.read_text()) == (0o400, "old")


@pytest.mark.parametrize(
    ("make", "environment"),
    [
        (False, {}),
        (True, {"RAY_AUTH_MODE": "disabled"}),
        (True, {"RAY_AUTH_TOKEN": "secret"}),
        (True, {"RAY_AUTH_TOKEN_PATH": "/elsewhere"}),
    ],
)
def test_no_token_is_made_where_none_is_used(
    token: Path, monkeypatch: pytest.MonkeyPatch, make: bool, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    keep_token_private(make=make)
    assert not token.parent.exists()
