"""One base that edits with many adapters: merged on a CPU, stacked on a GPU (bench/infer.py measures both).

On a CPU a batch is no faster than its images one after another, and mixing adapters in it costs; weights that are
merged once an adapter cost nothing, but for their memory. On a GPU it is the other way round.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from e2gan.config import GeneratorConfig
from e2gan.infer import Switcher, base_generator
from e2gan.lora import Adapter
from e2gan.pairs import Image, to_tensor
from e2gan.stacked import StackedAdapters


class Ready(Protocol):
    """An adapter as an engine takes it."""

    @property
    def nbytes(self) -> int:
        """Memory that it does not share with the base."""


class Engine(Protocol):
    """A base on a device. For any number of threads, of which one edits at a time."""

    config: GeneratorConfig

    def ready(self, adapter: Adapter, text: Tensor) -> Ready:
        """Make an adapter ready to edit with, and its prompt's embedding `[77, 768]`."""

    def edit(self, jobs: Sequence[tuple[Any, Image]]) -> list[Image]:
        """Edit photos, each with what is ready for it: uint8 `[h, w, 3]` with sides as the network takes them."""


class Merging:
    """Weights merged once an adapter, photos one after another.

    compiled: sizes, (height, width), that a graph is compiled for here and now; photos of other sizes take longer.

    Raises:
        ValueError: the weights are not those of a generator of this configuration.
    """

    def __init__(
        self, config: GeneratorConfig, weights: dict[str, Tensor], *, compiled: Collection[tuple[int, int]] = ()
    ) -> None:
        base = base_generator(config, weights)
        self.config = config
        self._switcher = Switcher(base, compile=frozenset(compiled))
        self._editing = threading.Lock()
        if compiled:
            untouched = self._switcher.merge(None, torch.zeros(config.text_tokens, config.text_width))
            for height, width in compiled:
                for _ in range(2):  # what is allocated at the second call stays
                    self.edit([(untouched, np.zeros((height, width, 3), np.uint8))])

    def ready(self, adapter: Adapter, text: Tensor) -> Ready:
        return self._switcher.merge(adapter, text)

    def edit(self, jobs: Sequence[tuple[Any, Image]]) -> list[Image]:
        with self._editing:
            return [_image(self._switcher(ready, to_tensor([photo]))[0]) for ready, photo in jobs]


class Stacking:
    """Adapters stacked, photos of one size in mixed batches.

    compile: with torch.compile, anew for every size and count of photos.

    Raises:
        ValueError: as in `Merging`.
    """

    def __init__(
        self, config: GeneratorConfig, weights: dict[str, Tensor], *, device: str = "cuda", compile: bool = False
    ) -> None:
        base = base_generator(config, weights)
        self.config = config
        self._stack = StackedAdapters(base, device=device, compile=compile)
        self._using = threading.Lock()
        self._free: list[int] = []  # numbers of adapters that nobody holds any more

    def ready(self, adapter: Adapter, text: Tensor) -> Ready:
        with self._using:
            before = self._stack.nbytes
            number = self._stack.add(adapter, text, instead=self._free.pop() if self._free else None)
            taken = _Place(number, max(self._stack.nbytes - before, self._stack.nbytes // len(self._stack)))
        weakref.finalize(taken, self._free.append, number)
        return taken

    def edit(self, jobs: Sequence[tuple[Any, Image]]) -> list[Image]:
        sizes: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for place, (_, photo) in enumerate(jobs):
            sizes[photo.shape].append(place)
        edited: dict[int, Image] = {}
        for places in sizes.values():
            photos = to_tensor([jobs[place][1] for place in places])
            which = torch.tensor([jobs[place][0].number for place in places])
            with self._using:
                images = self._stack(photos, which).cpu()
            edited.update(zip(places, map(_image, images), strict=True))
        return [edited[place] for place in range(len(jobs))]


class _Place:
    """An adapter's place in the stack, which is free when nobody holds this any more."""

    def __init__(self, number: int, nbytes: int) -> None:
        self.number = number
        self.nbytes = nbytes


def _image(tensor: Tensor) -> Image:
    return tensor.permute(1, 2, 0).contiguous().numpy()
