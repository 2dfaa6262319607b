"""A farm that something is killed of ends with the artifacts of an undisturbed one: a little of `bench/chaos.py`.

Killed drivers are in test_kill.py, killed workers in test_editing.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from chaos import Draw, Farm, calm_run, chaos_run
from ray_nodes import Cluster, cluster_in

pytestmark = [pytest.mark.ray, pytest.mark.slow]


class Calm(NamedTuple):
    cluster: Cluster
    root: Path
    farm: Farm
    seconds: dict[str, float]


@pytest.fixture(scope="module")
def calm() -> Iterator[Calm]:
    """A cluster, which every test leaves whole, and what an undisturbed farm made on it."""
    with tempfile.TemporaryDirectory(prefix="chaos-", dir="/tmp") as folder:  # pytest's are too long for Ray's sockets
        root = Path(folder)
        with cluster_in(root / "c") as cluster:
            yield Calm(cluster, root, *calm_run(cluster, root / "calm", base_epochs=8))


@pytest.mark.parametrize(
    "drawn",
    [
        Draw(seed=1, victim="node", stage="adapter", share=0.5),
        Draw(seed=3, victim="head", stage="edits", share=0.7),
        Draw(seed=4, victim="store", stage="adapter", share=0.3, away_seconds=5),
    ],
    ids=lambda drawn: drawn.victim,
)
def test_nothing_is_lost_and_nothing_done_again(calm: Calm, drawn: Draw) -> None:
    note = chaos_run(calm.cluster, calm.root / drawn.victim, drawn, calm.farm, calm.seconds)
    assert note["problems"] == []
