"""How good the generated images are, pair by pair and as sets (E2GAN, section 5.1).

Distances between sets are of feature vectors: `e2gan.features` makes them, `e2gan.distances` compares them. Images are
float `[n, 3, height, width]` in -1..1 or, as in `Pairs`, uint8 0..255, and are taken in chunks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from e2gan.distances import few_images, frechet_distance, frechet_interval, kernel_distance
from e2gan.features import FeatureExtractor, chunks

Values = NDArray[np.float64]
"""One number an image, `[n]`."""

PerImage = Callable[[Tensor, Tensor], Tensor]
"""A measure of two chunks of images, image by image, `[n]`."""

PSNR_CAP = 100.0
"""The PSNR, in dB, given to identical images, whose own is infinite."""


class Scores(TypedDict):
    """What `evaluate` returns; every value can be written as JSON.

    n: images. l1, psnr, ssim: generated to target. l1_untouched: source to target, what doing nothing would
    score. frechet, kid: the distance's name to its value between generated and target. warning: what to know before
    the Fréchet distances are quoted, None where there is nothing. frechet_interval: name to a `FrechetEstimate` as a
    dict; only where it was asked for.
    """

    n: int
    l1: float
    l1_untouched: float
    psnr: float
    ssim: float
    frechet: dict[str, float]
    kid: dict[str, float]
    warning: str | None
    frechet_interval: NotRequired[dict[str, dict[str, Any]]]


def l1(a: Tensor, b: Tensor) -> float:
    """Mean absolute difference, 0..2 for images in -1..1.

    Raises:
        ValueError: not two equal stacks of at least one RGB image.
    """
    return _mean(_l1, a, b)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB: each image's own (data range 2, at most `PSNR_CAP`), then their mean.

    Raises:
        ValueError: not two equal stacks of at least one RGB image.
    """
    return _mean(_psnr, a, b)


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity, -1..1 (Wang et al., 2004): 11x11 Gaussian window, sigma 1.5, data range 2.

    The mean over windows that lie inside the image, over channels and over images.

    Raises:
        ValueError: not two equal stacks of at least one RGB image, or a side below 11 pixels.
    """
    _check_pair(a, b)
    return _mean(_ssim_of(a), a, b)


def each_image(a: Tensor, b: Tensor) -> dict[str, Values]:
    """Every image's own `l1`, `psnr` and `ssim`: what the functions of these names are the means of.

    Raises:
        ValueError: as `ssim`.
    """
    _check_pair(a, b)
    measures = {"l1": _l1, "psnr": _psnr, "ssim": _ssim_of(a)}
    return {name: torch.cat([*_chunked(measure, a, b)]).cpu().numpy() for name, measure in measures.items()}


def mean_interval(
    values: Values, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """A percentile bootstrap interval of the mean of `[n]` values: the images are drawn anew, with replacement.

    It knows nothing of images that are alike, such as crops of one photograph, and is then too narrow.
    """
    draws = np.random.default_rng(seed)
    means = [values[draws.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def variety(images: Tensor) -> float:
    """How much two of the images differ: the root mean square over all pairs and all values, 0..2 in -1..1.

    Raises:
        ValueError: fewer than two images.
    """
    n = len(images)
    if n < 2:
        raise ValueError(f"variety is of at least two images, not {n}")
    # The mean square over pairs is twice the variance, taken with n - 1.
    mean = sum(chunk.double().sum(dim=0) for chunk in chunks(images)) / n
    squares = sum(float((chunk.double() - mean).square().sum()) for chunk in chunks(images))
    return math.sqrt(2 * squares / (n - 1) / images[0].numel())


def contrast(images: Tensor) -> float:
    """How far an image is from one colour: its values' root mean square distance from its mean colour, averaged."""
    total = 0.0
    for chunk in chunks(images):
        x = chunk.double()
        total += float((x - x.mean(dim=(2, 3), keepdim=True)).square().mean(dim=(1, 2, 3)).sqrt().sum())
    return total / len(images)


def evaluate(
    generated: Tensor,
    target: Tensor,
    untouched: Tensor,
    extractors: Sequence[FeatureExtractor],
    *,
    bootstrap: int = 0,
    seed: int = 0,
) -> Scores:
    """Score generated images against the teacher's, pair by pair and as sets.

    Args:
        generated, target, untouched: `[n, 3, height, width]`, the student's and the teacher's image of each
            source and the source itself.
        extractors: a Fréchet and a kernel distance each, between generated and target; none is fine.
        bootstrap: resamples of a `frechet_interval` for each extractor (the pairs are resampled); 0 for none.
        seed: of the resampling and of the kernel distances' subsets.

    Raises:
        ValueError: the stacks differ in shape or are empty, a side is below 11 pixels, values are not finite, or
            there are fewer than two images for a distance.
    """
    _check_finite(generated, "the generated images hold values that are not finite: the training diverged")
    _check_finite(target, "the target images hold values that are not finite: make these edits anew")
    _check_finite(untouched, "the source images hold values that are not finite: leave these photos out")
    scores = Scores(
        n=len(generated),
        l1=l1(generated, target),
        l1_untouched=l1(untouched, target),
        psnr=psnr(generated, target),
        ssim=ssim(generated, target),
        frechet={},
        kid={},
        warning=few_images(len(generated)) if extractors else None,
    )
    intervals = {}
    for extractor in extractors:
        of_generated, of_target = extractor(generated), extractor(target)
        scores["frechet"][extractor.name] = frechet_distance(of_generated, of_target)
        scores["kid"][extractor.kid_name] = kernel_distance(of_generated, of_target, seed=seed)
        if bootstrap:
            estimate = frechet_interval(of_generated, of_target, resamples=bootstrap, paired=True, seed=seed)
            intervals[extractor.name] = asdict(estimate)
    if bootstrap:
        scores["frechet_interval"] = intervals
    return scores


def append_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Append the record as one line of JSON, its keys sorted; processes may append to one file at a time.

    Raises:
        ValueError: a value is NaN or infinite, which JSON cannot hold.
    """
    try:
        line = json.dumps(record, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    except ValueError as error:
        raise ValueError(f"a record for {path} holds NaN or infinity, which JSON cannot: leave that key out") from error
    # Unbuffered: one write call, which appending keeps whole, and nothing left to flush.
    with Path(path).open("ab", buffering=0) as file:
        file.write(line.encode())


def _check_finite(images: Tensor, problem: str) -> None:
    if not all(torch.isfinite(chunk).all() for chunk in chunks(images)):
        raise ValueError(problem)


def _l1(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).abs().mean(dim=(1, 2, 3))


def _psnr(x: Tensor, y: Tensor) -> Tensor:
    error = (x - y).double().square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(4 / error)).clamp(max=PSNR_CAP)


def _ssim_of(images: Tensor) -> PerImage:
    """The measure for stacks of these images' size."""
    if min(images.shape[2:]) < 11:
        raise ValueError(f"SSIM needs images of at least 11x11 pixels, not {images.shape[2]}x{images.shape[3]}")
    window = torch.exp(-torch.arange(-5, 6, dtype=torch.float64).square() / (2 * 1.5**2))
    window = window / window.sum()
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2

    def band(size: int) -> Tensor:
        """`[size - 10, size]`, the window in every row one further along: a convolution as a product."""
        rows = torch.zeros(size - 10, size)
        for offset, weight in enumerate(window.tolist()):
            rows.diagonal(offset).fill_(weight)
        return rows.to(images.device)

    down, across = band(images.shape[2]), band(images.shape[3]).mT

    def blur(x: Tensor) -> Tensor:
        return down @ x @ across

    def per_image(x: Tensor, y: Tensor) -> Tensor:
        mean_x, mean_y = blur(x), blur(y)
        var_x, var_y = blur(x * x) - mean_x * mean_x, blur(y * y) - mean_y * mean_y
        cov = blur(x * y) - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
        return (luminance * (2 * cov + c2) / (var_x + var_y + c2)).mean(dim=(1, 2, 3))

    return per_image


def _mean(measure: PerImage, a: Tensor, b: Tensor) -> float:
    _check_pair(a, b)
    return sum(float(values.sum()) for values in _chunked(measure, a, b)) / len(a)


@torch.no_grad()
def _chunked(measure: PerImage, a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """The measure of every image, chunk by chunk, in float64."""
    for x, y in zip(chunks(a), chunks(b), strict=True):
        yield measure(x, y).double()


def _check_pair(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3 or not len(a):
        raise ValueError(f"paired metrics need equal stacks [n, 3, h, w], not {[*a.shape]} and {[*b.shape]}")
