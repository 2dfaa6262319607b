"""Inference: batches of training size and whole photos."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from e2gan.config import GeneratorConfig, TrainConfig
from e2gan.lora import Adapter, merge
from e2gan.model import Generator
from e2gan.pairs import Image, to_bytes, to_tensor, to_unit
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

    uint8 of the same shape comes back. h and w must be multiples of 8. The computation is bf16 where the device
    computes in it.
    """
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

    if longest_side < 16:
        raise ValueError(f"longest_side must be at least 16, not {longest_side}")
    height, width = photo.shape[:2]
    factor = min(1.0, longest_side / max(height, width))
    size = [max(2, min(round(side * factor / 8), longest_side // 8)) * 8 for side in (width, height)]
    resized = np.asarray(PILImage.fromarray(photo).resize(size, PILImage.Resampling.LANCZOS))
    return edit_images(generator, text, to_tensor([resized]))[0].permute(1, 2, 0).numpy()
