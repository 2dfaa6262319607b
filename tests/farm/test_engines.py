from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from tiny_farm import CONFIG

from e2gan.lora import crucial_layers, new_adapter
from e2gan.model import build_generator
from farm.serve.engines import Merging, Stacking

BASE = build_generator(CONFIG, seed=0).requires_grad_(False).eval()
PHOTOS = [np.random.default_rng(n).integers(0, 256, (16, 24 if n % 2 else 16, 3), dtype=np.uint8) for n in range(4)]

pytestmark = pytest.mark.usefixtures("one_thread")


def adapter(seed: int, rank: int = 2):
    random = torch.Generator().manual_seed(seed)
    made = new_adapter(BASE, dict.fromkeys(crucial_layers(BASE), rank), seed=seed)
    for name, tensor in made.tensors.items():
        if name.endswith(".lora_B"):
            tensor.normal_(0, 0.5, generator=random)
    return made, torch.randn(77, 768, generator=random)


def test_stacked_and_merged_are_the_same_edits():
    weights = BASE.state_dict()
    merging, stacking = Merging(CONFIG, weights), Stacking(CONFIG, weights, device="cpu")
    expected, jobs = [], []
    for seed, photo in enumerate(PHOTOS):
        made = adapter(seed, rank=1 + seed)
        expected += merging.edit([(merging.ready(*made), photo)])
        jobs.append((stacking.ready(*made), photo))
    for edited, wanted in zip(stacking.edit(jobs), expected, strict=True):  # one mixed batch, of two sizes
        assert edited.shape == wanted.shape and edited.dtype == np.uint8
        assert np.abs(edited.astype(int) - wanted).mean() < 3
    assert not np.array_equal(*stacking.edit([(jobs[0][0], PHOTOS[0]), (jobs[2][0], PHOTOS[0])]))


def test_a_place_in_the_stack_is_taken_again_and_nobody_elses_is():
    stacking = Stacking(CONFIG, BASE.state_dict(), device="cpu")
    kept = stacking.ready(*adapter(0))
    before = stacking.edit([(kept, PHOTOS[0])])[0]
    for seed in range(1, 6):
        gone = stacking.ready(*adapter(seed, rank=3))
        edited = stacking.edit([(gone, PHOTOS[0])])[0]
        fresh = Stacking(CONFIG, BASE.state_dict(), device="cpu")
        np.testing.assert_array_equal(edited, fresh.edit([(fresh.ready(*adapter(seed, rank=3)), PHOTOS[0])])[0])
        del gone
        gc.collect()
    assert len(stacking._stack) == 2
    again = stacking.ready(*adapter(7, rank=1))  # of a lower rank than who was there before
    fresh = Stacking(CONFIG, BASE.state_dict(), device="cpu")
    wanted = fresh.edit([(fresh.ready(*adapter(7, rank=1)), PHOTOS[0])])[0]
    assert np.abs(stacking.edit([(again, PHOTOS[0])])[0].astype(int) - wanted).max() <= 2
    np.testing.assert_array_equal(stacking.edit([(kept, PHOTOS[0])])[0], before)
