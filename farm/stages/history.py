"""What a training went through, kept with its checkpoint so that whoever goes on with it knows."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field

from e2gan.checkpoint import CheckpointError
from e2gan.train import Progress
from e2gan.weights import load_weights, save_weights


@dataclass
class History:
    """The losses so far, a row a report, the seconds they took, and the steps after which a training that had died
    or was stopped went on. Its clock runs from when it is made."""

    losses: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    resumed: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._started = time.monotonic() - self.seconds

    def elapsed(self) -> float:
        """Seconds since the start, without those between an interruption and the resumption."""
        return time.monotonic() - self._started

    def add(self, done: Progress) -> None:
        """One report."""
        self.losses.append({"step": done.step, **done.losses})
        self.seconds = self.elapsed()

    def within(self, checkpoint: bytes) -> bytes:
        """The checkpoint with this history among its metadata, where `e2gan.train` does not look."""
        tensors, metadata = load_weights(checkpoint)
        return save_weights(tensors, **metadata, history=json.dumps(asdict(self)))

    @classmethod
    def resumed_from(cls, checkpoint: bytes) -> History:
        """The history within a checkpoint, with the resumption that begins now.

        Raises:
            CheckpointError: the bytes are damaged, or no checkpoint with a history.
        """
        try:
            _, metadata = load_weights(checkpoint, sealed=True)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        if "history" not in metadata:
            raise CheckpointError("not a checkpoint with its history")
        history = cls(**json.loads(metadata["history"]))
        history.resumed.append(history.losses[-1]["step"])
        return history
