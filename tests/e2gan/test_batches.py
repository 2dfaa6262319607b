import dataclasses
from collections import Counter
from math import ceil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from e2gan.batches import Batches, ConceptPairs
from e2gan.config import TrainConfig
from e2gan.pairs import Pairs


def photos(n: int, size: tuple[int, int], seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8, generator=random)


def concept(name: str, n: int, *, size: tuple[int, int] = (16, 16), seed: int = 0, **changes: Any) -> ConceptPairs:
    given_ = {
        "ids": tuple(f"{name}{i}" for i in range(n)),
        "source": photos(n, size, 2 * seed),
        "target": photos(n, size, 2 * seed + 1),
    }
    text = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))
    return ConceptPairs(concept=name, text=text, pairs=Pairs(**{**given_, **changes}))


def concepts(counts: list[int], size: tuple[int, int] = (16, 16)) -> list[ConceptPairs]:
    return [concept("abcdef"[i], n, size=size, seed=i) for i, n in enumerate(counts)]


def batches(given_: list[ConceptPairs], *, seed: int = 0, batch_size: int = 2, **changes: Any) -> Batches:
    config = TrainConfig(**{"adversarial_weight": 0.0, "batch_size": batch_size, **changes})
    return Batches(given_, config, seed=seed, device="cpu")


# Which pairs, in which order

counts = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(counts, st.integers(1, 7), st.integers(0, 2**70))
def test_concepts_are_mixed_evenly(counts: list[int], batch_size: int, seed: int) -> None:
    longest = max(counts)
    batch_size = min(batch_size, longest * len(counts))
    given_ = batches(concepts(counts), seed=seed, batch_size=batch_size)
    assert given_.epoch_length == longest * len(counts)
    epochs = 3
    steps = ceil(epochs * given_.epoch_length / batch_size)
    picks = torch.cat([given_.picks(step) for step in range(steps)], dim=1)
    owner = torch.tensor([c for c, count in enumerate(counts) for _ in range(count)])
    assert torch.equal(owner[picks[1]], picks[0])
    for epoch in picks[:2].split(given_.epoch_length, dim=1)[:epochs]:  # epochs run on across the ends of batches
        assert Counter(epoch[0].tolist()) == dict.fromkeys(range(len(counts)), longest)
        uses = torch.bincount(epoch[1], minlength=len(owner))
        for c in range(len(counts)):
            assert uses[owner == c].max() - uses[owner == c].min() <= 1


def test_epochs_and_seeds_shuffle_differently() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(batches(concepts([50]), seed=seed, batch_size=50).picks(epoch)[1].tolist())

    orders = [order(0, 0), order(0, 1), order(1, 0), order(-1, 0), order(2**31, 0)]
    assert all(sorted(rows) == list(range(50)) for rows in orders)
    assert len(set(orders)) == len(orders)


def test_concepts_come_mixed_and_not_one_after_another() -> None:
    first = batches(concepts([40, 40]), batch_size=40).picks(0)[0]
    assert 10 < first.sum() < 30


@settings(max_examples=40, deadline=None)
@given(counts, st.integers(1, 6), st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(0, 2**40))
def test_a_step_depends_on_seed_and_number_alone(
    counts: list[int], batch_size: int, asked: list[int], seed: int
) -> None:
    given_, changes = concepts(counts, (24, 24)), {"flip": True, "crop": 16}
    batch_size = min(batch_size, max(counts) * len(counts))
    used = batches(given_, seed=seed, batch_size=batch_size, **changes)
    for step in asked:  # in any order, there and back over the ends of epochs
        fresh = batches(given_, seed=seed, batch_size=batch_size, **changes)
        torch.manual_seed(step)
        assert torch.equal(used.picks(step), fresh.picks(step))
        one, other = used(step), fresh(step)
        for a, b in ((one.source, other.source), (one.target, other.target), (one.text, other.text)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_workers_shares_make_up_the_batch(world: int) -> None:
    given_ = batches(concepts([5, 3], (24, 24)), batch_size=7, flip=True, crop=16)
    for step in range(4):
        whole = given_(step)
        shares = [given_(step, worker=(rank, world)) for rank in range(world)]
        assert sum(len(share.source) for share in shares) == 7
        for i in range(7):
            share, place = shares[i % world], i // world
            assert torch.equal(share.source[place], whole.source[i])
            assert torch.equal(share.target[place], whole.target[i])
            assert torch.equal(share.text[place], whole.text[i])


# What a pick becomes


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(24, 40), st.integers(24, 40)), st.sampled_from([16, 24]), st.booleans(), st.integers(0, 999)
)
def test_crops_and_mirrors_are_those_of_the_named_rows(size: tuple[int, int], crop: int, flip: bool, seed: int) -> None:
    given_ = concepts([3, 2], size)
    drawn = batches(given_, seed=seed, batch_size=6, crop=crop, flip=flip)
    check_by_hand(drawn, given_, step=seed % 5, crop=crop, flip=flip)


@pytest.mark.parametrize("flip", [True, False])
def test_whole_images(flip: bool) -> None:
    given_ = concepts([3, 2], (16, 40))
    check_by_hand(batches(given_, batch_size=6, flip=flip), given_, step=1, crop=None, flip=flip)


def check_by_hand(drawn: Batches, given_: list[ConceptPairs], *, step: int, crop: int | None, flip: bool) -> None:
    """Against torchvision's crop and mirror of the images as they were given."""
    batch, rows = drawn(step), [(c, row) for c in given_ for row in range(len(c.pairs))]
    for i, (_, row, mirror, top, left) in enumerate(drawn.picks(step).T.tolist()):
        owner, at = rows[row]
        assert torch.equal(batch.text[i], owner.text)
        for made, images in ((batch.source[i], owner.pairs.source), (batch.target[i], owner.pairs.target)):
            image = tv.crop(images[at], top, left, crop, crop) if crop else images[at]
            image = tv.horizontal_flip(image) if flip and mirror else image
            assert made.shape == image.shape
            torch.testing.assert_close(made, image.double().div(127.5).sub(1).float(), atol=1e-6, rtol=0)
    assert batch.source.dtype == batch.target.dtype == torch.float32


def test_half_of_the_pairs_are_mirrored_anew_each_time() -> None:
    drawn = batches(concepts([100]), batch_size=100, flip=True)
    mirrored = torch.zeros(20, 100)
    for step in range(20):
        _, rows, mirror, *_ = drawn.picks(step)
        mirrored[step, rows] = mirror.float()
    assert mirrored.mean().item() == pytest.approx(0.5, abs=0.04)
    assert mirrored.any(0).all()
    assert not mirrored.all(0).any()


def test_every_place_of_a_crop_is_as_likely() -> None:
    drawn = batches(concepts([100], (18, 16 + 3)), batch_size=100, crop=16)
    places = Counter((top, left) for step in range(60) for top, left in drawn.picks(step)[3:].T.tolist())
    assert places.keys() == {(top, left) for top in range(3) for left in range(4)}
    assert all(uses == pytest.approx(6000 / 12, rel=0.2) for uses in places.values())


# What is refused

SQUARES = photos(2, (16, 16), 9)


def flat(colour: tuple[int, int, int]) -> Tensor:
    """Two images, the second of one colour."""
    images = SQUARES.clone()
    images[1] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]
    return images


@pytest.mark.parametrize(
    ("given_", "sentence"),
    [
        ([], "nothing to train on"),
        ([concept("a", 0)], "nothing to train on"),
        ([concept("a", 2), concept("b", 0)], "nothing to train on"),
        ([concept("a", 2), concept("b", 2, size=(24, 16))], r"images of one size.*\(16, 16\), \(24, 16\)"),
        ([concept("a", 2), concept("b", 2, target=photos(2, (16, 24), 0))], "b: 2 ids, sources .* do not pair up"),
        ([concept("a", 2, target=photos(3, (16, 16), 0))], "do not pair up"),
        ([concept("a", 2, ids=("only",))], "a: 1 ids, sources .* do not pair up"),
        ([concept("a", 2, source=SQUARES.float())], r"a: source images must be uint8 .* not torch\.float32"),
        ([concept("a", 2, target=torch.full((2, 3, 16, 16), float("nan")))], "a: target images must be uint8"),
        ([concept("a", 2, source=SQUARES[:, :1])], r"a: source images must be uint8 \[n, 3, h, w\].*\[2, 1, 16, 16\]"),
        ([concept("a", 2, source=SQUARES[0])], "a: source images must be uint8"),
        ([concept("a", 2), concept("b", 2, source=flat((7, 7, 7)))], "b: the source image of 'b1' is one flat colour"),
        ([concept("a", 2, target=flat((255, 0, 0)))], r"a: the target image of 'a1' is one flat colour \(1 such\)"),
    ],
)
def test_unfit_pairs_are_refused(given_: list[ConceptPairs], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        batches(given_)


def test_an_image_of_one_flat_channel_is_no_flat_image() -> None:
    images = SQUARES.clone()
    images[:, 0] = 255
    batches([concept("a", 2, source=images)])


@pytest.mark.parametrize("side", [8, 12, 20, 28])
def test_sides_must_be_multiples_of_8(side: int) -> None:
    for size in ((side, 16), (16, side)):
        with pytest.raises(ValueError, match=r"multiples of 8 and at least 16, not \(\d+, \d+\)"):
            batches([concept("a", 2, size=size)])


def test_the_discriminator_needs_24() -> None:
    for side, crop in ((16, None), (32, 16)):
        with pytest.raises(ValueError, match="multiples of 8 and at least 24"):
            batches([concept("a", 2, size=(side, side))], crop=crop, adversarial_weight=1.0)
        batches([concept("a", 2, size=(side, side))], crop=crop)
    batches([concept("a", 2, size=(24, 24))], adversarial_weight=1.0)


def test_a_crop_must_fit_into_the_images() -> None:
    with pytest.raises(ValueError, match="crop 24 is larger than the images, 16x32"):
        batches([concept("a", 2, size=(16, 32))], crop=24)
    assert batches([concept("a", 2, size=(16, 30))], crop=16)(0).source.shape == (2, 3, 16, 16)  # 30 may be: it is cut


def test_a_batch_has_at_most_an_epochs_pairs() -> None:
    with pytest.raises(ValueError, match="batch_size 7 is more than the 6 pairs of an epoch"):
        batches(concepts([3, 1]), batch_size=7)
    assert sorted(batches(concepts([3, 1]), batch_size=6).picks(0)[1].tolist()) == [0, 1, 2, 3, 3, 3]


def test_prompts_embedded_unlike() -> None:
    first, second = concepts([2, 2])
    with pytest.raises(ValueError, match="embedded alike"):
        batches([first, dataclasses.replace(second, text=second.text[:1])])
