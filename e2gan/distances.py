"""Distances between two sets of feature vectors: Fréchet, with a confidence interval, and kernel (KID).

The arithmetic alone; what turns images into features is `e2gan.features`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from e2gan.features import Features

ENOUGH = 2048
"""Images from which on a Fréchet distance is customarily quoted."""

Counts = NDArray[np.int64]
"""How often each image of a set is in a resample, `[n]`."""


@dataclass(frozen=True, kw_only=True)
class FrechetEstimate:
    """A Fréchet distance and how sure one can be of it.

    value: `frechet_distance` as it is, at these images. low, high: interval for what it would be at endlessly many
    images; `value` is biased upwards and may lie above it. n: images of the smaller set. warning: for few images.
    """

    value: float
    low: float
    high: float
    n: int
    warning: str | None


def frechet_distance(features_a: Features, features_b: Features) -> float:
    """Fréchet distance between Gaussians fitted to two feature sets `[n, d]` and `[m, d]`; at least 0.

    `|mean_a - mean_b|^2 + tr(cov_a) + tr(cov_b) - 2 tr((cov_a cov_b)^1/2)`, covariances unbiased, in float64.
    With centred rows A and B the eigenvalues of `cov_a cov_b` are the squared singular values of `A B^T`, up
    to the counts, so no matrix root is taken and fewer images than features are no trouble.

    Raises:
        ValueError: fewer than two rows, unequal widths, or features that are not finite.
    """
    a, b = _checked(features_a, features_b, "Fréchet")
    return _frechet(a, b, np.ones(len(a), np.int64), np.ones(len(b), np.int64))


def frechet_interval(
    features_a: Features,
    features_b: Features,
    *,
    resamples: int = 200,
    confidence: float = 0.95,
    paired: bool = False,
    seed: int,
) -> FrechetEstimate:
    """The Fréchet distance with a basic (pivotal) bootstrap interval, by resampling the images.

    A Fréchet distance of n images is too large by about c/n, and that of a resample, whose repeated rows lose
    covariance rank, is too large by about as much again. Percentiles of the resamples are therefore off twice: often
    they do not reach the true distance at all. The basic interval, `2 value - quantile` (Davison and Hinkley, 1997,
    section 5.2), reflects them at the value, which takes the first-order bias away; it is cut at 0. On Gaussians it
    covers the true distance about as often as it says from four images for each direction the features vary in. With
    fewer the bias outgrows c/n, and the whole interval lies too high.

    Args:
        features_a, features_b: `[n, d]` and `[m, d]`.
        resamples: 200 make the ends good to about a twentieth of the interval; take 1,000 to quote them.
        confidence: between 0 and 1.
        paired: row i of both comes from one source image: the same rows are resampled on both sides, which keeps what
            they have in common out of the interval. Otherwise each side by itself.
        seed: of the resampling.

    Raises:
        ValueError: as `frechet_distance`; unequal counts of paired features, confidence or resamples out of range.
    """
    a, b = _checked(features_a, features_b, "Fréchet")
    if paired and len(a) != len(b):
        raise ValueError(f"paired features need one row a pair on both sides, not {len(a)} and {len(b)}")
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(
            f"confidence must lie between 0 and 1 and resamples be at least 1, not {confidence:g} and {resamples}"
        )
    if a.shape[1] > len(a) + len(b):
        # No resample leaves the span of all rows, so their coordinates in it do, and are shorter.
        basis = np.linalg.qr(np.concatenate([a, b]).T)[0]
        a, b = a @ basis, b @ basis
    rng = np.random.default_rng(seed)

    def draw(n: int) -> Counts:
        return np.bincount(rng.integers(n, size=n), minlength=n)

    distances = []
    for _ in range(resamples):
        counts = draw(len(a))
        distances.append(_frechet(a, b, counts, counts if paired else draw(len(b))))
    value = frechet_distance(features_a, features_b)
    tail = (1 - confidence) / 2
    lower, upper = np.quantile(distances, [tail, 1 - tail])
    n = min(len(a), len(b))
    return FrechetEstimate(
        value=value,
        low=max(0.0, float(2 * value - upper)),
        high=max(0.0, float(2 * value - lower)),
        n=n,
        warning=few_images(n),
    )


def few_images(n: int) -> str | None:
    """What to know of a Fréchet distance of so few images; None from 2,048 on."""
    if n >= ENOUGH:
        return None
    return (
        f"{n} images are fewer than {ENOUGH:,}: a Fréchet distance of so few is biased upwards; compare only at equal n"
    )


def kernel_distance(features_a: Features, features_b: Features, *, seed: int = 0) -> float:
    """Kernel distance (KID on Inception's features) by clean-fid: unbiased, so it may come out below 0.

    The squared maximum mean discrepancy of the kernel `(x y / d + 1)^3` (Binkowski et al., 2018), the mean over 100
    random subsets of at most 1,000 rows of each side; the seed chooses them, and numpy's global generator, which
    clean-fid draws from, is left as it was.

    Raises:
        ValueError: fewer than two rows, unequal widths, or features that are not finite.
    """
    from cleanfid import fid

    a, b = _checked(features_a, features_b, "kernel")
    # Subsets of everything are all alike: one will do.
    subsets = 1 if len(a) == len(b) <= 1000 else 100
    state = np.random.get_state()
    try:
        np.random.seed(seed)
        return float(fid.kernel_distance(a, b, num_subsets=subsets, max_subset_size=1000))
    finally:
        np.random.set_state(state)


def _checked(features_a: Features, features_b: Features, distance: str) -> tuple[Features, Features]:
    """Both in float64, fit for a distance of that name."""
    if features_a.ndim != 2 or features_b.ndim != 2 or features_a.shape[1] != features_b.shape[1]:
        raise ValueError(f"feature sets must be [n, d] of one d, not {features_a.shape} and {features_b.shape}")
    if min(len(features_a), len(features_b)) < 2:
        raise ValueError(
            f"a {distance} distance needs at least 2 images a side, not {len(features_a)} and {len(features_b)}"
        )
    a, b = features_a.astype(np.float64), features_b.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(f"features hold values that are not finite, so they have no {distance} distance")
    return a, b


def _frechet(a: Features, b: Features, counts_a: Counts, counts_b: Counts) -> float:
    """The Fréchet distance of two sets in which row i occurs `counts[i]` times."""
    (mean_a, a), (mean_b, b) = _centred(a, counts_a), _centred(b, counts_b)
    size = np.square(mean_a - mean_b).sum() + np.square(a).sum() + np.square(b).sum()
    overlap = np.linalg.svd(_root(a) @ _root(b).T, compute_uv=False).sum()
    return max(0.0, float(size - 2 * overlap))


def _centred(x: Features, counts: Counts) -> tuple[Features, Features]:
    """The mean `[d]`, and rows whose products `x^T x` are the unbiased covariance: one for each that occurs."""
    n = counts.sum()
    x, counts = x[counts > 0], counts[counts > 0]
    mean = counts @ x / n
    return mean, (x - mean) * np.sqrt(counts / (n - 1))[:, None]


def _root(x: Features) -> Features:
    """At most d rows of the same `x^T x`: x = QR keeps the singular values of `A B^T` in `R_a R_b^T`."""
    return np.asarray(np.linalg.qr(x, mode="r")) if len(x) > x.shape[1] else x
