"""Training of a base or of an adapter: one function (equation 1; docs/method.md).

What trains is what requires a gradient: every weight of a base, or the LoRA branches that `e2gan.lora.attach` put on a
frozen one. A checkpoint holds all that the next step depends on, and the order of the data is a function of seed and
step alone, so an interrupted run that is resumed equals an uninterrupted one bit for bit on a CPU.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from e2gan.config import TrainConfig
from e2gan.losses import adversarial_loss, gradient_l1
from e2gan.model import Generator, build_discriminator
from e2gan.pairs import Pairs, to_unit


class DivergedError(ValueError):
    """A loss became NaN or infinite."""


@dataclass(frozen=True, kw_only=True)
class ConceptPairs:
    """Training pairs of one concept with its prompt's embedding, float32 `[tokens, text_width]`."""

    concept: str
    text: Tensor
    pairs: Pairs


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What `on_progress` is told: the step just done, of how many, and mean losses since the last time."""

    step: int
    steps: int
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
    progress_every: int = 20,
    data_parallel: Callable[[nn.Module], nn.Module] | None = None,
    worker: tuple[int, int] = (0, 1),
) -> dict[str, float]:
    """Train the generator in place and return the mean losses of the last steps.

    Args:
        checkpoint: bytes `on_checkpoint` was given in an earlier call with the same arguments; training goes on
            there.
        on_checkpoint: called with step and bytes every `config.checkpoint_every` steps.
        data_parallel: wraps a module so that gradients are averaged over workers (DDP); each of `worker` =
            (rank, world size) then takes its share of every batch.

    Raises:
        ValueError: no pairs, images of unlike sizes or with sides that are not multiples of 8 (with a discriminator
            at least 24), a checkpoint of another run.
        DivergedError: a loss is no longer finite; the sentence names the step.
    """
    # Data: every image stays on the device as uint8; a batch is an indexed read without a host round trip.
    if not concepts or not all(len(c.pairs) for c in concepts):
        raise ValueError("nothing to train on: no concept was given, or one without pairs")
    shapes = {c.pairs.source.shape[1:] for c in concepts}
    if len(shapes) != 1:
        raise ValueError(f"all concepts must have images of one size, these have {sorted(map(tuple, shapes))}")
    adversarial = config.adversarial_weight > 0
    sides, smallest = shapes.pop()[1:], 24 if adversarial else 16
    if any(side % 8 or side < smallest for side in sides):
        raise ValueError(f"images must have sides that are multiples of 8 and at least {smallest}, not {tuple(sides)}")
    device = torch.device(device)
    source = torch.cat([c.pairs.source for c in concepts]).to(device)
    target = torch.cat([c.pairs.target for c in concepts]).to(device)
    text = torch.stack([c.text for c in concepts]).to(device)  # [concepts, tokens, width]
    order = _DataOrder([len(c.pairs) for c in concepts], seed)
    steps = total_steps(config, order.epoch_length)

    # Networks and optimisers.
    generator.to(device).train()
    # channels_last trains slower on the CPU: bench/train.py
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    generator.to(memory_format=layout)
    parameters = {name: p for name, p in generator.named_parameters() if p.requires_grad}
    assert parameters, "no weight of the generator requires a gradient"
    generator_optimizer = torch.optim.Adam(parameters.values(), config.learning_rate, config.betas, fused=True)
    networks: _Networks = {"generator": (parameters, generator_optimizer)}
    if adversarial:
        discriminator: nn.Module = build_discriminator(config.discriminator_channels, seed=seed).to(device)
        weights = dict(discriminator.named_parameters())
        rate = config.discriminator_learning_rate or config.learning_rate
        discriminator_optimizer = torch.optim.Adam(weights.values(), rate, config.betas, fused=True)
        networks["discriminator"] = (weights, discriminator_optimizer)
        gan = adversarial_loss(config.adversarial_loss)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(config, device))

    # Resume.
    identity = {
        "config": asdict(replace(config, checkpoint_every=1)),  # how often it is saved changes nothing
        "seed": seed,
        "steps": steps,
        "concepts": [c.concept for c in concepts],
    }
    first_step = 0 if checkpoint is None else _restore(checkpoint, identity, networks)
    edit = data_parallel(generator) if data_parallel else generator
    if adversarial:
        judge = data_parallel(discriminator) if data_parallel else discriminator

    rank, world = worker
    losses: dict[str, list[Tensor]] = {}
    means: dict[str, float] = {}
    for step in range(first_step, steps):
        for _, optimizer in networks.values():
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * rate_factor(config, step / steps)

        # Batch: concepts mixed evenly, this worker's share, source and target mirrored alike.
        concept, row, mirror = (t[rank::world].to(device) for t in order.batch(step, config.batch_size))
        photo, wanted = to_unit(source[row]), to_unit(target[row])
        if config.flip:
            photo, wanted = (torch.where(mirror[:, None, None, None], t.flip(3), t) for t in (photo, wanted))
        photo, wanted = photo.to(memory_format=layout), wanted.to(memory_format=layout)
        prompt = text[concept]

        with autocast:
            edited = edit(photo, prompt)
        edited = edited.float()
        now: dict[str, Tensor] = {"l1": (edited - wanted).abs().mean()}
        loss = config.l1_weight * now["l1"]
        if config.gradient_weight:
            now["gradient"] = gradient_l1(edited, wanted)
            loss = loss + config.gradient_weight * now["gradient"]

        if adversarial and step >= config.adversarial_start * steps:
            # Discriminator: real pairs against edited ones.
            discriminator_optimizer.zero_grad()
            with autocast:
                logits = judge(photo.repeat(2, 1, 1, 1), torch.cat([wanted, edited.detach()]))
            real, fake = logits.float().chunk(2)
            now["discriminator"] = gan.discriminator(real, fake)
            now["discriminator"].backward()  # type: ignore[no-untyped-call]
            discriminator_optimizer.step()
            # Generator against the discriminator just updated.
            discriminator.requires_grad_(False)
            with autocast:
                fake = discriminator(photo, edited)
            discriminator.requires_grad_(True)
            now["adversarial"] = gan.generator(fake.float())
            loss = loss + config.adversarial_weight * now["adversarial"]

        generator_optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        generator_optimizer.step()

        # Report and checkpoint: the only places where the host waits for the device.
        for name, value in now.items():
            losses.setdefault(name, []).append(value.detach())
        done = step + 1
        if done % progress_every == 0 or done == steps or done % config.checkpoint_every == 0:
            means = {name: float(torch.stack(values).mean()) for name, values in losses.items()}
            losses = {}
            broken = [name for name, value in means.items() if not math.isfinite(value)]
            if broken:
                raise DivergedError(
                    f"training diverged by step {done} of {steps}: loss {broken[0]} is not finite; lower learning_rate"
                )
            if on_progress:
                on_progress(Progress(step=done, steps=steps, losses=means))
        if on_checkpoint and done % config.checkpoint_every == 0 and done < steps:
            on_checkpoint(done, _checkpoint(done, identity, networks))
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


class _DataOrder:
    """Which rows make up a batch, from seed and step alone.

    An epoch takes as many pairs of every concept as the largest concept has (smaller ones come round again), each
    concept in an order of its own, all of them shuffled together: concepts are mixed evenly (section 4.2.1).
    """

    def __init__(self, counts: Sequence[int], seed: int) -> None:
        self._counts = counts
        self._seed = seed
        self._starts = [sum(counts[:i]) for i in range(len(counts))]
        self.epoch_length = max(counts) * len(counts)
        self._epochs: dict[int, Tensor] = {}

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Concept index, row in the concatenated images and mirror flag of each of `size` pairs."""
        positions = range(step * size, (step + 1) * size)
        picks = torch.stack([self._epoch(p // self.epoch_length)[p % self.epoch_length] for p in positions])
        mirror = torch.rand(size, generator=_random(self._seed, "flip", step)) < 0.5
        return picks[:, 0], picks[:, 1], mirror

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            random = _random(self._seed, "order", epoch)
            length = max(self._counts)
            rows = []
            for concept, (start, count) in enumerate(zip(self._starts, self._counts, strict=True)):
                passes = [torch.randperm(count, generator=random) for _ in range(math.ceil(length / count))]
                row = start + torch.cat(passes)[:length]
                rows.append(torch.stack([torch.full_like(row, concept), row], dim=1))
            picks = torch.cat(rows)
            self._epochs = {e: t for e, t in self._epochs.items() if e == epoch - 1}  # a batch may span two epochs
            self._epochs[epoch] = picks[torch.randperm(len(picks), generator=random)]
        return self._epochs[epoch]


def _random(seed: int, purpose: str, index: int) -> torch.Generator:
    salt = {"order": 1, "flip": 2}[purpose]
    return torch.Generator().manual_seed((seed * 1_000_003 + index * 10 + salt) % 2**63)


_Networks = dict[str, tuple[dict[str, nn.Parameter], torch.optim.Adam]]


def _checkpoint(step: int, identity: dict[str, object], networks: _Networks) -> bytes:
    """All trained weights with both Adam moments as safetensors; step and identity in its metadata.

    Under one key, because safetensors writes several in an order that changes from call to call.
    """
    tensors = {}
    for network, (parameters, optimizer) in networks.items():
        for name, parameter in parameters.items():
            tensors[f"{network}/{name}"] = parameter.detach().contiguous()
            for moment, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{network}/{name}/{moment}"] = value.contiguous()
    return safetensors.torch.save(tensors, {"training": json.dumps({"step": step, "identity": identity})})


def _restore(checkpoint: bytes, identity: dict[str, object], networks: _Networks) -> int:
    try:
        tensors = safetensors.torch.load(checkpoint)
        header = json.loads(checkpoint[8 : 8 + int.from_bytes(checkpoint[:8], "little")])["__metadata__"]
        training = json.loads(header["training"])
    except (ValueError, KeyError, safetensors.SafetensorError) as error:
        raise ValueError(f"not a training checkpoint: {error!r}") from error
    if training["identity"] != json.loads(json.dumps(identity)):  # a tuple comes back as a list
        raise ValueError("this checkpoint belongs to another training run: its configuration, seed or concepts differ")
    for network, (parameters, optimizer) in networks.items():
        for name, parameter in parameters.items():
            saved = tensors.get(f"{network}/{name}")
            if saved is None or saved.shape != parameter.shape:
                raise ValueError(f"this checkpoint belongs to another network: {network} {name} differs")
            with torch.no_grad():
                parameter.copy_(saved)
            for moment in ("step", "exp_avg", "exp_avg_sq"):
                key = f"{network}/{name}/{moment}"
                if key in tensors:  # absent where this network had not been updated yet
                    optimizer.state[parameter][moment] = tensors[key].to(parameter.device)
    return int(training["step"])
