"""Which images to train on, and which concepts to pretrain on (E2GAN, sections 4.2.3 and 4.2.1).

Similarity clustering embeds every training image, finds as many K-means clusters as samples are wanted, and
keeps of each cluster the image nearest its centre. It looks at source images only, so it runs before any
teacher does. The base's concepts are chosen the same way, over each concept's mean embedding.

The paper embeds with FaceNet (faces) and CLIP's image encoder; the embedded default needs no weights.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from e2gan.text import load_clip

Embeddings = NDArray[np.float64]
"""Float64 `[n, d]`, one row an image or a concept."""

CHUNK = 64
TIE = 1e-9
"""Squared distances closer than this, relative to the embeddings' variance, count as equal."""


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
            height, width = chunk.shape[2:]
            scale = size / min(height, width)
            shape = (max(size, int(height * scale)), max(size, int(width * scale)))
            x = chunk.to(self._device).float()
            x = F.interpolate(x, shape, mode="bicubic", antialias=True, align_corners=False).round().clamp(0, 255)
            top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
            x = x[:, :, top : top + size, left : left + size]
            embeds: Tensor = self._model(pixel_values=(x / 255 - mean) / std).image_embeds
            rows.append(F.normalize(embeds.double(), dim=1).cpu().numpy())
        return np.concatenate(rows)


def similarity_clusters(embeddings: ArrayLike, ids: Sequence[str], k: int, seed: int) -> list[str]:
    """The k ids that stand for all: one of each K-means cluster, the nearest to its centre (section 4.2.3).

    Ties go to the lower id. Where there are fewer clusters than k, because points coincide, the points
    farthest from those chosen follow. The result depends on the embeddings of the ids, not on their order,
    and a fixed seed on one machine always gives the same.

    Args:
        embeddings: `[n, d]`, finite, one row an id.
        ids: n distinct ids.
        k: how many to keep, 1..n.
        seed: of the K-means++ starts, of which the best of ten counts.

    Returns:
        k distinct ids, sorted.

    Raises:
        ValueError: k is out of range, or the embeddings and ids do not fit each other.
    """
    points = np.asarray(embeddings, np.float64)
    if points.ndim != 2 or len(points) != len(ids) or len(set(ids)) != len(ids):
        raise ValueError(f"clustering needs distinct ids, one embedding each: {points.shape} for {len(ids)}")
    if not np.isfinite(points).all():
        raise ValueError("embeddings to cluster hold values that are not finite")
    if not 1 <= k <= len(ids):
        raise ValueError(f"cannot choose {k} of {len(ids)}: ask for 1 to {len(ids)}, or provide more")
    if k == len(ids):
        return sorted(ids)

    order = sorted(range(len(ids)), key=lambda index: ids[index])
    points = points[order]
    labels, centres = _k_means(points, k, seed)
    tie = TIE * float(points.var(axis=0).sum())
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        distances = np.square(points[members] - centres[label]).sum(axis=1)
        chosen.append(int(members[distances <= distances.min() + tie][0]))
    while len(chosen) < k:
        nearest = np.square(points[:, None] - points[chosen]).sum(axis=2).min(axis=1)
        nearest[chosen] = -np.inf
        chosen.append(int(np.flatnonzero(nearest >= nearest.max() - tie)[0]))
    return sorted(ids[order[index]] for index in chosen)


def representative_concepts(
    means: Mapping[str, ArrayLike], k: int, seed: int, reserved: Collection[str] = ()
) -> list[str]:
    """The k concepts to pretrain the base on: of each cluster the one nearest its centre (section 4.2.1).

    Args:
        means: concept to the mean embedding `[d]` of its edited images.
        k: how many; the paper takes 20 of 230 (FFHQ) and 10 of 20 (scenery).
        seed: see `similarity_clusters`.
        reserved: concepts kept back for evaluation, never chosen; they need not be among `means`.

    Returns:
        k distinct concepts, sorted.

    Raises:
        ValueError: k is out of range, or the embeddings are of different widths or not finite.
    """
    concepts = sorted(set(means) - set(reserved))
    if not 1 <= k <= len(concepts):
        raise ValueError(
            f"cannot choose {k} base concepts of the {len(concepts)} that are not reserved: "
            f"ask for 1 to {len(concepts)}, or reserve fewer"
        )
    vectors = [np.asarray(means[concept], np.float64) for concept in concepts]
    if any(vector.ndim != 1 or vector.shape != vectors[0].shape for vector in vectors):
        raise ValueError("mean embeddings of concepts must be vectors of one width; embed all the same way")
    return similarity_clusters(np.stack(vectors), concepts, k, seed)


def _k_means(points: Embeddings, k: int, seed: int) -> tuple[NDArray[np.int32], Embeddings]:
    """Labels `[n]` and centres; fewer than k labels occur where points coincide."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    distinct = len(np.unique(points, axis=0))
    # One thread: the order of floating-point sums, and with it the result, must not depend on the machine's
    # load.
    with threadpool_limits(1), warnings.catch_warnings():
        # Points that differ only in the last bits may still fall together; the caller fills up.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = KMeans(min(k, distinct), init="k-means++", n_init=10, random_state=seed).fit(points)
    return fitted.labels_, fitted.cluster_centers_


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"images to embed must be uint8 [n, 3, h, w], not {images.dtype} {[*images.shape]}")


def _chunks(images: Tensor) -> Iterator[Tensor]:
    for start in range(0, len(images), CHUNK):
        yield images[start : start + CHUNK]


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
