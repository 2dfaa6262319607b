"""What every teacher can do: edit images of a concept, one way to call them all."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from e2gan.pairs import Image


class Editor(Protocol):
    """A teacher, opened and ready. Which family it is of shows nowhere but in its settings."""

    def edit(self, images: Sequence[Image], prompt: str, seeds: Sequence[int]) -> list[Image]:
        """Edit uint8 `[h, w, 3]` RGB images, which may differ in size, one seed an image.

        Returns one image per image, in order and of the same size. An image's result depends on that image,
        the prompt and its seed alone, whatever else is in the batch.

        Raises:
            UserError: the settings name a model that does not do this.
        """
        ...


def source_seed(run_seed: int, concept_id: str, source_id: str) -> int:
    """The seed, 0 to 2**63 - 1, of one edit: the same on every machine, independent between edits."""
    text = f"{run_seed}\n{concept_id}\n{source_id}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
