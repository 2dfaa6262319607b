"""TensorBoard event files of a training: loss curves and grids of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from torch import Tensor

from e2gan.train import Progress

if TYPE_CHECKING:
    from typing import Self


class TensorBoard:
    """`with TensorBoard(folder) as board: train(..., on_progress=board.progress, on_samples=board.samples)`.

    Look at it with `tensorboard --logdir`.
    """

    def __init__(self, folder: str | Path) -> None:
        from tensorboardX import SummaryWriter

        # Its flush() does not wait for the thread that writes; its own clock does, every two minutes unless told.
        self._writer = SummaryWriter(str(folder), flush_secs=10)

    def progress(self, done: Progress) -> None:
        """Losses as `loss/<name>`, and `learning_rate`."""
        self.losses([{"step": done.step, **done.losses}])
        self.scalars(done.step, {"learning_rate": done.learning_rate})

    def losses(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Losses that were kept: rows of `{"step": step, name: value}`."""
        for row in rows:
            self.scalars(int(row["step"]), {f"loss/{name}": value for name, value in row.items() if name != "step"})

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Values by tag."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def samples(self, step: int, images: Tensor) -> None:
        """At most eight of the uint8 images `[3, n, 3, h, w]` as a grid: sources, targets, edited, row by row."""
        grid = images[:, :8].permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)  # [3, 3 h, n w]
        self._writer.add_image("samples", grid.numpy(), step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
