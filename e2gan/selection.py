"""Which images to train on, and which concepts to pretrain on (E2GAN, sections 4.2.3 and 4.2.1).

Similarity clustering embeds every training image, finds as many K-means clusters as samples are wanted, and
keeps of each cluster the image nearest its centre. It looks at source images only, so it runs before any
teacher does. The base's concepts are chosen the same way, over each concept's mean embedding.

The paper compares both with random choices, which are here as well. Embeddings come from `e2gan.embeddings`.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from e2gan.embeddings import Embeddings

TIE = 1e-9
"""Squared distances closer than this, relative to the embeddings' variance, count as equal."""


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
    _check_count(k, ids)
    if k == len(ids):
        return sorted(ids)

    order = sorted(range(len(ids)), key=lambda index: ids[index])
    points = points[order]
    labels, centres = k_means(points, k, seed)
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


def random_sample(ids: Sequence[str], k: int, seed: int) -> list[str]:
    """k of the ids, each with equal chances: what the paper compares similarity clustering with (figure 7).

    The result depends on the set of ids and the seed, not on the ids' order.

    Returns:
        k distinct ids, sorted.

    Raises:
        ValueError: k is not 1 to the number of ids, or the ids are not distinct.
    """
    if len(set(ids)) != len(ids):
        raise ValueError(f"a random sample needs distinct ids: of {len(ids)} there are {len(set(ids))} different ones")
    _check_count(k, ids)
    return sorted(random.Random(seed).sample(sorted(ids), k))


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
    concepts = _not_reserved(means, k, reserved)
    vectors = [np.asarray(means[concept], np.float64) for concept in concepts]
    if any(vector.ndim != 1 or vector.shape != vectors[0].shape for vector in vectors):
        raise ValueError("mean embeddings of concepts must be vectors of one width; embed all the same way")
    return similarity_clusters(np.stack(vectors), concepts, k, seed)


def random_concepts(concepts: Collection[str], k: int, seed: int, reserved: Collection[str] = ()) -> list[str]:
    """k concepts to pretrain the base on, at random: what the paper compares `representative_concepts` with (table 4).

    Args:
        concepts: all there are.
        k, seed: how many, and of which draw.
        reserved: concepts kept back for evaluation, never chosen; they need not be among `concepts`.

    Returns:
        k distinct concepts, sorted.

    Raises:
        ValueError: k is out of range.
    """
    return random_sample(_not_reserved(concepts, k, reserved), k, seed)


def k_means(points: Embeddings, k: int, seed: int) -> tuple[NDArray[np.int32], Embeddings]:
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


def _check_count(k: int, ids: Sequence[str]) -> None:
    if not 1 <= k <= len(ids):
        raise ValueError(f"cannot choose {k} of {len(ids)}: ask for 1 to {len(ids)}, or provide more")


def _not_reserved(concepts: Collection[str], k: int, reserved: Collection[str]) -> list[str]:
    """The concepts to choose k from, sorted."""
    left = sorted(set(concepts) - set(reserved))
    if not 1 <= k <= len(left):
        raise ValueError(
            f"cannot choose {k} base concepts of the {len(left)} that are not reserved: "
            f"ask for 1 to {len(left)}, or reserve fewer"
        )
    return left
