"""Images as vectors, near where the images are alike: what similarity clustering looks at (E2GAN, section 4.2.3).

The paper embeds with FaceNet (faces) and CLIP's image encoder; the embedded default needs no weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from e2gan.text import load_clip

Embeddings = NDArray[np.float64]
"""Float64 `[n, d]`, one row an image or a concept."""

CHUNK = 64


def thumbnail_embedding(images: Tensor) -> Embeddings:
    """What an image looks like from afar: its colours and the directions of its edges; needs no weights.

    Columns 0..191: an 8x8 thumbnail, averaged in linear light, in the perceptual space Oklab (Ottosson,
    2020), divided by 8, so that the distance of two images is the root mean square colour difference of their
    thumbnails. Columns 192..319: of the lightness at 64x64, the gradient strength in 8 directions (opposite
    ones are one, split between the two nearest) over 4x4 cells, as shares of the image's total, square-rooted
    (Hellinger distance) and scaled by 0.5, which gives both parts about equal weight on photographs. A flat
    image has zeros there.

    Args:
        images: uint8 `[n, 3, height, width]`, RGB 0..255.

    Returns:
        float64 `[n, 320]`.

    Raises:
        ValueError: the images are not such a stack, or there are none.
    """
    _check_images(images)
    return np.concatenate([_thumbnails(chunk).cpu().numpy() for chunk in _chunks(images)])


class ClipImageEmbedding:
    """CLIP's image embedding, the paper's for scenery and for concepts; unit vectors.

    Args:
        path: a folder with a CLIP vision model, or a hub id such as `openai/clip-vit-large-patch14`.
        download: let transformers fetch a hub id that is not in its cache. Off, nothing touches the network.
        device: where the model runs.

    Raises:
        ValueError: transformers or the weights are not on this machine.
    """

    def __init__(self, path: str | Path, *, download: bool = False, device: str = "cpu") -> None:
        self._model = load_clip("CLIPVisionModelWithProjection", path, download=download).to(device)
        self._device = device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Embeddings:
        """uint8 `[n, 3, height, width]` to float64 `[n, d]`, rows of length 1.

        CLIP's preprocessing: the short side to the model's input size (bicubic), the centre square, its own
        mean and standard deviation.

        Raises:
            ValueError: the images are not such a stack, or there are none.
        """
        _check_images(images)
        size: int = self._model.config.image_size
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], device=self._device).view(3, 1, 1)
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711], device=self._device).view(3, 1, 1)
        rows = []
        for chunk in _chunks(images):
            x = _centre_square(chunk.to(self._device), size)
            embeds: Tensor = self._model(pixel_values=(x / 255 - mean) / std).image_embeds
            rows.append(F.normalize(embeds.double(), dim=1).cpu().numpy())
        return np.concatenate(rows)


class OnnxImageEmbedding:
    """A network in an ONNX file as the embedding, such as FaceNet, the paper's for faces; unit vectors.

    Its input is float32 `[n, 3, s, s]`, RGB, its output `[n, d]`. It runs on one CPU core: the order of floating-point
    sums must not depend on the machine.

    Args:
        path: the model's file.
        mean, std: `(x - mean) / std` of pixels 0..255 is what the network takes, one number or one a channel;
            FaceNet's own by default.
        size: s, where the model leaves it open; 160 is FaceNet's.

    Raises:
        ValueError: there is no such file, or it is not a model with such an input.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        mean: float | Sequence[float] = 127.5,
        std: float | Sequence[float] = 128.0,
        size: int = 160,
    ) -> None:
        import onnxruntime

        if not Path(path).is_file():
            raise ValueError(f"there is no file {path}: name an ONNX model that embeds images")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what goes wrong comes back as an exception
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise ValueError(f"{path} is not an ONNX model that can be loaded: export it anew") from error
        inputs = self._session.get_inputs()
        shape = [side if isinstance(side, int) else None for side in inputs[0].shape]  # None: open
        square = len(shape) == 4 and shape[1] in (3, None) and shape[2] == shape[3]
        if len(inputs) != 1 or inputs[0].type != "tensor(float)" or not square:
            given = " and ".join(f"{one.type} {one.shape}" for one in inputs)
            raise ValueError(f"{path} takes {given}: export it for one input, float32 [n, 3, s, s]")
        self._name = inputs[0].name
        self._path, self._batch, self._size = path, shape[0], shape[2] or size
        self._mean, self._std = (torch.as_tensor(value, dtype=torch.float32).view(-1, 1, 1) for value in (mean, std))

    def __call__(self, images: Tensor) -> Embeddings:
        """uint8 `[n, 3, height, width]` to float64 `[n, d]`, rows of length 1; the centre square is what it sees.

        Raises:
            ValueError: the images are not such a stack, there are none, or the model's output is not `[n, d]` of finite
                numbers.
        """
        _check_images(images)
        rows = []
        for chunk in _chunks(images, self._batch or CHUNK):
            x = ((_centre_square(chunk, self._size) - self._mean) / self._std).numpy()
            if self._batch:  # a model exported for one batch size gets exactly that many
                x = x[np.arange(self._batch) % len(chunk)]
            rows.append(self._run(x)[: len(chunk)])
        return F.normalize(torch.from_numpy(np.concatenate(rows)).double(), dim=1).numpy()

    def _run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        try:
            output: NDArray[np.float32] = self._session.run(None, {self._name: x})[0]
        except Exception as error:  # as above
            raise ValueError(f"{self._path} failed on images of {self._size}x{self._size}: export it anew") from error
        if output.ndim != 2 or len(output) != len(x) or output.dtype != np.float32 or not np.isfinite(output).all():
            raise ValueError(
                f"{self._path} turned {[*x.shape]} into {output.dtype} {[*output.shape]}: export it so that its first "
                f"output is float32 [n, d], finite"
            )
        return output


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"images to embed must be uint8 [n, 3, h, w], not {images.dtype} {[*images.shape]}")


def _chunks(images: Tensor, size: int = CHUNK) -> Iterator[Tensor]:
    for start in range(0, len(images), size):
        yield images[start : start + size]


def _centre_square(images: Tensor, size: int) -> Tensor:
    """uint8 images to float32 `[n, 3, size, size]` in 0..255: the short side resized (bicubic), the centre cut out."""
    height, width = images.shape[2:]
    scale = size / min(height, width)
    shape = (max(size, int(height * scale)), max(size, int(width * scale)))
    x = F.interpolate(images.float(), shape, mode="bicubic", antialias=True, align_corners=False).round().clamp(0, 255)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return x[:, :, top : top + size, left : left + size]


def _thumbnails(images: Tensor) -> Tensor:
    """uint8 `[n, 3, height, width]` to float64 `[n, 320]`."""
    encoded = torch.arange(256, dtype=torch.float64, device=images.device) / 255
    linear = torch.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    light = linear[images.long()]

    colours = _oklab(F.adaptive_avg_pool2d(light, 8)).flatten(1) / 8

    lightness = _oklab(F.adaptive_avg_pool2d(light, 64))[:, 0]
    down, across = torch.gradient(lightness, dim=(1, 2))
    strength = torch.hypot(down, across)
    direction = torch.atan2(down, across) / math.pi * 8
    low = direction.floor()
    upper_share = direction - low
    bins = torch.zeros(len(images), 8, 64, 64, dtype=torch.float64, device=images.device)
    bins.scatter_add_(1, (low.long() % 8)[:, None], (strength * (1 - upper_share))[:, None])
    bins.scatter_add_(1, ((low.long() + 1) % 8)[:, None], (strength * upper_share)[:, None])
    cells = F.adaptive_avg_pool2d(bins, 4).flatten(1)
    edges = 0.5 * (cells / cells.sum(dim=1, keepdim=True).clamp(min=1e-6)).sqrt()

    return torch.cat([colours, edges], dim=1)


def _oklab(light: Tensor) -> Tensor:
    """Linear sRGB `[n, 3, h, w]` in 0..1 to Oklab: lightness 0..1, green-red, blue-yellow."""
    to_cones = light.new_tensor(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = light.new_tensor(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    cones = torch.einsum("ij,njhw->nihw", to_cones, light) ** (1 / 3)
    return torch.einsum("ij,njhw->nihw", to_lab, cones)
