import io
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from e2gan.tracking import TensorBoard
from e2gan.train import Progress


def events(folder: Path) -> Iterator[tuple[int, object]]:
    """Step and value of everything written: event files are TFRecords of protocol buffers."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(folder.iterdir()):
        stream = io.BytesIO(file.read_bytes())
        while head := stream.read(12):  # length, and its checksum
            event = Event.FromString(stream.read(int.from_bytes(head[:8], "little")))
            assert len(stream.read(4)) == 4  # the record's checksum
            for value in event.summary.value:
                yield event.step, value


def test_losses_and_rates_by_name_and_step(tmp_path: Path) -> None:
    with TensorBoard(tmp_path / "run") as board:
        for step in (20, 40):
            board.progress(Progress(step=step, steps=40, learning_rate=1e-3 / step, losses={"l1": 1 / step, "x": 2.0}))
    found = {(step, value.tag): value.simple_value for step, value in events(tmp_path / "run")}  # type: ignore[attr-defined]
    assert found.keys() == {(step, tag) for step in (20, 40) for tag in ("loss/l1", "loss/x", "learning_rate")}
    for (step, tag), value in found.items():
        expected = {"loss/l1": 1 / step, "loss/x": 2.0, "learning_rate": 1e-3 / step}[tag]
        assert math.isclose(value, expected, rel_tol=1e-6)


@pytest.mark.parametrize("n", [1, 3, 11])
def test_samples_are_a_grid_of_sources_targets_and_edits(tmp_path: Path, n: int) -> None:
    images = torch.randint(0, 256, (3, n, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with TensorBoard(tmp_path) as board:
        board.samples(7, images)
    [(step, value)] = events(tmp_path)
    assert (step, value.tag) == (7, "samples")  # type: ignore[attr-defined]
    grid = np.asarray(Image.open(io.BytesIO(value.image.encoded_image_string)))  # type: ignore[attr-defined]
    columns = min(n, 8)
    assert grid.shape == (3 * 16, columns * 24, 3)
    for row in range(3):
        for column in range(columns):
            tile = grid[16 * row : 16 * row + 16, 24 * column : 24 * column + 24]
            assert np.array_equal(tile, images[row, column].permute(1, 2, 0).numpy())


def test_what_was_written_survives_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), TensorBoard(tmp_path) as board:
        board.progress(Progress(step=1, steps=2, learning_rate=0.5, losses={"l1": 0.25}))
        raise ZeroDivisionError
    assert {value.tag for _, value in events(tmp_path)} == {"loss/l1", "learning_rate"}  # type: ignore[attr-defined]
