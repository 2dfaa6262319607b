"""TensorBoard event files in the store, read again as TensorBoard reads them: a folder's files one after another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farm.boards import CURVE_POINTS, Board, put_adapter
from farm.store import LocalStore


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    return [(tag, step, value) for tag, step, value in records(folder) if value is not None]


def records(folder: Path) -> list[tuple[str, int, Any]]:
    """Tag, step and value, None for a picture, of all files in the order of their names."""
    import io

    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(folder.iterdir()):
        assert "tfevents" in file.name
        stream = io.BytesIO(file.read_bytes())
        while head := stream.read(12):
            event = Event.FromString(stream.read(int.from_bytes(head[:8], "little")))
            stream.read(4)
            for value in event.summary.value:
                picture = value.HasField("image")
                found.append((value.tag, event.step, None if picture else value.simple_value))
    return found


@settings(max_examples=15)
@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_every_loss_is_put_once(again: list[bool]) -> None:
    """Whichever worker goes on with a training; pictures grow fewer."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(Path(folder))
        board = Board(store, "runs/r1/tensorboard/base")
        losses: list[dict[str, float]] = []
        samples = torch.zeros(3, 2, 3, 16, 16, dtype=torch.uint8)
        for number, other in enumerate(again, 1):
            losses += [{"step": 100 * number + s, "l1": 1 / (100 * number + s)} for s in (0, 20, 40)]
            if other:
                board = Board(store, "runs/r1/tensorboard/base")
            board.put(int(losses[-1]["step"]), losses, samples)
        found = records(Path(folder) / "runs/r1/tensorboard/base")
        curve = [(step, value) for tag, step, value in found if tag == "loss/l1"]
        assert [step for step, _ in curve] == [row["step"] for row in losses]
        assert all(abs(value - 1 / step) < 1e-6 for step, value in curve)
        pictures = sum(value is None for _, _, value in found)
        assert pictures >= 1 and (any(again[1:]) or pictures == len(again).bit_length())


def test_an_adapters_file_is_small(tmp_path: Path) -> None:
    """However long it was trained: its first and last loss, and no more than a hundred of them."""
    losses = [{"step": step, "l1": 1 / step, "gradient": 2 / step} for step in range(20, 200_020, 20)]
    summary = {"losses": losses, "metrics": {"l1": 0.25, "l1_untouched": 0.5, "n": 3}}
    put_adapter(LocalStore(tmp_path), "runs/r1/tensorboard/adapters/night", summary)
    [file] = (tmp_path / "runs/r1/tensorboard/adapters/night").iterdir()
    assert file.stat().st_size < 20_000
    found = scalars(file.parent)
    steps = [step for tag, step, _ in found if tag == "loss/l1"]
    assert (steps[0], steps[-1], len(steps)) == (20, 200_000, CURVE_POINTS) and steps == sorted(set(steps))
    assert [row for row in found if row[0].startswith("test/")] == [
        ("test/l1", 200_000, 0.25),
        ("test/l1_untouched", 200_000, 0.5),
    ]


def test_a_short_training_keeps_every_loss(tmp_path: Path) -> None:
    summary = {"losses": [{"step": 7, "l1": 0.5}], "metrics": {"l1": 0.25, "l1_untouched": 0.5}}
    put_adapter(LocalStore(tmp_path), "runs/r1/tensorboard/adapters/night", summary)
    found = scalars(tmp_path / "runs/r1/tensorboard/adapters/night")
    assert found[0] == ("loss/l1", 7, 0.5) and len(found) == 3
