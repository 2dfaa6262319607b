"""Photos to the normal maps that ControlNet was trained on (Zhang & Agrawala 2023, "normal from MiDaS").

Sobel filters take the slopes of a depth network's output. Its depth is inverse, larger is nearer, and in no unit: how
strongly a map is tilted depends on the network, and the authors' ControlNet knows the one of MiDaS, DPT-hybrid. The
recipe is that of the authors' `annotator/midas` and of the model card of lllyasviel/sd-controlnet-normal, whose order
of channels this is: red x, green y, blue z. (The authors' demo reverses it for their own control_sd15_normal.pth.)
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from math import pi
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize, pad

Z = 2 * pi
"""The constant third component of a normal before it is scaled to unit length."""

KEPT_MAPS = 1024
"""How many are kept: of 384x384 pixels, which a square photo has in DPT-hybrid, one takes 442 kB."""


class NormalMaps:
    """The normal maps of photos, each made once: every concept starts from the same.

    estimator: a transformers DPTForDepthEstimation, which waits on the CPU; processor: its DPTImageProcessor.
    """

    def __init__(self, estimator: Any, processor: Any, background_threshold: float) -> None:
        self._estimator, self._processor = estimator, processor
        self._background_threshold = background_threshold
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def of(self, images: Tensor, device: torch.device) -> Tensor:
        """Photos `[n, 3, h, w]` in 0..1 on the CPU to normal maps of the same kind, made on `device`."""
        size = images.shape[2:]
        keys = [f"{size} {hashlib.sha256(image.contiguous().numpy().data).hexdigest()}" for image in images]
        absent = {key: image for key, image in zip(keys, images, strict=True) if key not in self._kept}
        if absent:
            self._estimator.to(device)
            # One at a time: a map must not depend on what else is in the batch, and is made only once.
            made = {key: self._make(image, device) for key, image in absent.items()}
            self._estimator.to("cpu")
            self._kept.update(made)
        for key in keys:
            self._kept.move_to_end(key)
        maps = torch.stack([self._kept[key] for key in keys])
        while len(self._kept) > KEPT_MAPS:
            self._kept.popitem(last=False)
        return interpolate(maps / 255, size, mode="bilinear")

    def _make(self, image: Tensor, device: torch.device) -> Tensor:
        """`[3, h, w]` in 0..1 to uint8 `[3, h', w']` on the CPU, as large as the network sees it and in proportion."""
        inputs = self._processor(images=[image], do_rescale=False, return_tensors="pt").pixel_values
        with torch.no_grad():
            depth = self._estimator(inputs.to(device)).predicted_depth
        # The network may see a photo squeezed into a square; slopes are taken of its true proportions.
        side, (height, width) = min(depth.shape[1:]), image.shape[1:]
        scale = side / min(height, width)
        size = round(height * scale), round(width * scale)
        depth = interpolate(depth[:, None], size, mode="bilinear")[:, 0]
        return normal_map(normals(depth, self._background_threshold))[0].cpu()


def normals(depth: Tensor, background_threshold: float) -> Tensor:
    """Inverse depth, float32 `[n, h, w]`, to unit normals `[n, 3, h, w]`: x to the left, y up, z to the viewer.

    Where the depth, brought to 0..1 per image, is under `background_threshold`, the normal is (0, 0, 1). Slopes are
    per pixel and taken of the depth as it is, so they follow its unit and the map's size.
    """
    padded = pad(depth[:, None], (1, 1, 1, 1), mode="reflect")[:, 0]
    across = padded[:, :, 2:] - padded[:, :, :-2]
    down = padded[:, 2:] - padded[:, :-2]
    x = across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:]
    y = down[:, :, :-2] + 2 * down[:, :, 1:-1] + down[:, :, 2:]
    low, high = depth.amin((1, 2), keepdim=True), depth.amax((1, 2), keepdim=True)
    background = depth - low < background_threshold * (high - low)
    vectors = torch.stack([x.masked_fill(background, 0), y.masked_fill(background, 0), torch.full_like(x, Z)], dim=1)
    return normalize(vectors, dim=1)


def normal_map(vectors: Tensor) -> Tensor:
    """Unit normals `[n, 3, h, w]` to uint8 `[n, 3, h, w]`: x, y and z in red, green and blue, -1..1 as 0..255."""
    return (vectors * 127.5 + 127.5).clamp(0, 255).to(torch.uint8)
