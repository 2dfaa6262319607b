import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from e2gan.distances import ENOUGH, few_images, frechet_distance, frechet_interval, kernel_distance

rng = np.random.default_rng


def with_moments(n: int, mean: NDArray[np.float64], covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Features whose sample mean and unbiased covariance are exactly these."""
    rows = rng(n).normal(size=(n, len(mean)))
    rows -= rows.mean(axis=0)
    whitener = np.linalg.inv(np.linalg.cholesky(np.cov(rows.T))).T
    return rows @ whitener @ np.linalg.cholesky(covariance).T + mean


def test_frechet_closed_forms() -> None:
    # Covariances that commute: |m|^2 + sum (sqrt(a) - sqrt(b))^2.
    a = with_moments(50, np.zeros(3), np.diag([1.0, 4.0, 9.0]))
    b = with_moments(70, np.array([1.0, -2.0, 2.0]), np.diag([4.0, 4.0, 1.0]))
    assert frechet_distance(a, b) == pytest.approx(9 + 1 + 0 + 4)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(a, a + np.array([3, 4, 0])) == pytest.approx(25)
    # Two by two, tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)).
    s, t = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[5.0, -2.0], [-2.0, 1.0]])
    overlap = np.sqrt(np.trace(s @ t) + 2 * np.sqrt(np.linalg.det(s @ t)))
    expected = np.trace(s) + np.trace(t) - 2 * overlap
    features = with_moments(30, np.zeros(2), s), with_moments(20, np.zeros(2), t)
    assert frechet_distance(*features) == pytest.approx(expected)


@pytest.mark.parametrize(("n", "m", "d"), [(200, 150, 12), (400, 300, 118)])
def test_frechet_agrees_with_the_matrix_root(n: int, m: int, d: int) -> None:
    from scipy.linalg import sqrtm

    mixing = rng(0).normal(size=(d, d))
    a, b = rng(1).normal(size=(n, d)) @ mixing, rng(2).exponential(size=(m, d)) @ mixing.T + 1
    root = sqrtm(np.cov(a.T) @ np.cov(b.T))
    mean = np.square(a.mean(axis=0) - b.mean(axis=0)).sum()
    expected = mean + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_with_fewer_images_than_features() -> None:
    a, b = rng(0).normal(size=(7, 500)), rng(1).normal(size=(5, 500)) + 0.5
    # The same sets turned into the few dimensions they span, where nothing is singular.
    basis = np.linalg.qr(np.concatenate([a, b]).T)[0]
    assert basis.shape == (500, 12)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(a @ basis, b @ basis))
    assert frechet_distance(a, a[::-1]) == pytest.approx(0, abs=1e-9)
    # Spans at right angles have no overlap: the distance is the means' and both traces.
    c, d = np.zeros((4, 10)), np.zeros((3, 10))
    c[:, :5], d[:, 5:] = rng(2).normal(size=(4, 5)), rng(3).normal(size=(3, 5))
    expected = np.square(c.mean(axis=0) - d.mean(axis=0)).sum() + c.var(axis=0, ddof=1).sum()
    assert frechet_distance(c, d) == pytest.approx(expected + d.var(axis=0, ddof=1).sum())


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 8), st.integers(0, 10**6), st.floats(0.01, 100))
def test_frechet_properties(n: int, m: int, d: int, seed: int, scale: float) -> None:
    a, b = rng(seed).normal(size=(n, d)), rng(seed + 1).normal(size=(m, d))
    distance = frechet_distance(a, b)
    size = float(np.square(a).sum() + np.square(b).sum())
    close = {"rel": 1e-6, "abs": 1e-9 * size}
    assert distance >= 0
    assert frechet_distance(b, a) == pytest.approx(distance, **close)
    assert frechet_distance(a + 3, b + 3) == pytest.approx(distance, **close)
    assert frechet_distance(a * scale, b * scale) == pytest.approx(
        distance * scale**2, rel=1e-6, abs=1e-9 * size * scale**2
    )
    turn = np.linalg.qr(rng(seed + 2).normal(size=(d, d)))[0]
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(distance, **close)
    assert frechet_distance(a, a[rng(seed).permutation(n)]) == pytest.approx(0, abs=1e-9 * size)


def test_interval_is_the_pivotal_bootstrap_of_plain_resamples() -> None:
    """Against resamples made row by row, in the order the generator draws them; wide features go through their span."""
    for n, m, d in ((9, 7, 4), (6, 8, 40)):
        a, b = rng(0).normal(size=(n, d)), rng(1).normal(size=(m, d)) + 0.5
        draws = rng(5)
        resampled = []
        for _ in range(30):
            rows_a = draws.integers(n, size=n)
            resampled.append(frechet_distance(a[rows_a], b[draws.integers(m, size=m)]))
        estimate = frechet_interval(a, b, resamples=30, confidence=0.8, seed=5)
        value = frechet_distance(a, b)
        assert estimate.value == value
        assert estimate.low == pytest.approx(max(0, 2 * value - np.quantile(resampled, 0.9)), abs=1e-9)
        assert estimate.high == pytest.approx(max(0, 2 * value - np.quantile(resampled, 0.1)), abs=1e-9)
        assert estimate.n == min(n, m)
        assert frechet_interval(a, b, resamples=30, confidence=0.8, seed=5) == estimate


def test_pairs_are_resampled_together() -> None:
    a = rng(0).normal(size=(40, 3))
    same = frechet_interval(a, a + 2, resamples=40, paired=True, seed=0)
    # A shift of every image is the distance whichever pairs are drawn; drawn apart, the sides differ by more.
    assert same.low == pytest.approx(12) and same.high == pytest.approx(12)
    apart = frechet_interval(a, a + 2, resamples=40, seed=0)
    assert apart.high - apart.low > 1
    with pytest.raises(ValueError, match="one row a pair on both sides, not 40 and 39"):
        frechet_interval(a, a[:39], paired=True, seed=0)


@pytest.mark.parametrize(
    ("n", "d", "shift", "scale", "together"),
    [(100, 4, 1.0, 1.5, None), (60, 3, 0.5, 1.0, None), (150, 16, 1.0, 1.5, None), (100, 6, 1.0, 1.3, 0.8)],
)
def test_interval_covers_the_true_distance(n: int, d: int, shift: float, scale: float, together: float | None) -> None:
    """Gaussians N(0, 1) and N(shift, scale^2): the distance is shift^2 + d (1 - scale)^2. `together`: correlation."""
    true = shift**2 + d * (1 - scale) ** 2
    trials, covered, biased, reached = 80, 0, 0, 0
    for trial in range(trials):
        draws = rng(trial)
        a, b = draws.normal(size=(2, n, d))
        if together:
            b = together * a + math.sqrt(1 - together**2) * b
        b = b * scale + shift / math.sqrt(d)
        estimate = frechet_interval(a, b, resamples=100, confidence=0.9, paired=together is not None, seed=trial)
        covered += estimate.low <= true <= estimate.high
        biased += estimate.value > true
        # What the percentiles of the resamples would say: the interval reflected back at the value.
        reached += 2 * estimate.value - estimate.high <= true
    assert covered >= 0.8 * trials  # 0.9 wanted; three standard errors are 0.1
    assert biased > 0.55 * trials
    if d == 16:
        assert reached < 0.1 * trials, "percentiles alone would do here, so the reflection shows nothing"


def test_interval_of_equal_distributions_starts_at_nothing() -> None:
    lows = [frechet_interval(*rng(s).normal(size=(2, 80, 4)), resamples=60, seed=s).low for s in range(20)]
    assert sum(low == 0 for low in lows) >= 18


def test_few_images_are_warned_of() -> None:
    assert few_images(ENOUGH) is None
    assert few_images(100) == (
        "100 images are fewer than 2,048: a Fréchet distance of so few is biased upwards; compare only at equal n"
    )
    a = rng(0).normal(size=(ENOUGH, 2))
    assert frechet_interval(a, a, resamples=1, seed=0).warning is None
    assert frechet_interval(a, a[:-1], resamples=1, seed=0).warning == few_images(ENOUGH - 1)


def mmd(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Squared maximum mean discrepancy, unbiased, of the polynomial kernel, pair by pair."""

    def kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
        return float(sum(x * y) / len(x) + 1) ** 3

    within_a = [kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j]
    within_b = [kernel(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j]
    between = [kernel(x, y) for x in a for y in b]
    return float(np.mean(within_a) + np.mean(within_b) - 2 * np.mean(between))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(1, 6), st.integers(0, 10**6))
def test_kernel_distance_is_the_unbiased_discrepancy(n: int, d: int, seed: int) -> None:
    a, b = rng(seed).normal(size=(n, d)), rng(seed + 1).normal(size=(n, d)) + 0.5
    assert kernel_distance(a, b, seed=seed) == pytest.approx(mmd(a, b), rel=1e-9, abs=1e-9)


def test_kernel_distance_of_unequal_sets_takes_subsets() -> None:
    a, b = rng(0).normal(size=(12, 3)), rng(1).normal(size=(10, 3)) + 0.5
    found = [kernel_distance(a, b, seed=seed) for seed in range(6)]
    assert found[0] == kernel_distance(a, b, seed=0) != found[1]
    # Each is the mean of 100 draws of 10 of the 12, and their own mean is the discrepancy of all.
    assert np.mean(found) == pytest.approx(mmd(a, b), abs=5 * np.std(found) / math.sqrt(len(found)))


def test_kernel_distance_leaves_the_global_generator_alone() -> None:
    a = rng(0).normal(size=(5, 3))
    np.random.seed(42)
    wanted = np.random.random(3)
    np.random.seed(42)
    kernel_distance(a, a[:4], seed=7)
    np.testing.assert_array_equal(np.random.random(3), wanted)


def test_errors() -> None:
    good = rng(0).normal(size=(3, 2))
    for distance, name in ((frechet_distance, "Fréchet"), (kernel_distance, "kernel")):
        with pytest.raises(ValueError, match=f"a {name} distance needs at least 2 images a side, not 1 and 3"):
            distance(good[:1], good)
        with pytest.raises(ValueError, match=f"not finite, so they have no {name} distance"):
            distance(np.full((3, 2), np.inf), good)
        with pytest.raises(ValueError, match="of one d"):
            distance(good, np.zeros((3, 4)))
    for wrong in ({"confidence": 1.0}, {"confidence": 0.0}, {"resamples": 0}):
        with pytest.raises(ValueError, match="confidence must lie between 0 and 1 and resamples be at least 1"):
            frechet_interval(good, good, seed=0, **wrong)  # type: ignore[arg-type]
