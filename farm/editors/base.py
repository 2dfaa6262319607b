"""What every teacher can do: edit images of a concept, one way to call them all."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from e2gan.pairs import Image


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What to make of a photo, said in the ways the families read.

    instruction: what to do, such as `turn him into a zombie`. before, after: captions of the photo and of the edited
    photo, such as `a photo of a person` and `a photo of a zombie`, for the families that are text-to-image models.
    """

    instruction: str
    before: str
    after: str


@dataclass(frozen=True)
class Failed:
    """An edit that is none. reason: a clause without a full stop, such as `the safety checker blanked it`."""

    reason: str


class Editor(Protocol):
    """A teacher, opened and ready. Which family it is of shows nowhere but in its settings.

    Its settings' `seeded` says whether another seed makes another edit of the same image, so that a bad one is worth
    trying again.
    """

    def edit(self, images: Sequence[Image], prompt: Prompt, seeds: Sequence[int]) -> list[Image | Failed]:
        """Edit uint8 `[h, w, 3]` RGB images, which may differ in size, one seed an image.

        Returns one image per image, in order and of the same size, or why there is none. An image's result depends on
        that image, the prompt and its seed alone, whatever else is in the batch.

        Raises:
            UserError: the settings name a model that does not do this.
        """
        ...


def edit_seed(run_seed: int, concept_id: str, source_id: str, attempt: int = 0) -> int:
    """The seed, 0 to 2**63 - 1, of one attempt at one edit: the same on every machine, independent between edits."""
    text = f"{run_seed}\n{concept_id}\n{source_id}" + (f"\n{attempt}" if attempt else "")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
