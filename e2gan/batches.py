"""The batches of a training: which pairs, in which order, mirrored or cropped how.

Every image stays on the device as uint8, and so does an epoch's order, drawn from seed and epoch alone: a step needs no
decoding and no round trip to the host, and an interrupted run goes on with the same data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from e2gan.config import TrainConfig
from e2gan.pairs import Pairs, to_unit


@dataclass(frozen=True, kw_only=True)
class ConceptPairs:
    """Training pairs of one concept with its prompt's embedding, float32 `[tokens, text_width]`."""

    concept: str
    text: Tensor
    pairs: Pairs


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's data: source and target `[n, 3, h, w]` in -1..1, text `[n, tokens, text_width]`."""

    source: Tensor
    target: Tensor
    text: Tensor


class Batches:
    """Batches by step, the concepts mixed evenly (section 4.2.1).

    An epoch takes as many pairs of every concept as the largest concept has (smaller ones come round again), each
    concept in an order of its own, all of them shuffled together. Batches run on across the end of an epoch.

    Raises:
        ValueError: nothing to train on, images that are no uint8 stack of one size, flat ones, or too small a size or
            too few pairs for the configuration.
    """

    def __init__(
        self, concepts: Sequence[ConceptPairs], config: TrainConfig, *, seed: int, device: torch.device | str
    ) -> None:
        check_pairs(concepts, config)
        self._config, self._seed, self._device = config, seed, torch.device(device)
        self._counts = [len(c.pairs) for c in concepts]
        self._source = torch.cat([c.pairs.source for c in concepts]).to(device)
        self._target = torch.cat([c.pairs.target for c in concepts]).to(device)
        self._text = torch.stack([c.text for c in concepts]).to(device)  # [concepts, tokens, width]
        self._epochs: dict[int, Tensor] = {}
        self.epoch_length = max(self._counts) * len(concepts)
        if config.batch_size > self.epoch_length:
            raise ValueError(
                f"batch_size {config.batch_size} is more than the {self.epoch_length} pairs of an epoch: "
                f"lower it or give more pairs"
            )

    def __call__(self, step: int, *, worker: tuple[int, int] = (0, 1)) -> Batch:
        """Batch number `step`; of it the share of `worker` = (rank, world size)."""
        rank, world = worker
        concept, row, mirror, top, left = self.picks(step)[:, rank::world]
        height, width = self._source.shape[2:]
        rows = torch.arange(self._config.crop or height, device=self._device) + top[:, None]  # [n, h]
        columns = torch.arange(self._config.crop or width, device=self._device) + left[:, None]  # [n, w]
        if self._config.flip:
            columns = torch.where(mirror[:, None] == 1, columns.flip(1), columns)
        if self._config.flip or self._config.crop:
            # One read does it all: pairs, crops and mirrors.
            colour = torch.arange(3, device=self._device)[:, None, None]
            index = (row[:, None, None, None], colour, rows[:, None, :, None], columns[:, None, None, :])
        else:
            index = (row,)  # type: ignore[assignment]
        return Batch(source=to_unit(self._source[index]), target=to_unit(self._target[index]), text=self._text[concept])

    def picks(self, step: int) -> Tensor:
        """Concept, row of the images, mirror (0 or 1), top and left of the crop: `[5, batch_size]`, on the device."""
        size = self._config.batch_size
        epoch, start = divmod(step * size, self.epoch_length)
        picks = self._epoch(epoch)[:, start : start + size]
        if picks.shape[1] < size:
            picks = torch.cat([picks, self._epoch(epoch + 1)[:, : size - picks.shape[1]]], dim=1)
        return picks

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            random = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
            longest = max(self._counts)
            first = 0
            orders = []
            for concept, count in enumerate(self._counts):
                passes = [torch.randperm(count, generator=random) for _ in range(math.ceil(longest / count))]
                rows = first + torch.cat(passes)[:longest]
                orders.append(torch.stack([torch.full_like(rows, concept), rows]))
                first += count
            order = torch.cat(orders, dim=1)
            order = order[:, torch.randperm(self.epoch_length, generator=random)]
            chance = torch.rand(3, self.epoch_length, generator=random)
            height, width = self._source.shape[2:]
            crop = self._config.crop
            places = torch.tensor([2, height - crop + 1 if crop else 1, width - crop + 1 if crop else 1])
            order = torch.cat([order, (chance * places[:, None]).long()])
            self._epochs = {e: t for e, t in self._epochs.items() if e == epoch - 1}  # a batch may span two epochs
            self._epochs[epoch] = order.to(self._device)
        return self._epochs[epoch]


def check_pairs(concepts: Sequence[ConceptPairs], config: TrainConfig) -> None:
    """Raise a ValueError that names the first thing wrong with the pairs."""
    if not concepts or not all(len(c.pairs) for c in concepts):
        raise ValueError("nothing to train on: no concept was given, or one without pairs")
    for c in concepts:
        for side, images in (("source", c.pairs.source), ("target", c.pairs.target)):
            if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
                raise ValueError(
                    f"{c.concept}: {side} images must be uint8 [n, 3, h, w], not {images.dtype} {[*images.shape]}"
                )
        if c.pairs.source.shape != c.pairs.target.shape or len(c.pairs.ids) != len(c.pairs.source):
            raise ValueError(
                f"{c.concept}: {len(c.pairs.ids)} ids, sources {[*c.pairs.source.shape]} and targets "
                f"{[*c.pairs.target.shape]} do not pair up"
            )
    sizes = {tuple(c.pairs.source.shape[2:]) for c in concepts}
    if len(sizes) != 1:
        raise ValueError(f"all concepts must have images of one size, these have {sorted(sizes)}")
    texts = {tuple(c.text.shape) for c in concepts}
    if len(texts) != 1:
        raise ValueError(f"all prompts must be embedded alike, these have shapes {sorted(texts)}")
    sides = sizes.pop()
    if config.crop and config.crop > min(sides):
        raise ValueError(f"crop {config.crop} is larger than the images, {sides[0]}x{sides[1]}")
    smallest = 24 if config.adversarial_weight > 0 else 16
    if any(side % 8 or side < smallest for side in ((config.crop,) if config.crop else sides)):
        raise ValueError(
            f"images must have sides that are multiples of 8 and at least {smallest}, not {config.crop or sides}"
        )
    for c in concepts:
        for side, images in (("source", c.pairs.source), ("target", c.pairs.target)):
            flat = images.flatten(2)
            constant = (flat.amax(dim=2) == flat.amin(dim=2)).all(dim=1).nonzero().flatten().tolist()
            if constant:
                raise ValueError(
                    f"{c.concept}: the {side} image of {c.pairs.ids[constant[0]]!r} is one flat colour "
                    f"({len(constant)} such): leave it out"
                )
