"""TensorBoard event files in the store: the base's while it is trained, and each adapter's curve.

A file is put once and never changed: TensorBoard goes from one to the next in the order of their names.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farm.store import Store

if TYPE_CHECKING:
    from torch import Tensor

CURVE_POINTS = 100
"""Of an adapter's losses: with two losses its file has some 15 kB."""
FILE = "events.out.tfevents."


def board_of(run_id: str) -> str:
    """The folder of a run that `tensorboard --logdir` is given."""
    return f"runs/{run_id}/tensorboard"


class Board:
    """The curves of one training, in a folder of the store: `put` adds what is new of them."""

    def __init__(self, store: Store, folder: str) -> None:
        self._store, self._folder = store, folder
        names = [key.rpartition(".")[2] for key in store.list(f"{folder}/")]
        self._step = max(map(int, names), default=-1)  # another worker may have begun
        self._pictures = 1

    def put(self, step: int, losses: Sequence[Mapping[str, float]], samples: Tensor | None = None) -> None:
        """The losses, rows of `{"step", name: value}`, of steps that have not been put, up to `step`.

        samples: see `e2gan.tracking.TensorBoard.samples`; put the first, second, fourth, eighth time and so on.
        """
        rows = [row for row in losses if self._step < row["step"] <= step]
        if not rows and samples is None:
            return
        shown, self._pictures = self._pictures & (self._pictures - 1) == 0, self._pictures + 1
        self._store.put(f"{self._folder}/{FILE}{step:09d}", event_file(rows, step, samples if shown else None))
        self._step = step


def put_adapter(store: Store, folder: str, summary: Mapping[str, Any]) -> None:
    """An adapter's curve and what it was judged. summary: its manifest's."""
    losses, scores = summary["losses"], summary["metrics"]
    kept = {i * (len(losses) - 1) // (CURVE_POINTS - 1) for i in range(CURVE_POINTS)} if losses else ()
    rows = [losses[place] for place in sorted(kept)]
    last = int(losses[-1]["step"]) if losses else 0
    judged = {f"test/{name}": scores[name] for name in ("l1", "l1_untouched")}
    store.put(f"{folder}/{FILE}{last:09d}", event_file(rows, last, None, judged))


def event_file(
    losses: Sequence[Mapping[str, float]], step: int, samples: Tensor | None, judged: Mapping[str, float] | None = None
) -> bytes:
    """A TensorBoard event file. judged: scalars by tag, of that step."""
    from e2gan.tracking import TensorBoard

    with tempfile.TemporaryDirectory() as folder:
        with TensorBoard(folder) as board:
            board.losses(losses)
            board.scalars(step, judged or {})
            if samples is not None:
                board.samples(step, samples)
        (file,) = Path(folder).iterdir()
        return file.read_bytes()
