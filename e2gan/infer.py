"""Inference: batches of training size, whole photos, and one graph for many adapters."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from e2gan.config import GeneratorConfig, TrainConfig
from e2gan.fast import fast_generator, share
from e2gan.lora import Adapter, crucial_layers, merge
from e2gan.memory import mapped
from e2gan.model import Generator
from e2gan.pairs import Image, to_bytes, to_tensor, to_unit
from e2gan.sides import working_size
from e2gan.train import uses_bf16


def base_generator(config: GeneratorConfig, weights: dict[str, Tensor]) -> Generator:
    """A generator with the given weights, ready for inference.

    Raises:
        ValueError: the weights are not those of a generator of this configuration.
    """
    with torch.device("meta"):
        generator = Generator(config)
    try:
        generator.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"these weights do not fit {config}: {str(error).splitlines()[-1].strip()}") from error
    return generator.requires_grad_(False).eval()


def adapted_generator(config: GeneratorConfig, base: dict[str, Tensor], adapter: Adapter) -> Generator:
    """A generator with the adapter merged into the base's weights; layers without update share the base's memory.

    Raises:
        ValueError: base or adapter do not fit a generator of this configuration.
    """
    return base_generator(config, {**base, **merge(base_generator(config, base), adapter)})


@torch.inference_mode()
def edit_images(generator: Generator, text: Tensor, images: Tensor, *, batch_size: int = 16) -> Tensor:
    """Edit uint8 images `[n, 3, h, w]` with one prompt's embedding `[77, 768]`.

    uint8 of the same shape comes back. The computation is bf16 where the device computes in it.

    Raises:
        ValueError: h or w is below 16 or not a multiple of 8.
    """
    check_sides(images)
    device = next(generator.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(TrainConfig(), device)):
        return torch.cat(
            [
                to_bytes(generator(to_unit(batch.to(device)), text[None].to(device))).cpu()
                for batch in torch.split(images, batch_size)
            ]
        )


def edit_photo(generator: Generator, text: Tensor, photo: Image, *, longest_side: int) -> Image:
    """Edit a photo of any size, brought to `longest_side` px at most with its aspect kept.

    Returns uint8 `[h, w, 3]` at the size the network worked in: sides rounded to multiples of 8, at least 16.

    Raises:
        ValueError: longest_side is below 16, the smallest side the network takes.
    """
    from PIL import Image as PILImage

    size = working_size(photo.shape[1], photo.shape[0], longest_side=longest_side)
    resized = np.asarray(PILImage.fromarray(photo).resize(size, PILImage.Resampling.LANCZOS))
    return edit_images(generator, text, to_tensor([resized]))[0].permute(1, 2, 0).numpy()


@dataclass(frozen=True)
class Merged:
    """An adapter ready for its `Switcher`: weights by name, on the device, and the prompt's embedding.

    nbytes: memory it does not share with the base.
    """

    weights: dict[str, Tensor]
    text: Tensor
    nbytes: int


class Switcher:
    """One generator and any number of adapters: changing the adapter costs nothing, each has its weights merged.

    The weights are inputs of one graph, so switching passes other tensors and compiles nothing. Only the adapted layers
    exist once an adapter; every other weight is the base's.

    base: a plain generator; it is not changed and its tensors may be shared.
    device: where to compute; the base's when None.
    dtype: weights and computation; when None bf16 where the device computes in it, else float32.
    channels_last: memory layout of images and convolution weights.
    rewrite: use `e2gan.fast`; when None on a CPU, where it is faster.
    compile: with torch.compile. Every shape `[n, 3, h, w]` has a graph of its own, and its first call takes up to a
        minute; beyond `torch._dynamo.config.recompile_limit` graphs in a process new shapes run uncompiled. Of a set of
        sizes (h, w) only these are compiled.
    """

    def __init__(
        self,
        base: Generator,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        channels_last: bool = True,
        rewrite: bool | None = None,
        compile: bool | Set[tuple[int, int]] = True,
    ) -> None:
        self.device = torch.device(device or next(base.parameters()).device)
        self.dtype = dtype or (torch.bfloat16 if uses_bf16(TrainConfig(), self.device) else torch.float32)
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._base = base
        rewrite = self.device.type == "cpu" if rewrite is None else rewrite
        self._module = (fast_generator(base) if rewrite else share(base)).eval()
        self._module.to(self.device, self.dtype).to(memory_format=self._format)
        # Detached: to the compiler a parameter and a merged tensor are not alike, and it would compile again.
        self._shared = {
            name: self._module.get_parameter(name).detach()
            for name in (f"{layer}.weight" for layer in crucial_layers(base))
        }
        self._compiles = compile
        self._compiled = torch.compile(self._forward, dynamic=False) if compile else self._forward

    def merge(self, adapter: Adapter | None, text: Tensor) -> Merged:
        """Make an adapter ready (None: the base itself), with the prompt's embedding `[77, 768]`.

        Raises:
            ValueError: the adapter is not one for a generator of this shape.
        """
        own = {} if adapter is None else merge(self._base, adapter)
        own = {name: self._placed(weight) for name, weight in own.items()}
        if self.device.type == "cpu":
            own = mapped(own)
        text = text[None].to(self.device, self.dtype)
        # Every adapter gives the same names, whichever layers it adapts: another set would be another graph.
        return Merged({**self._shared, **own}, text, sum(t.nbytes for t in (*own.values(), text)))

    @torch.inference_mode()
    def __call__(self, merged: Merged, images: Tensor) -> Tensor:
        """Edit uint8 images `[n, 3, h, w]` with one adapter; uint8 of the same shape comes back, on the device.

        Raises:
            ValueError: h or w is below 16 or not a multiple of 8.
        """
        check_sides(images)
        compiles = self._compiles if isinstance(self._compiles, bool) else images.shape[2:] in self._compiles
        run = self._compiled if compiles else self._forward
        edited: Tensor = run(merged.weights, images.to(self.device), merged.text)
        return edited

    def _forward(self, weights: dict[str, Tensor], images: Tensor, text: Tensor) -> Tensor:
        unit = to_unit(images).to(self.dtype, memory_format=self._format)
        return to_bytes(torch.func.functional_call(self._module, weights, (unit, text)))

    def _placed(self, weight: Tensor) -> Tensor:
        weight = weight.to(self.device, self.dtype)
        return weight.contiguous(memory_format=self._format) if weight.dim() == 4 else weight


def check_sides(images: Tensor) -> None:
    """
    Raises:
        ValueError: images `[n, 3, h, w]` that the network has no output of the same size for.
    """
    height, width = images.shape[2:]
    if height % 8 or width % 8 or min(height, width) < 16:
        raise ValueError(f"an image's sides must be multiples of 8 and at least 16, not {height}x{width}")
