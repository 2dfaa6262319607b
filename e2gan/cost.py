"""What a network costs to run and to train, in multiply-adds, parameters and bytes (tables 1 and 2, figure 6).

Products of convolutions, linear layers and attention are counted; additions of biases, norms, activations, losses and
optimisers are not, as in the paper's figures (docs/method.md). A transposed convolution multiplies every input pixel by
its kernel and is charged so. The 56.9 G that the paper gives for pix2pix charges it at its output's size, four times
as much, and includes zeros that nothing computes: the same network is 49.6 G here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from e2gan.config import GeneratorConfig, TrainConfig
from e2gan.lora import new_adapter
from e2gan.lora_attach import attach
from e2gan.lora_peft import save
from e2gan.model import Discriminator, Generator, part_of
from e2gan.ranks import Ranks
from e2gan.train import total_steps


@dataclass(frozen=True, kw_only=True)
class TrainingCost:
    """One row of the paper's comparison of training costs (figure 6).

    multiply_adds_per_image: of the generator editing one image, an adapter merged.
    training_multiply_adds: of the whole run, the discriminator's included.
    trainable_parameters: of the generator, what a concept updates.
    bytes_per_concept: what is kept for a concept, in fp16: the adapter's file, or the generator's weights.
    seconds: of the whole run, measured elsewhere; None where it was not.
    """

    name: str
    multiply_adds_per_image: int
    training_multiply_adds: int
    trainable_parameters: int
    bytes_per_concept: int
    seconds: float | None


def training_cost(
    name: str,
    config: GeneratorConfig,
    training: TrainConfig,
    *,
    pairs: int,
    side: int,
    ranks: Ranks | None = None,
    seconds: float | None = None,
) -> TrainingCost:
    """The cost of training one concept on that many pairs of square images of `side` px.

    ranks: of the adapter that trains; None trains the generator's weights.

    Raises:
        ValueError: a side that a network cannot take, or ranks that do not fit the generator.
    """
    with torch.device("meta"):
        generator, discriminator = Generator(config), Discriminator(training.discriminator_channels)
    per_image = multiply_adds(generator, side)
    kept = 2 * sum(p.numel() for p in generator.parameters())
    if ranks is not None:
        adapter = new_adapter(generator, ranks, seed=0)
        attach(generator, adapter)
        kept = len(save(adapter, base="")["adapter_model.safetensors"])
    steps, trained_side = total_steps(training, pairs), training.crop or side
    total = steps * multiply_adds(generator, trained_side, training=training)
    if training.adversarial_weight:
        judged = steps - math.ceil(training.adversarial_start * steps)
        total += judged * multiply_adds(discriminator, trained_side, training=training)
    trained = _trained(generator, training)
    return TrainingCost(
        name=name,
        multiply_adds_per_image=per_image,
        training_multiply_adds=total,
        trainable_parameters=sum(p.numel() for key, p in generator.named_parameters() if key in trained),
        bytes_per_concept=kept,
        seconds=seconds,
    )


def multiply_adds(network: Generator | Discriminator, side: int, *, training: TrainConfig | None = None) -> int:
    """Multiply-adds of a network on square images of `side` px, whatever its device, without computing anything.

    training: None counts the forward pass of one image. Otherwise what one step (`e2gan.train.train`) passes through
        this network, batch and all: a generator's forward and backward, where weights that do not train need no
        gradient and an attached adapter forms the others once (its convolutions of rank 1 by elementwise products,
        which are not counted); the three passes of a discriminator while the adversarial loss is on. Attention is
        charged without the recomputation by which fused kernels save memory.

    Raises:
        ValueError: a side that the network cannot take.
    """
    smallest = 24 if isinstance(network, Discriminator) else 16
    if side % 8 or side < smallest:
        raise ValueError(f"side must be a multiple of 8 and at least {smallest}, not {side}")
    # Fake tensors are shapes that pass for a CPU's: an attached adapter asks for its device's autocast, and the meta
    # device has none. On a CPU the counter overlooks fused attention, so it is taken apart into its two products.
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trained = _trained(network, training) if training else set()
        weights = {key: torch.empty(p.shape, requires_grad=key in trained) for key, p in network.named_parameters()}
        n = training.batch_size if training else 1
        images = torch.empty(n, 3, side, side)
        if isinstance(network, Generator):
            text = torch.empty(n, network.config.text_tokens, network.config.text_width)
            _pass(network, weights, images, text)
        elif training is None:
            _pass(network, weights, images, images)
        else:
            # The discriminator's own update: real and edited pairs.
            _pass(network, weights, images.repeat(2, 1, 1, 1), images.repeat(2, 1, 1, 1))
            # The generator's: edited pairs, and the gradient goes through frozen weights to the edited images.
            frozen = {key: weight.detach() for key, weight in weights.items()}
            _pass(network, frozen, images, torch.empty_like(images, requires_grad=True))
    return int(counter.get_total_flops()) // 2  # it counts a multiply-add as two


def _trained(network: Generator | Discriminator, training: TrainConfig) -> set[str]:
    """Names of the parameters that train."""
    frozen = training.frozen if isinstance(network, Generator) else ()
    return {key for key, p in network.named_parameters() if p.requires_grad and part_of(key) not in frozen}


def _pass(network: nn.Module, weights: dict[str, Tensor], *inputs: Tensor) -> None:
    """Forward, and backward where anything requires a gradient. Every loss is elementwise, so any stands for it."""
    out: Tensor = functional_call(network, weights, inputs)
    if out.requires_grad:
        out.sum().backward()  # type: ignore[no-untyped-call]
