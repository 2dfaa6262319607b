import dataclasses
import os
import pickle
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from math import cos, pi
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from e2gan.batches import Batches, ConceptPairs
from e2gan.checkpoint import CheckpointFolder
from e2gan.config import GeneratorConfig, TrainConfig
from e2gan.lora import crucial_layers, new_adapter
from e2gan.lora_attach import attach, extract
from e2gan.model import Generator, build_discriminator, build_generator, part_of
from e2gan.pairs import Pairs, to_unit
from e2gan.train import DivergedError, Progress, Stopped, rate_factor, total_steps, train, uses_bf16
from e2gan.weights import load_weights, save_weights

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


def branched() -> Generator:
    generator = base()
    attach(generator, new_adapter(generator, {"stem": 1, "up1": 2, "head": 1}, seed=0), space="branches")
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


GAN = {"adversarial_weight": 1.0, "epochs": 2, "checkpoint_every": 1}
RUNS: dict[str, TrainConfig] = {
    "lsgan, flip, late start": config(**{**GAN, "epochs": 3}, adversarial_start=0.5, flip=True, schedule="cosine"),
    "hinge, own discriminator rate, every second step": config(
        **{**GAN, "checkpoint_every": 2},
        adversarial_loss="hinge",
        discriminator_learning_rate=5e-4,
    ),
    "vanilla, crop, constant rate": config(**GAN, adversarial_loss="vanilla", crop=24, flip=True, schedule="constant"),
    "without discriminator": config(epochs=2, checkpoint_every=1),
    "adamw": config(**GAN, optimizer="adamw", weight_decay=0.1),
    "averaged": config(**GAN, ema_decay=0.9),
    "clipped": config(**GAN, max_gradient_norm=0.05, gradient_weight=10.0),
    "bf16": config(**GAN, precision="bf16"),
    "frozen": config(**GAN, frozen=("sampling", "residual")),
    "channels last, all at once": config(
        **GAN,
        channels_last=True,
        optimizer="adamw",
        weight_decay=0.1,
        ema_decay=0.9,
        max_gradient_norm=0.05,
        precision="bf16",
        crop=24,
        flip=True,
        frozen=("residual",),
    ),
}


@pytest.mark.parametrize(
    ("run", "make"),
    [(run, base) for run in RUNS]
    + [(run, make) for run in ("without discriminator", "channels last, all at once") for make in (adapted, branched)],
)
def test_interrupted_at_every_checkpoint_equals_uninterrupted(run: str, make: Callable[[], Generator]) -> None:
    settings_, concepts = RUNS[run], [concept("a", 4, side=32), concept("b", 2, side=32, seed=1)]
    checkpoints: dict[int, bytes] = {}
    whole = make()
    losses = train(whole, concepts, settings_, seed=7, on_checkpoint=checkpoints.__setitem__, progress_every=1)
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
        assert_same(whole, resumed)
        assert again == losses


def assert_same(one: Generator, other: Generator) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


@pytest.mark.parametrize("run", ["lsgan, flip, late start", "hinge, own discriminator rate, every second step"])
def test_stopped_at_every_report_and_resumed_equals_undisturbed(run: str) -> None:
    settings_, concepts = RUNS[run], [concept("a", 4, side=32), concept("b", 2, side=32, seed=1)]
    steps, every = total_steps(settings_, 8), settings_.checkpoint_every
    whole = base()
    curve: list[Progress] = []
    train(whole, concepts, settings_, seed=7, on_progress=curve.append, progress_every=3)
    reports = [step for step in range(1, steps) if step % 3 == 0 or step % every == 0]
    assert [done.step for done in curve] == [*reports, steps]
    for stop in reports:
        asked: list[int] = []
        saved: dict[int, bytes] = {}
        seen: list[Progress] = []

        def should_stop(stop: int = stop, asked: list[int] = asked, seen: list[Progress] = seen) -> bool:
            asked.append(reports[len(seen)])
            return asked[-1] == stop

        def go(
            generator: Generator,
            checkpoint: bytes | None = None,
            ask: Callable[[], bool] | None = None,
            saved: dict[int, bytes] = saved,
            seen: list[Progress] = seen,
        ) -> None:
            train(
                generator,
                concepts,
                settings_,
                seed=7,
                checkpoint=checkpoint,
                on_checkpoint=saved.__setitem__,
                on_progress=seen.append,
                should_stop=ask,
                progress_every=3,
            )

        with pytest.raises(Stopped, match=f"^stopped after step {stop}$") as caught:
            go(base(), ask=should_stop)
        assert caught.value.step == pickle.loads(pickle.dumps(caught.value)).step == stop
        assert asked == [step for step in reports if step <= stop]
        assert list(saved) == sorted({stop, *range(every, stop, every)}), "saved once, and no step after it"
        resumed = base()
        go(resumed, saved[stop])
        assert_same(resumed, whole)
        assert seen == curve


def test_the_last_step_is_not_stopped_at_and_without_checkpoints_it_is_just_left() -> None:
    asked: list[bool] = []
    train(base(), [concept("a", 3)], config(), seed=7, should_stop=lambda: asked.append(True) or True)
    assert asked == []
    with pytest.raises(Stopped, match="step 1"):
        train(base(), [concept("a", 6)], config(checkpoint_every=1), seed=7, should_stop=lambda: True)


def test_a_weight_that_is_not_finite_is_not_saved_when_stopped() -> None:
    saved: list[int] = []
    with pytest.raises(DivergedError, match=r"by step 3 of 10: a weight of the generator .*no checkpoint yet"):
        train(
            Breaks(3),
            [concept("a", 3)],
            config(epochs=10),
            seed=7,
            on_checkpoint=lambda step, _: saved.append(step),
            should_stop=lambda: True,
            progress_every=3,
        )
    assert saved == []


def in_a_folder(path: str, *, killed_at: int | None = None) -> Generator:
    """Train with a folder of checkpoints, from its latest one, killing this process in the middle of a save."""
    folder, generator = CheckpointFolder(path), base()

    def save(step: int, checkpoint: bytes) -> None:
        if step == killed_at:
            (folder.path / f"{step:08d}.partial").write_bytes(checkpoint[: len(checkpoint) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        folder.save(step, checkpoint)

    pairs = [concept("a", 4), concept("b", 2, seed=1)]
    run = RUNS["lsgan, flip, late start"]
    train(generator, pairs, run, seed=7, on_checkpoint=save, checkpoint=folder.latest())
    return generator


def test_a_process_killed_while_it_saves_goes_on_where_it_was(tmp_path: Path) -> None:
    code = (
        f"import torch, test_train; torch.set_num_threads({torch.get_num_threads()}); "
        f"test_train.in_a_folder({str(tmp_path)!r}, killed_at=5)"
    )
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parents[1])])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, check=False)
    assert done.returncode == -signal.SIGKILL
    names = ["00000003.safetensors", "00000004.safetensors", "00000005.partial"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    resumed = in_a_folder(str(tmp_path))
    assert_same(resumed, in_a_folder(str(tmp_path / "another")))


class OneLayer(Generator):
    """One convolution: little to compile."""

    def __init__(self) -> None:
        super().__init__(TINY)
        self.load_state_dict(base().state_dict())
        self.requires_grad_(False)
        self.head = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        nn.init.constant_(self.head.weight, 0.1)

    def forward(self, images: Tensor, text: Tensor | None = None) -> Tensor:
        return torch.tanh(self.head(images))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a processor needs g++")
def test_compiled_training_is_close_to_eager_and_resumes_exactly() -> None:
    """Some 20 seconds of compiling where nothing is cached."""
    check_compiled(OneLayer, config(epochs=3, batch_size=2, checkpoint_every=3))


def test_what_the_compiler_traces_is_the_same_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter and the discriminator, traced and differentiated as for compiling, but run without it."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))

    def make() -> Generator:
        shape = dataclasses.replace(TINY, residual_blocks=0, transformer_blocks=0)
        generator = build_generator(shape, seed=0)
        attach(generator, new_adapter(generator, {"stem": 1, "up1": 2}, seed=0))
        return generator

    check_compiled(make, config(epochs=3, batch_size=2, checkpoint_every=3, adversarial_weight=1.0, ema_decay=0.9))


def check_compiled(make: Callable[[], Generator], run: TrainConfig) -> None:
    curves: dict[str, list[float]] = {}

    def trained(name: str, run: TrainConfig, checkpoint: bytes | None = None) -> tuple[Generator, dict[int, bytes]]:
        generator, checkpoints = make(), {}
        train(
            generator,
            [concept("a", 4)],
            run,
            seed=0,
            checkpoint=checkpoint,
            on_checkpoint=checkpoints.__setitem__,
            on_progress=lambda done: curves.setdefault(name, []).append(done.losses["l1"]),
            progress_every=1,
        )
        return generator, checkpoints

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own, which change from version to version
        compiled = dataclasses.replace(run, compile=True)
        whole, checkpoints = trained("compiled", compiled)
        resumed, _ = trained("resumed", compiled, checkpoints[3])
    trained("eager", run)
    assert curves["compiled"] == pytest.approx(curves["eager"], rel=1e-3)
    assert curves["resumed"] == curves["compiled"][3:]
    assert_same(resumed, whole)


def test_killed_at_each_checkpoint_in_turn() -> None:
    settings_, concepts = RUNS["lsgan, flip, late start"], [concept("a", 4), concept("b", 2, seed=1)]
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
    assert_same(whole, generator)


def test_a_run_depends_on_its_seed_alone() -> None:
    def weights(seed: int, global_seed: int) -> Tensor:
        torch.manual_seed(global_seed)
        generator = base()
        train(generator, [concept("a", 6)], RUNS["lsgan, flip, late start"], seed=seed)
        return torch.cat([p.detach().flatten() for p in generator.parameters()])

    assert torch.equal(weights(1, 1), weights(1, 2))
    assert not torch.equal(weights(1, 1), weights(2, 1))


def checkpoint_of(
    settings_: TrainConfig, concepts: Sequence[ConceptPairs], make: Callable[[], Generator] = base
) -> bytes:
    found: dict[int, bytes] = {}
    train(make(), concepts, settings_, seed=7, on_checkpoint=found.__setitem__)
    return found[1]


def test_a_checkpoint_of_another_run_is_refused_and_changes_nothing() -> None:
    concepts, settings_ = [concept("a", 6)], config(checkpoint_every=1, adversarial_weight=1.0)
    checkpoint = checkpoint_of(settings_, concepts)
    train(base(), concepts, settings_, seed=7, checkpoint=checkpoint)
    train(base(), concepts, dataclasses.replace(settings_, checkpoint_every=5), seed=7, checkpoint=checkpoint)

    def shaped(**changes: Any) -> Callable[[], Generator]:
        return lambda: build_generator(dataclasses.replace(TINY, **changes), seed=0)

    for others, run, seed, make in (
        (concepts, settings_, 8, base),
        (concepts, dataclasses.replace(settings_, learning_rate=2e-3), 7, base),
        (concepts, dataclasses.replace(settings_, epochs=2), 7, base),
        (concepts, dataclasses.replace(settings_, adversarial_weight=0.0), 7, base),
        (concepts, dataclasses.replace(settings_, ema_decay=0.9), 7, base),
        ([concept("b", 6)], settings_, 7, base),
        ([concept("a", 9)], settings_, 7, base),
        (concepts, settings_, 7, adapted),
        (concepts, settings_, 7, branched),
        (concepts, settings_, 7, shaped(channels=8)),
        (concepts, settings_, 7, shaped(transformer_blocks=0)),
        (concepts, settings_, 7, shaped(transformer_position=1)),
        (concepts, settings_, 7, shaped(heads=1)),
    ):
        generator = make()
        with pytest.raises(ValueError, match="this checkpoint belongs to another"):
            train(generator, others, run, seed=seed, checkpoint=checkpoint)
        assert_same(generator, make())


def test_an_adapter_of_more_layers_is_another_network() -> None:
    checkpoint = checkpoint_of(config(checkpoint_every=1), [concept("a", 6)], adapted)
    generator = base()
    attach(generator, new_adapter(generator, {"stem": 1}, seed=0))
    with pytest.raises(ValueError, match="this checkpoint belongs to another network"):
        train(generator, [concept("a", 6)], config(checkpoint_every=1), seed=7, checkpoint=checkpoint)


def test_what_is_no_checkpoint_is_refused_and_changes_nothing() -> None:
    settings_, concepts = config(checkpoint_every=1), [concept("a", 6)]
    checkpoint = checkpoint_of(settings_, concepts)
    tampered = bytearray(checkpoint)
    tampered[-5] ^= 1
    shrunk = load_weights(checkpoint)
    shrunk[0]["generator/head.bias/exp_avg"] = torch.zeros(2)
    foreign = [save({"a": torch.zeros(2)}), save({"a": torch.zeros(2)}, {"format": "pt"})]
    ours = [save_weights({"a": torch.zeros(2)}), save_weights(shrunk[0], **shrunk[1])]
    for data in (b"", b"garbage", bytes(64), checkpoint[:100], checkpoint[:-1], bytes(tampered), *foreign, *ours):
        generator = base()
        with pytest.raises(ValueError, match=r"not a whole safetensors|changed after|not a training|another network"):
            train(generator, concepts, settings_, seed=7, checkpoint=data)
        assert_same(generator, base())


# Steps and the data of each


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
        (True, config(epochs=4, checkpoint_every=2)),
    ],
)
def test_divergence_names_the_step(broken: bool, run: TrainConfig) -> None:
    given_ = concept("a", 3)
    if broken:
        given_ = dataclasses.replace(given_, text=torch.full((3, 5), float("nan")))
    saved: list[int] = []
    sentence = r"by step [1-4] of 4: loss \w+ is not finite \(there is no checkpoint yet\); lower learning_rate"
    with pytest.raises(DivergedError, match=sentence):
        train(base(), [given_], run, seed=0, on_checkpoint=lambda step, _: saved.append(step))
    assert issubclass(DivergedError, ValueError)
    assert saved == []


class Breaks(Echo):
    """Its one weight becomes NaN in the update of a step whose losses are all finite."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.gain.register_hook(lambda g: g * float("nan") if len(self.gains) == step else g)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_broken_weight_is_never_saved(ema_decay: float) -> None:
    run = config(epochs=10, checkpoint_every=2, ema_decay=ema_decay)
    saved: dict[int, bytes] = {}
    sentence = r"by step 6 of 10: a weight of the generator is not finite \(the last good checkpoint is step 4\)"
    with pytest.raises(DivergedError, match=sentence):
        train(Breaks(6), [concept("a", 3)], run, seed=7, on_checkpoint=saved.__setitem__)
    assert list(saved) == [2, 4]
    assert all(t.isfinite().all() for checkpoint in saved.values() for t in load_weights(checkpoint)[0].values())
    with pytest.raises(DivergedError, match=r"by step 8 of 10: loss l1 .*the last good checkpoint is step 6"):
        # Resumed, it breaks at its third own step, between two checkpoints: the next loss tells.
        train(Breaks(3), [concept("a", 3)], run, seed=7, checkpoint=saved[4], on_checkpoint=saved.__setitem__)
    assert list(saved) == [2, 4, 6]


def test_a_weight_that_breaks_in_the_last_step_is_noticed() -> None:
    with pytest.raises(DivergedError, match=r"by step 3 of 3: a weight of the generator .*no checkpoint yet"):
        train(Breaks(3), [concept("a", 3)], config(epochs=3), seed=7)


def test_unfit_pairs_change_nothing() -> None:
    for concepts in ([], [concept("a", 2)], [concept("a", 3, side=20)], [concept("a", 3, edit=torch.zeros_like)]):
        generator = base()
        with pytest.raises(ValueError, match=r"nothing to train on|batch_size 3|multiples of 8|flat colour"):
            train(generator, concepts, config(), seed=0)
        assert_same(generator, base())


# One step by hand


def by_hand(generator: Generator, pairs: list[ConceptPairs], run: TrainConfig, seed: int) -> list[dict[str, Tensor]]:
    """Train with equation 1 written out; returns the weights before every step and at the end."""
    batches = Batches(pairs, run, seed=seed, device="cpu")
    judge = build_discriminator(run.discriminator_channels, seed=seed)

    def optimizer(module: nn.Module) -> torch.optim.Optimizer:
        kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        return kinds[run.optimizer](
            module.parameters(), lr=run.learning_rate, betas=run.betas, weight_decay=run.weight_decay, foreach=False
        )

    def update(of: torch.optim.Optimizer, module: nn.Module, loss: Tensor) -> None:
        module.zero_grad()
        loss.backward()
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        if run.max_gradient_norm is not None:
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            for g in gradients:
                g.mul_(min(1.0, run.max_gradient_norm / norm.item()))
        of.step()

    def weights() -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in generator.named_parameters()}

    ours, theirs = optimizer(generator), optimizer(judge)
    trail = [weights()]
    for step in range(total_steps(run, batches.epoch_length)):
        batch = batches(step)
        edited = generator(batch.source, batch.text)
        loss = run.l1_weight * (edited - batch.target).abs().mean()
        if run.adversarial_weight:
            real, fake = judge(batch.source, batch.target), judge(batch.source, edited.detach())
            update(theirs, judge, 0.5 * ((real - 1).square().mean() + fake.square().mean()))
            loss = loss + run.adversarial_weight * (judge(batch.source, edited) - 1).square().mean()
        update(ours, generator, loss)
        trail.append(weights())
    return trail


BY_HAND: dict[str, TrainConfig] = {
    "adam": config(),
    "adamw": config(optimizer="adamw", weight_decay=0.5),
    "clipped": config(max_gradient_norm=1.0),
    "adversarial": config(adversarial_weight=1.0, l1_weight=1.0),
    "clipped, adversarial, adamw": config(
        optimizer="adamw", weight_decay=0.5, max_gradient_norm=0.1, adversarial_weight=1.0
    ),
}


@pytest.mark.parametrize("run", BY_HAND)
def test_training_by_hand(run: str) -> None:
    settings_ = dataclasses.replace(BY_HAND[run], epochs=3, schedule="constant")
    pairs, generator, other = [concept("a", 6)], base(), base()
    train(generator, pairs, settings_, seed=3)
    trail = by_hand(other, pairs, settings_, seed=3)
    assert len(trail) == 7
    trained, expected = dict(generator.named_parameters()), trail[-1]
    for name, weight in expected.items():
        if not before_a_norm(name):
            torch.testing.assert_close(trained[name].detach(), weight, atol=3e-4, rtol=0, msg=name)
    moved = max((expected[name] - trail[0][name]).abs().max().item() for name in expected)
    assert moved > 5e-3


def before_a_norm(name: str) -> bool:
    """Biases that an instance norm takes away again: their gradient is rounding noise, which Adam blows up."""
    return name.endswith(".bias") and name.split(".")[-2] in (
        *("stem", "down1", "down2", "up1", "up2", "down", "up", "conv1", "conv2"),
    )


def test_clipping_and_decay_matter() -> None:
    """Else the comparisons by hand would show nothing."""

    def weights(run: str) -> Tensor:
        generator = base()
        train(generator, [concept("a", 6)], dataclasses.replace(BY_HAND[run], epochs=3), seed=3)
        return torch.cat([p.detach().flatten() for p in generator.parameters()])

    plain = weights("adam")
    assert (weights("clipped") - plain).abs().max() > 1e-3
    assert (weights("adamw") - plain).abs().max() > 1e-3


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_averaged_weights_by_hand(decay: float) -> None:
    """The average starts at the first weights; the weights it follows are those of a run without it."""
    pairs, run = [concept("a", 6)], config(epochs=3, checkpoint_every=1, adversarial_weight=1.0)
    plain, trail = base(), []
    average = {name: p.detach().double() for name, p in base().named_parameters()}
    train(plain, pairs, run, seed=3, on_checkpoint=lambda _, data: trail.append(load_weights(data)[0]))
    trail.append({f"generator/{name}": p.detach() for name, p in plain.named_parameters()})
    assert len(trail) == 6
    for weights in trail:
        average = {name: decay * a + (1 - decay) * weights[f"generator/{name}"] for name, a in average.items()}
    averaged = base()
    train(averaged, pairs, dataclasses.replace(run, ema_decay=decay), seed=3)
    for name, p in averaged.named_parameters():
        torch.testing.assert_close(p.detach().double(), average[name], atol=1e-6, rtol=0, msg=name)
        assert not torch.equal(p, dict(plain.named_parameters())[name]), name


@pytest.mark.parametrize("frozen", [("sampling",), ("transformer",), ("residual",), ("sampling", "residual")])
def test_frozen_parts_stay_and_the_others_move(frozen: Any) -> None:
    generator, before = base(), dict(base().named_parameters())
    run = config(epochs=2, frozen=frozen, optimizer="adamw", weight_decay=0.1, ema_decay=0.5, adversarial_weight=1.0)
    train(generator, [concept("a", 6)], run, seed=0)
    for name, weight in generator.named_parameters():
        assert torch.equal(weight, before[name]) == (part_of(name) in frozen), name


def test_a_frozen_part_of_an_adapter_stays() -> None:
    generator, before = adapted(), extract(adapted()).tensors
    train(generator, [concept("a", 6)], config(epochs=3, frozen=("sampling",)), seed=0)
    for name, tensor in extract(generator).tensors.items():
        assert torch.equal(tensor, before[name]) == (part_of(name) == "sampling"), name


def test_freezing_all_there_is_is_refused() -> None:
    bare = build_generator(GeneratorConfig(channels=2, transformer_blocks=0), seed=0)
    with pytest.raises(ValueError, match="nothing is left to train"):
        train(bare, [concept("a", 3)], config(frozen=("sampling", "residual")), seed=0)


# Samples


@pytest.mark.parametrize("run", [config(epochs=4), RUNS["averaged"], RUNS["vanilla, crop, constant rate"]])
def test_samples_are_the_first_batch_as_edited_now(run: TrainConfig) -> None:
    pairs, generator = [concept("a", 4, side=32), concept("b", 2, side=32, seed=1)], base()
    samples: dict[int, Tensor] = {}
    train(generator, pairs, run, seed=5, on_samples=samples.__setitem__, samples_every=2)
    steps = total_steps(run, 8)
    assert list(samples) == [*range(2, steps, 2), steps]
    first, side = Batches(pairs, run, seed=5, device="cpu")(0), run.crop or 32
    for images in samples.values():
        assert (images.shape, images.dtype, images.device.type) == ((3, 3, 3, side, side), torch.uint8, "cpu")
        assert torch.equal(to_unit(images[0]), first.source)
        assert torch.equal(to_unit(images[1]), first.target)
    with torch.no_grad():
        edited = generator(first.source, first.text)
    assert (to_unit(samples[steps][2]) - edited).abs().max() <= 1.01 / 255  # rounded to a byte, else the same
    assert not torch.equal(samples[2][2], samples[steps][2])


@pytest.mark.parametrize("make", [base, adapted])
def test_asking_for_samples_does_not_change_the_training(make: Callable[[], Generator]) -> None:
    run = dataclasses.replace(RUNS["channels last, all at once"], adversarial_start=0.5)
    pairs = [concept("a", 4, side=32), concept("b", 2, side=32, seed=1)]
    plain, sampled = make(), make()
    checkpoints: list[bytes] = []
    others: list[bytes] = []
    train(plain, pairs, run, seed=5, on_checkpoint=lambda _, data: checkpoints.append(data))
    train(
        sampled,
        pairs,
        run,
        seed=5,
        on_checkpoint=lambda _, data: others.append(data),
        on_samples=lambda *_: None,
        samples_every=1,
    )
    assert_same(plain, sampled)
    assert checkpoints == others


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


def test_a_batch_is_shared_by_all_workers() -> None:
    with pytest.raises(ValueError, match="batch_size 1 leaves some of 2 workers"):
        train(base(), [concept("a", 4)], config(batch_size=1), seed=0, worker=(0, 2))


# Several workers

SHARED = config(
    batch_size=7,
    epochs=1.5,
    adversarial_weight=1.0,
    gradient_weight=1.0,
    max_gradient_norm=0.5,
    ema_decay=0.5,
    checkpoint_every=1,
)


def as_worker(rank: int, world: int, folder: str) -> None:
    """Train as one of several processes; leaves its curve and its checkpoints."""
    torch.set_num_threads(1)
    address = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    trained = trained_on_two(data_parallel=nn.parallel.DistributedDataParallel, worker=(rank, world))
    torch.save(trained, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def trained_on_two(**parallel: Any) -> tuple[list[Progress], dict[int, bytes]]:
    curve: list[Progress] = []
    saved: dict[int, bytes] = {}
    concepts = [concept("a", 14, side=32), concept("b", 9, side=32, seed=1)]
    report = {"on_progress": curve.append, "on_checkpoint": saved.__setitem__, "progress_every": 1}
    train(base(), concepts, SHARED, seed=7, **report, **parallel)
    return curve, saved


def first_gradient(checkpoint: bytes, network: str) -> Tensor:
    """Half of it, Adam's first moment after one step."""
    tensors, _ = load_weights(checkpoint)
    names = [name for name in sorted(tensors) if name.startswith(network) and name.endswith("/exp_avg")]
    return torch.cat([tensors[name].flatten() for name in names])


def test_workers_with_uneven_shares_train_as_one(tmp_path: Path) -> None:
    """Of a batch of 7 they take 3, 2 and 2: gradients of both networks and losses are the means over all 7."""
    torch.multiprocessing.spawn(as_worker, (3, str(tmp_path)), nprocs=3)
    workers = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(3)]
    assert workers[0] == workers[1] == workers[2], "the workers agree to the bit"
    (curve, saved), (alone, by_itself) = workers[0], trained_on_two()
    assert [done.step for done in curve] == [done.step for done in alone] == [1, 2, 3, 4, 5, 6]
    for network in ("generator", "discriminator"):
        shared, single = (first_gradient(made[1], network) for made in (saved, by_itself))
        assert (shared - single).norm() < 1e-5 * single.norm()
    # From one update to the next Adam blows the rounding up, some tenfold.
    for (done, reference), tolerance in zip(zip(curve, alone, strict=True), (1e-6, 1e-3, *[1e-2] * 4), strict=True):
        assert done.losses == pytest.approx(reference.losses, rel=tolerance)
