"""Pictures to measure."""

import torch
from torch import Tensor


def smooth(n: int, size: int = 32, seed: int = 0) -> Tensor:
    """Pictures with large and small structure, float -1..1."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, size // 8, size // 8, generator=generator)
    fine = torch.rand(n, 3, size, size, generator=generator)
    upscaled = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    return (0.8 * upscaled + 0.2 * fine) * 2 - 1
