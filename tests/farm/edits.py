"""What tests of teachers have in common."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from e2gan.pairs import Image
from farm.editors import Failed
from farm.errors import UserError


def noise(height: int, width: int, seed: int = 0) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pixels(results: Sequence[Image | Failed]) -> list[Image]:
    """The edits, none of which may have failed."""
    assert all(isinstance(result, np.ndarray) for result in results)
    return list(results)  # type: ignore[arg-type]


def apart(first: Image, second: Image) -> int:
    """The largest difference in levels."""
    return int(np.abs(first.astype(int) - second.astype(int)).max())


def one_sentence(error: UserError) -> None:
    assert "\n" not in str(error)
    assert str(error).endswith(".")


def without(folder: Path, copy: Path, part: str) -> Path:
    """A copy of a model's folder without a file, or without the weights and vocabulary of one of its parts."""
    shutil.copytree(folder, copy)
    if (copy / part).is_file():
        (copy / part).unlink()
    else:
        for pattern in ("tokenizer.json", "vocab*", "merges*", "*.safetensors"):
            for file in (copy / part).glob(pattern):
                file.unlink()
    return copy
