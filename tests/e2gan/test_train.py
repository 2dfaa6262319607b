import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from math import ceil, cos, pi
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from e2gan.config import GeneratorConfig, TrainConfig
from e2gan.lora import attach, crucial_layers, new_adapter
from e2gan.model import Generator, build_generator
from e2gan.pairs import Pairs, to_unit
from e2gan.train import ConceptPairs, DivergedError, Progress, _DataOrder, rate_factor, total_steps, train, uses_bf16

TINY = GeneratorConfig(channels=4, heads=2, text_tokens=3, text_width=5)
CPU = torch.device("cpu")


def noise_photos(n: int, side: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=random)


def concept(
    name: str, n: int, *, side: int = 24, seed: int = 0, edit: Callable[[Tensor], Tensor] = lambda x: 255 - x
) -> ConceptPairs:
    source = noise_photos(n, side, seed)
    text = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))
    pairs = Pairs(ids=tuple(f"{i}" for i in range(n)), source=source, target=edit(source))
    return ConceptPairs(concept=name, text=text, pairs=pairs)


def config(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "epochs": 1,
        "batch_size": 3,
        "learning_rate": 1e-3,
        "discriminator_channels": 2,
        "precision": "fp32",
        "adversarial_weight": 0.0,
    }
    return TrainConfig(**{**values, **changes})


def base() -> Generator:
    return build_generator(TINY, seed=0)


def adapted() -> Generator:
    generator = base()
    layers = crucial_layers(generator)
    attach(generator, new_adapter(generator, {name: 1 + i % 2 for i, name in enumerate(layers)}, seed=0))
    return generator


class Echo(Generator):
    """Returns its input times a trained number and keeps what it was given."""

    def __init__(self) -> None:
        super().__init__(TINY)
        self.requires_grad_(False)
        self.gain = nn.Parameter(torch.ones(1))
        self.photos: list[Tensor] = []
        self.texts: list[Tensor] = []
        self.gains: list[float] = []
        self.bf16: list[bool] = []

    def forward(self, images: Tensor, text: Tensor | None = None) -> Tensor:
        assert text is not None
        self.photos.append(images.clone())
        self.texts.append(text.clone())
        self.gains.append(self.gain.item())
        self.bf16.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16)
        return images * self.gain


# Interruption and resume


class KilledError(Exception):
    pass


RUNS: dict[str, TrainConfig] = {
    "adversarial, flip, late start": config(
        epochs=3, checkpoint_every=1, adversarial_weight=1.0, adversarial_start=0.5, flip=True, schedule="cosine"
    ),
    "hinge, own discriminator rate": config(
        epochs=2,
        checkpoint_every=2,
        adversarial_weight=0.3,
        adversarial_loss="hinge",
        discriminator_learning_rate=5e-4,
    ),
    "without discriminator": config(epochs=3, checkpoint_every=1),
}


@pytest.mark.parametrize("make", [base, adapted])
@pytest.mark.parametrize("run", RUNS)
def test_interrupted_at_every_checkpoint_equals_uninterrupted(run: str, make: Callable[[], Generator]) -> None:
    settings_, concepts = RUNS[run], [concept("a", 4), concept("b", 2, seed=1)]
    checkpoints: dict[int, bytes] = {}
    whole = make()
    losses = train(whole, concepts, settings_, seed=7, on_checkpoint=checkpoints.__setitem__)
    steps = total_steps(settings_, 8)
    every = settings_.checkpoint_every
    assert list(checkpoints) == list(range(every, steps, every))
    assert len(checkpoints) >= 2
    for step, checkpoint in checkpoints.items():
        resumed = make()
        seen: list[int] = []
        rewritten: dict[int, bytes] = {}
        again = train(
            resumed,
            concepts,
            settings_,
            seed=7,
            checkpoint=checkpoint,
            on_progress=lambda done, seen=seen: seen.append(done.step),  # type: ignore[misc]
            on_checkpoint=rewritten.__setitem__,
            progress_every=1,
        )
        assert seen == list(range(step + 1, steps + 1))
        assert rewritten == {s: c for s, c in checkpoints.items() if s > step}
        for name, weight in whole.state_dict().items():
            assert torch.equal(weight, resumed.state_dict()[name]), f"{name} differs after resuming at {step}"
        assert again["l1"] == pytest.approx(losses["l1"], rel=1e-6) or every > 1


def test_killed_at_each_checkpoint_in_turn() -> None:
    settings_, concepts = RUNS["adversarial, flip, late start"], [concept("a", 4), concept("b", 2, seed=1)]
    whole = base()
    train(whole, concepts, settings_, seed=7)
    last: bytes | None = None
    kills = 0

    def die(_step: int, checkpoint: bytes) -> None:
        nonlocal last
        last = checkpoint
        raise KilledError

    while True:
        generator = base()
        try:
            train(generator, concepts, settings_, seed=7, checkpoint=last, on_checkpoint=die)
        except KilledError:
            kills += 1
        else:
            break
    assert kills == total_steps(settings_, 8) - 1
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, generator.state_dict()[name]), name


def test_a_run_depends_on_its_seed_alone() -> None:
    def weights(seed: int, global_seed: int) -> Tensor:
        torch.manual_seed(global_seed)
        generator = base()
        train(generator, [concept("a", 6)], RUNS["adversarial, flip, late start"], seed=seed)
        return torch.cat([p.detach().flatten() for p in generator.parameters()])

    assert torch.equal(weights(1, 1), weights(1, 2))
    assert not torch.equal(weights(1, 1), weights(2, 1))


def checkpoint_of(
    settings_: TrainConfig, concepts: Sequence[ConceptPairs], make: Callable[[], Generator] = base
) -> bytes:
    found: dict[int, bytes] = {}
    train(make(), concepts, settings_, seed=7, on_checkpoint=found.__setitem__)
    return found[1]


def test_a_checkpoint_of_another_run_is_refused() -> None:
    concepts, settings_ = [concept("a", 6)], config(checkpoint_every=1)
    checkpoint = checkpoint_of(settings_, concepts)

    def resume(
        concepts: Sequence[ConceptPairs], settings_: TrainConfig, seed: int, make: Callable[[], Generator]
    ) -> None:
        train(make(), concepts, settings_, seed=seed, checkpoint=checkpoint)

    resume(concepts, settings_, 7, base)
    for others in (
        (concepts, settings_, 8, base),
        (concepts, dataclasses.replace(settings_, learning_rate=2e-3), 7, base),
        (concepts, dataclasses.replace(settings_, epochs=2), 7, base),
        ([concept("b", 6)], settings_, 7, base),
        ([concept("a", 9)], settings_, 7, base),
        (concepts, settings_, 7, adapted),
        (concepts, settings_, 7, lambda: build_generator(dataclasses.replace(TINY, channels=8), seed=0)),
    ):
        with pytest.raises(ValueError, match="this checkpoint belongs to another"):
            resume(*others)


def test_what_is_no_checkpoint_is_refused() -> None:
    from safetensors.torch import save

    settings_, concepts = config(checkpoint_every=1), [concept("a", 6)]
    checkpoint = checkpoint_of(settings_, concepts)
    foreign = [save({"a": torch.zeros(2)}), save({"a": torch.zeros(2)}, {"format": "pt"})]
    for data in (b"", b"garbage", bytes(64), checkpoint[:100], checkpoint[:-1], *foreign):
        with pytest.raises(ValueError, match="not a training checkpoint"):
            train(base(), concepts, settings_, seed=7, checkpoint=data)


# The order of the data


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 7), st.integers(0, 2**40))
def test_concepts_are_mixed_evenly(counts: list[int], batch_size: int, seed: int) -> None:
    order = _DataOrder(counts, seed)
    epochs = 3
    steps = ceil(epochs * order.epoch_length / batch_size)
    batches = [order.batch(step, batch_size) for step in range(steps)]
    picks = [(int(c), int(r)) for b in batches for c, r in zip(b[0], b[1], strict=True)]
    owner = [c for c, count in enumerate(counts) for _ in range(count)]
    assert all(owner[row] == c for c, row in picks)
    assert order.epoch_length == max(counts) * len(counts)
    for epoch in range(epochs):  # epochs run on across the ends of batches
        part = picks[epoch * order.epoch_length : (epoch + 1) * order.epoch_length]
        assert Counter(c for c, _ in part) == dict.fromkeys(range(len(counts)), max(counts))
        uses = Counter(row for _, row in part)
        for c in range(len(counts)):
            of_concept = [uses[row] for row, owned in enumerate(owner) if owned == c]
            assert max(of_concept) - min(of_concept) <= 1
    fresh = _DataOrder(counts, seed).batch(steps - 1, batch_size)
    assert all(torch.equal(a, b) for a, b in zip(fresh, batches[-1], strict=True))


def test_epochs_and_seeds_shuffle_differently() -> None:
    def epoch(seed: int, n: int) -> list[int]:
        rows: list[int] = _DataOrder([50], seed).batch(n, 50)[1].tolist()
        return rows

    orders = [epoch(0, 0), epoch(0, 1), epoch(1, 0)]
    assert all(sorted(rows) == list(range(50)) for rows in orders)
    assert len({tuple(rows) for rows in orders}) == 3


def test_half_of_the_pairs_are_mirrored_anew_each_time() -> None:
    order = _DataOrder([100], 0)
    drawn = torch.zeros(20, 100, dtype=torch.bool)
    for step in range(20):
        _, rows, mirror = order.batch(step, 100)
        drawn[step, rows] = mirror
    assert drawn.float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert drawn.any(0).all()
    assert not drawn.all(0).any()


@pytest.mark.parametrize(
    ("epochs", "pairs", "batch", "steps"), [(3, 5, 4, 4), (1, 32, 32, 1), (0.01, 5, 4, 1), (2.5, 4, 3, 4)]
)
def test_total_steps(epochs: float, pairs: int, batch: int, steps: int) -> None:
    assert total_steps(config(epochs=epochs, batch_size=batch), pairs) == steps
    done: list[Progress] = []
    train(
        Echo(),
        [concept("a", pairs)],
        config(epochs=epochs, batch_size=batch),
        seed=0,
        on_progress=done.append,
        progress_every=1,
    )
    assert [(p.step, p.steps) for p in done] == [(i + 1, steps) for i in range(steps)]


def find(photo: Tensor, photos: Tensor) -> int:
    """Which of the photos this is, -1 for none."""
    hits = (photos == photo).flatten(1).all(1).nonzero()
    return int(hits[0]) if len(hits) else -1


@pytest.mark.parametrize("flip", [True, False])
def test_flip_mirrors_source_and_target_alike(flip: bool) -> None:
    echo, pairs = Echo(), concept("a", 5, edit=lambda x: x.clone())
    losses: list[float] = []
    train(
        echo,
        [pairs],
        config(epochs=12, batch_size=5, flip=flip, learning_rate=1e-30),
        seed=0,
        on_progress=lambda done: losses.append(done.losses["l1"]),
        progress_every=1,
    )
    assert losses == [0.0] * 12  # noise mirrored on one side alone would be far off
    photos = to_unit(pairs.pairs.source)
    seen = Counter((find(p, photos), find(p, photos.flip(3))) for batch in echo.photos for p in batch)
    plain, mirrored = {(i, -1) for i in range(5)}, {(-1, i) for i in range(5)}
    assert seen.keys() == (plain | mirrored if flip else plain)


def test_each_pair_comes_with_its_concepts_text() -> None:
    echo, concepts = Echo(), [concept("a", 3), concept("b", 2, seed=1)]
    train(echo, concepts, config(epochs=2, batch_size=4), seed=0)
    for photos, texts in zip(echo.photos, echo.texts, strict=True):
        for photo, text in zip(photos, texts, strict=True):
            owner = [c for c in concepts if find(photo, to_unit(c.pairs.source)) >= 0]
            assert len(owner) == 1
            assert torch.equal(text, owner[0].text)


def test_workers_share_every_batch() -> None:
    alone, workers = Echo(), [Echo(), Echo()]
    settings_ = config(epochs=2, batch_size=4, flip=True, learning_rate=1e-30)
    train(alone, [concept("a", 8)], settings_, seed=0)
    for rank, echo in enumerate(workers):
        train(echo, [concept("a", 8)], settings_, seed=0, worker=(rank, 2))
    assert len(alone.photos) == 4
    for whole, first, second in zip(alone.photos, workers[0].photos, workers[1].photos, strict=True):
        assert torch.equal(whole[0::2], first)
        assert torch.equal(whole[1::2], second)


# Rates and precision

CLOSED_FORMS: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "linear": lambda t: 1.0 if t <= 0.5 else 2 - 2 * t,
    "cosine": lambda t: (1 + cos(pi * t)) / 2,
}


@pytest.mark.parametrize("schedule", CLOSED_FORMS)
def test_learning_rate_by_closed_form(schedule: Any) -> None:
    closed = CLOSED_FORMS[schedule]
    for i in range(101):
        assert rate_factor(config(schedule=schedule), i / 100) == pytest.approx(closed(i / 100), abs=1e-12)
    # Under a constant gradient every Adam step has the length of the rate.
    echo = Echo()
    run = config(epochs=8, batch_size=4, schedule=schedule, learning_rate=0.01)
    train(echo, [concept("a", 4)], run, seed=0)
    gains = [*echo.gains, echo.gain.item()]
    for step in range(8):
        assert gains[step] - gains[step + 1] == pytest.approx(0.01 * closed(step / 8), abs=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_switch(precision: Any) -> None:
    echo = Echo()
    train(echo, [concept("a", 3)], config(precision=precision), seed=0)
    assert echo.bf16 == [precision == "bf16"]
    generator = base()
    run = config(precision=precision, adversarial_weight=1.0)
    losses = train(generator, [concept("a", 3)], run, seed=0)
    assert losses.keys() == {"l1", "adversarial", "discriminator"}
    assert {p.dtype for p in generator.parameters()} == {torch.float32}


def test_auto_precision_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for able in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda able=able: able)
        assert uses_bf16(config(precision="auto"), CPU) == able
        assert uses_bf16(config(precision="bf16"), CPU)
        assert not uses_bf16(config(precision="fp32"), CPU)


# Losses, divergence, errors


def test_losses_are_means_since_the_last_report() -> None:
    run = config(epochs=6, batch_size=4, adversarial_weight=1.0, adversarial_start=0.5)
    single: list[Progress] = []
    double: list[Progress] = []
    train(base(), [concept("a", 4)], run, seed=0, on_progress=single.append, progress_every=1)
    train(base(), [concept("a", 4)], run, seed=0, on_progress=double.append, progress_every=2)
    assert [set(p.losses) for p in single] == [{"l1"}] * 3 + [{"l1", "discriminator", "adversarial"}] * 3
    for i, report in enumerate(double):
        first, second = single[2 * i].losses, single[2 * i + 1].losses
        for name, mean in report.losses.items():
            values = [losses[name] for losses in (first, second) if name in losses]
            assert mean == pytest.approx(sum(values) / len(values), rel=1e-5), (report.step, name)


@pytest.mark.parametrize(
    ("broken", "run"),
    [
        (False, config(epochs=4, learning_rate=1e30)),
        (False, config(epochs=4, learning_rate=1e30, adversarial_weight=1.0)),
        (True, config(epochs=4)),
    ],
)
def test_divergence_names_the_step(broken: bool, run: TrainConfig) -> None:
    given_ = concept("a", 3)
    if broken:
        given_ = dataclasses.replace(given_, text=torch.full((3, 5), float("nan")))
    saved: list[int] = []
    with pytest.raises(
        DivergedError, match=r"diverged by step [1-4] of 4: loss \w+ is not finite; lower learning_rate"
    ):
        train(base(), [given_], run, seed=0, on_checkpoint=lambda step, _: saved.append(step))
    assert issubclass(DivergedError, ValueError)
    assert saved == []


def test_no_checkpoint_of_a_diverged_run() -> None:
    given_ = dataclasses.replace(concept("a", 3), text=torch.full((3, 5), float("nan")))
    saved: list[int] = []
    with pytest.raises(DivergedError, match="step 2 of 4"):
        train(
            base(),
            [given_],
            config(epochs=4, checkpoint_every=2),
            seed=0,
            on_checkpoint=lambda step, _: saved.append(step),
        )
    assert saved == []


def test_unfit_pairs_are_refused() -> None:
    empty = ConceptPairs(concept="a", text=torch.zeros(3, 5), pairs=concept("a", 1).pairs)
    empty = dataclasses.replace(
        empty, pairs=Pairs(ids=(), source=empty.pairs.source[:0], target=empty.pairs.target[:0])
    )
    for concepts in ([], [empty], [concept("b", 2), empty]):
        with pytest.raises(ValueError, match="nothing to train on"):
            train(base(), concepts, config(), seed=0)
    with pytest.raises(ValueError, match="images of one size"):
        train(base(), [concept("a", 2), concept("b", 2, side=32)], config(), seed=0)
    for side, run in ((20, config()), (8, config()), (16, config(adversarial_weight=1.0))):
        with pytest.raises(ValueError, match=rf"multiples of 8 and at least \d+, not \({side}, {side}\)"):
            train(base(), [concept("a", 2, side=side)], run, seed=0)
    train(base(), [concept("a", 2, side=16)], config(), seed=0)
    train(base(), [concept("a", 2, side=24)], config(adversarial_weight=1.0), seed=0)


# Does it learn


def test_learns_an_inversion() -> None:
    generator = build_generator(dataclasses.replace(TINY, channels=8), seed=0)
    l1: list[float] = []
    train(
        generator,
        [concept("invert", 8, side=16)],
        config(epochs=60, batch_size=8, learning_rate=5e-3, schedule="constant"),
        seed=0,
        on_progress=lambda done: l1.append(done.losses["l1"]),
        progress_every=1,
    )
    assert l1[-1] < 0.5 * l1[0]
    assert not generator.training


def test_the_text_tells_two_concepts_apart() -> None:
    """The same photos darkened or lightened: only the prompt says which is wanted."""
    dark = concept("dark", 4, side=16, edit=lambda x: x // 8)
    light = concept("light", 4, side=16, edit=lambda x: 255 - x // 8)
    light = dataclasses.replace(light, text=-dark.text)
    generator = build_generator(dataclasses.replace(TINY, channels=8), seed=0)
    run = config(epochs=60, batch_size=8, learning_rate=5e-3, schedule="constant")
    train(generator, [dark, light], run, seed=0)
    with torch.no_grad():
        means = [generator(to_unit(dark.pairs.source), c.text[None]).mean().item() for c in (dark, light)]
    assert means[0] < -0.5
    assert means[1] > 0.5


def test_adversarial_training_moves_the_edits() -> None:
    """Without L1 the discriminator alone teaches: all targets are dark, so the edits darken."""
    generator, pairs = base(), concept("dark", 8, edit=lambda x: x // 8)
    run = config(
        epochs=60, batch_size=8, l1_weight=0.0, adversarial_weight=1.0, learning_rate=5e-3, discriminator_channels=4
    )
    train(generator, [pairs], run, seed=0)

    def mean(network: Generator) -> float:
        with torch.no_grad():
            return float(network(to_unit(pairs.pairs.source), pairs.text[None]).mean())

    assert mean(generator) < mean(base()) - 0.3


def test_an_adapter_learns_on_a_frozen_base() -> None:
    generator = adapted()
    l1: list[float] = []
    train(
        generator,
        [concept("dark", 8, side=16, edit=lambda x: x // 8)],
        config(epochs=60, batch_size=8, learning_rate=1e-2, schedule="constant"),
        seed=0,
        on_progress=lambda done: l1.append(done.losses["l1"]),
        progress_every=1,
    )
    assert l1[-1] < 0.7 * l1[0]
