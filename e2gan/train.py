"""Training of a base or of an adapter: one function (equation 1; docs/method.md).

What trains is what requires a gradient: every weight of a base but the frozen parts, or the low-rank updates that
`e2gan.lora.attach` put on a frozen one. A checkpoint holds all that the next step depends on, and the data is a
function of seed and step alone, so an interrupted run that is resumed equals an uninterrupted one bit for bit on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from e2gan.batches import Batch, Batches, ConceptPairs
from e2gan.checkpoint import Network, pack, unpack
from e2gan.config import TrainConfig
from e2gan.losses import adversarial_loss, gradient_l1
from e2gan.model import Generator, build_discriminator, part_of
from e2gan.pairs import to_bytes


class DivergedError(ValueError):
    """A loss or a weight became NaN or infinite."""


class Stopped(Exception):  # noqa: N818 - it was asked to, which is no error
    """A training was asked to stop and did, after `step` steps, whose checkpoint `on_checkpoint` was given."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step

    def __str__(self) -> str:
        return f"stopped after step {self.step}"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What `on_progress` is told: the step just done, of how many, its learning rate, mean losses since last time."""

    step: int
    steps: int
    learning_rate: float
    losses: dict[str, float]


def total_steps(config: TrainConfig, pair_count: int) -> int:
    """Optimiser steps of a run: epochs over all pairs, batches running on across the end of an epoch."""
    return max(1, math.ceil(config.epochs * pair_count / config.batch_size))


def train(
    generator: Generator,
    concepts: Sequence[ConceptPairs],
    config: TrainConfig,
    *,
    seed: int,
    device: str | torch.device = "cpu",
    checkpoint: bytes | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_checkpoint: Callable[[int, bytes], None] | None = None,
    on_samples: Callable[[int, Tensor], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress_every: int = 20,
    samples_every: int = 500,
    data_parallel: Callable[[nn.Module], nn.Module] | None = None,
    worker: tuple[int, int] = (0, 1),
) -> dict[str, float]:
    """Train the generator in place and return the mean losses of the last steps.

    Args:
        checkpoint: bytes `on_checkpoint` was given in an earlier call with the same arguments; training goes on
            there.
        on_checkpoint: called with step and bytes every `config.checkpoint_every` steps.
        on_samples: called every `samples_every` steps, and at the end, with the step and uint8 images
            `[3, n, 3, h, w]` of the first batch: sources, targets, and the targets as the generator now makes them.
        should_stop: asked at every report but the last; when it says so, the checkpoint of that step is made and
            `Stopped` raised. All workers must be told the same.
        data_parallel: wraps a module so that gradients are averaged over workers (DistributedDataParallel, in the
            default process group); each of `worker` = (rank, world size) then takes its share of every batch. The
            training is that of one worker, up to rounding: gradients and losses are means over the whole batch.

    Raises:
        ValueError: unusable pairs (`e2gan.batches`); the generator is as it was.
        CheckpointError: a checkpoint of another run or a damaged one; the generator is as it was.
        DivergedError: a loss or weight is no longer finite; the sentence names the step and the last good checkpoint.
        Stopped: `should_stop` said so.
    """
    device = torch.device(device)
    rank, world = worker
    if config.batch_size < world:
        raise ValueError(f"batch_size {config.batch_size} leaves some of {world} workers without a pair: raise it")
    share = len(range(rank, config.batch_size, world)) / config.batch_size
    batches = Batches(concepts, config, seed=seed, device=device)
    steps = total_steps(config, batches.epoch_length)

    # Networks and optimisers.
    # Which layout trains faster: bench/train.py.
    channels_last = device.type == "cuda" if config.channels_last is None else config.channels_last
    layout = torch.channels_last if channels_last else torch.contiguous_format
    generator.to(device).to(memory_format=layout).train()
    for name, parameter in generator.named_parameters():
        if part_of(name) in config.frozen:
            parameter.requires_grad_(False)
    networks = {"generator": _network(generator, config, config.learning_rate, averaged=True)}
    adversarial = config.adversarial_weight > 0
    if adversarial:
        discriminator = build_discriminator(config.discriminator_channels, seed=seed)
        discriminator.to(device).to(memory_format=layout)
        rate = config.discriminator_learning_rate or config.learning_rate
        networks["discriminator"] = _network(discriminator, config, rate, averaged=False)
        gan = adversarial_loss(config.adversarial_loss)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(config, device))

    # Resume.
    identity = {
        "config": asdict(replace(config, checkpoint_every=1)),  # how often it is saved changes nothing
        "generator": asdict(generator.config),
        "seed": seed,
        "steps": steps,
        "concepts": [c.concept for c in concepts],
    }
    first_step = 0 if checkpoint is None else unpack(checkpoint, identity, networks)
    saved = first_step

    if config.compile:
        # Graphs of earlier trainings in this process count against a limit, past which nothing is compiled any more.
        torch.compiler.reset()

    def faster(module: nn.Module) -> nn.Module:
        return torch.compile(module, dynamic=False) if config.compile else module  # type: ignore[return-value]

    edit = faster(data_parallel(generator) if data_parallel else generator)
    if adversarial:
        judge = faster(data_parallel(discriminator) if data_parallel else discriminator)
        judge_edited = faster(discriminator)

    losses: dict[str, list[Tensor]] = {}
    means: dict[str, float] = {}
    for step in range(first_step, steps):
        for network in networks.values():
            for group in network.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate_factor(config, step / steps)

        batch = batches(step, worker=worker)
        source, wanted = (t.to(memory_format=layout) for t in (batch.source, batch.target))
        with autocast:
            edited = edit(source, batch.text)
        edited = edited.float()
        now: dict[str, Tensor] = {"l1": (edited - wanted).abs().mean()}
        loss = config.l1_weight * now["l1"]
        if config.gradient_weight:
            now["gradient"] = gradient_l1(edited, wanted)
            loss = loss + config.gradient_weight * now["gradient"]

        if adversarial and step >= config.adversarial_start * steps:
            # Discriminator: real pairs against edited ones.
            with autocast:
                logits = judge(source.repeat(2, 1, 1, 1), torch.cat([wanted, edited.detach()]))
            real, fake = logits.float().chunk(2)
            now["discriminator"] = gan.discriminator(real, fake)
            _update(networks["discriminator"], world * share * now["discriminator"], config)
            # Generator against the discriminator just updated.
            discriminator.requires_grad_(False)
            with autocast:
                fake = judge_edited(source, edited)
            discriminator.requires_grad_(True)
            now["adversarial"] = gan.generator(fake.float())
            loss = loss + config.adversarial_weight * now["adversarial"]

        # The mean over workers that DDP takes of gradients then is the mean over the batch, whoever has a pair more.
        _update(networks["generator"], world * share * loss, config)

        # Report and checkpoint: the only places where the host waits for the device.
        for name, value in now.items():
            losses.setdefault(name, []).append(value.detach())
        done = step + 1
        stop = save = False
        if done % progress_every == 0 or done == steps or done % config.checkpoint_every == 0:
            stop = should_stop is not None and done < steps and should_stop()
            save = on_checkpoint is not None and done < steps and (stop or done % config.checkpoint_every == 0)
            means = _means(losses, share if data_parallel else None)
            losses = {}
            _check_finite(means, networks if save or done == steps else {}, done, steps, saved)
            if on_progress:
                rate = networks["generator"].optimizer.param_groups[0]["lr"]
                on_progress(Progress(step=done, steps=steps, learning_rate=rate, losses=means))
        if save:
            assert on_checkpoint is not None
            on_checkpoint(done, pack(done, identity, networks))
            saved = done
        if on_samples and (done % samples_every == 0 or done == steps):
            on_samples(done, _samples(generator, networks["generator"], batches(0), autocast))
        if stop:
            raise Stopped(done)

    _swap_averages(networks["generator"])
    generator.eval()
    return means


def uses_bf16(config: TrainConfig, device: torch.device) -> bool:
    """Whether forward passes run in bf16 autocast: asked for, or `auto` on a device that computes in bf16."""
    if config.precision != "auto":
        return config.precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def rate_factor(config: TrainConfig, done: float) -> float:
    """Learning rate over its initial value when the fraction `done` (0..1) of the run is over."""
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "linear":
        return min(1.0, 2 * (1 - done))
    return 0.5 * (1 + math.cos(math.pi * done))


def _network(module: nn.Module, config: TrainConfig, rate: float, *, averaged: bool) -> Network:
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(f"nothing is left to train: this generator has no part but {', '.join(config.frozen)}")
    settings: dict[str, Any] = {"lr": rate, "betas": config.betas, "fused": True}
    optimizer: torch.optim.Optimizer
    if config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters.values(), weight_decay=config.weight_decay, **settings)
    else:
        optimizer = torch.optim.Adam(parameters.values(), **settings)
    for group in optimizer.param_groups:
        group["initial_lr"] = rate
    averages = {name: p.detach().clone() for name, p in parameters.items()} if averaged and config.ema_decay else {}
    return Network(parameters=parameters, optimizer=optimizer, averages=averages)


def _update(network: Network, loss: Tensor, config: TrainConfig) -> None:
    """One step of a network's optimiser, and of the moving average of its weights."""
    network.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    weights = list(network.parameters.values())
    if config.max_gradient_norm is not None:
        torch.nn.utils.clip_grad_norm_(weights, config.max_gradient_norm)
    network.optimizer.step()
    if network.averages:
        with torch.no_grad():
            average = get_ema_multi_avg_fn(config.ema_decay)  # type: ignore[no-untyped-call]
            average(list(network.averages.values()), weights, 0)


def _means(losses: dict[str, list[Tensor]], share: float | None) -> dict[str, float]:
    """Mean losses over the steps since last time, and over all workers where each has a share of the batch."""
    means = torch.stack([torch.stack(values).mean() for values in losses.values()])
    if share is not None:
        means *= share
        torch.distributed.all_reduce(means)
    return dict(zip(losses, means.tolist(), strict=True))


@torch.no_grad()
def _swap_averages(network: Network) -> None:
    """Exchange trained weights and their moving averages, where averages are kept."""
    for name, average in network.averages.items():
        parameter = network.parameters[name]
        now = parameter.detach().clone()
        parameter.copy_(average)
        average.copy_(now)


@torch.no_grad()
def _samples(generator: Generator, network: Network, batch: Batch, autocast: torch.autocast) -> Tensor:
    _swap_averages(network)
    with autocast:
        edited = generator(batch.source, batch.text)
    _swap_averages(network)
    return torch.stack([to_bytes(images).cpu() for images in (batch.source, batch.target, edited)])


def _check_finite(losses: dict[str, float], networks: dict[str, Network], step: int, steps: int, saved: int) -> None:
    """Losses at every report, weights before they are kept: a loss is of the weights one update earlier."""
    broken = [f"loss {name}" for name, value in losses.items() if not math.isfinite(value)]
    for name, network in networks.items():
        if not all(bool(p.isfinite().all()) for p in network.parameters.values()):
            broken.append(f"a weight of the {name}")
    if broken:
        last = f"the last good checkpoint is step {saved}" if saved else "there is no checkpoint yet"
        raise DivergedError(
            f"training diverged by step {step} of {steps}: {broken[0]} is not finite ({last}); lower learning_rate"
        )
