import itertools
import math
import warnings
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from e2gan.selection import k_means, random_concepts, random_sample, representative_concepts, similarity_clusters


def names(n: int) -> list[str]:
    return [f"{index:04}" for index in range(n)]


def test_best_partition_of_a_toy_by_brute_force() -> None:
    points = np.array([[0.0], [1.0], [1.4], [10.0], [10.3], [10.9], [30.0]])

    def cost(partition: tuple[int, ...]) -> float:
        parts = [points[np.array(partition) == part] for part in range(3)]
        return sum(float(((part - part.mean()) ** 2).sum()) for part in parts)

    labels = {p for p in np.ndindex(*[3] * 7) if len(set(p)) == 3}
    partition = np.array(min(labels, key=cost))
    expected = []
    for part in range(3):
        members = np.flatnonzero(partition == part)
        centre = points[members].mean()
        expected.append(f"{members[np.abs(points[members, 0] - centre).argmin()]:04}")
    assert similarity_clusters(points, names(7), 3, seed=0) == sorted(expected)


def within(points: NDArray[np.float64], labels: NDArray[np.int32]) -> float:
    """The within-cluster sum of squares."""
    clusters = [points[labels == label] for label in set(labels.tolist())]
    return sum(float(np.square(members - members.mean(axis=0)).sum()) for members in clusters)


def test_clusters_are_the_best_partition() -> None:
    """Against every partition. Lloyd's algorithm promises a local optimum: now and then ten starts miss the best."""
    missed = 0
    for case in range(60):
        rng = np.random.default_rng(case)
        n = int(rng.integers(2, 9))
        k = int(rng.integers(1, min(3, n) + 1))
        points = rng.normal(size=(n, rng.integers(1, 4)))
        least = min(within(points, np.array([0, *rest])) for rest in itertools.product(range(k), repeat=n - 1))
        found = []
        for seed in range(3):
            labels, centres = k_means(points, k, seed)
            found.append(float(np.square(points - centres[labels]).sum()))
            assert found[-1] == pytest.approx(within(points, labels))
            assert found[-1] >= least - 1e-12
        assert min(found) == pytest.approx(least)
        missed += found[0] > least + 1e-9
    assert missed <= 2


def test_planted_clusters_give_their_middles() -> None:
    rng = np.random.default_rng(0)
    middles = rng.normal(size=(12, 16)) * 20
    # Symmetric pairs around each middle, so that the middle itself is the member nearest the mean.
    offsets = rng.normal(size=(12, 4, 16))
    points = np.concatenate([middles, *(middles + side * offsets[:, i] for i in range(4) for side in (1, -1))])
    shuffled = rng.permutation(len(points))
    ids = [f"{index:04}" for index in shuffled]
    assert similarity_clusters(points[shuffled], ids, 12, seed=3) == names(12)


def test_chosen_belongs_to_its_own_cluster() -> None:
    # A hollow cluster: the points nearest its centre, the origin, all belong to the heap beside it.
    shell = np.concatenate([10 * np.eye(20), -10 * np.eye(20)])
    heap = np.full((30, 20), 5 / np.sqrt(20)) + 0.01 * np.random.default_rng(0).normal(size=(30, 20))
    ids = [f"shell{i:02}" for i in range(40)] + [f"heap{i:02}" for i in range(30)]
    chosen = similarity_clusters(np.concatenate([shell, heap]), ids, 2, seed=0)
    assert [name[:-2] for name in chosen] == ["heap", "shell"]


def test_order_of_the_input_does_not_matter() -> None:
    points = np.random.default_rng(1).normal(size=(60, 5))
    expected = similarity_clusters(points, names(60), 20, seed=7)
    shuffled = np.random.default_rng(2).permutation(60)
    assert similarity_clusters(points[shuffled], [names(60)[i] for i in shuffled], 20, seed=7) == expected
    assert similarity_clusters(points, names(60), 20, seed=7) == expected


@pytest.mark.parametrize("ids", list(permutations("abcd")))
def test_ties_go_to_the_lower_id(ids: tuple[str, ...]) -> None:
    # Either point of a pair is as near its centre as the other, but for rounding.
    points = np.array([[0.1], [0.3], [5.7], [5.9]])
    assert similarity_clusters(points, ids, 2, seed=0) == sorted([min(ids[:2]), min(ids[2:])])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_always_k_distinct_ids_and_no_warning(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 12))
    k = data.draw(st.integers(1, n))
    coordinates = data.draw(st.sampled_from([[0.0, 1.0, -3.0, 4.5], [0.0, 1e-12, 1.0, 1e6, -1e150]]))
    values = data.draw(st.lists(st.sampled_from(coordinates), min_size=2 * n, max_size=2 * n))
    points = np.array(values).reshape(n, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = similarity_clusters(points, names(n), k, seed=data.draw(st.integers(0, 5)))
    assert len(set(chosen)) == k
    assert chosen == sorted(chosen)
    assert set(chosen) <= set(names(n))
    if 4.5 in coordinates:  # far enough apart to be told apart: nothing is taken twice before all are taken
        kept = points[[int(name) for name in chosen]]
        assert len(np.unique(kept, axis=0)) == min(k, len(np.unique(points, axis=0)))


def test_coinciding_points() -> None:
    assert similarity_clusters(np.ones((6, 3)), list("fedcba"), 4, seed=0) == ["a", "b", "c", "d"]
    points = np.repeat([[0.0, 0.0], [5.0, 0.0], [9.0, 9.0]], [4, 1, 1], axis=0)
    assert similarity_clusters(points, list("abcdef"), 4, seed=0) == ["a", "b", "e", "f"]
    close = np.concatenate([np.zeros((5, 2)), np.full((5, 2), 1e-300), [[1.0, 1.0]]])
    assert len(set(similarity_clusters(close, names(11), 6, seed=0))) == 6


def test_all_of_them() -> None:
    assert similarity_clusters(np.zeros((3, 1)), ["c", "a", "b"], 3, seed=0) == ["a", "b", "c"]


def test_representative_concepts() -> None:
    means = {
        "oil": [0.0, 0.0],
        "ink": [0.1, 0.0],
        "hulk": [9.0, 0.0],
        "joker": [9.1, 0.0],
        "fog": [9.05, 0.0],
    }
    assert representative_concepts(means, 2, seed=0) == ["fog", "ink"]
    assert representative_concepts(means, 2, seed=0, reserved=["fog", "ink", "unheard-of"]) == ["hulk", "oil"]
    with pytest.raises(ValueError, match="cannot choose 4 base concepts of the 3 that are not reserved"):
        representative_concepts(means, 4, seed=0, reserved=["fog", "ink"])
    with pytest.raises(ValueError, match="one width"):
        representative_concepts({"a": [1.0], "b": [1.0, 2.0]}, 1, seed=0)


@given(st.sets(st.text(max_size=3), min_size=1, max_size=12), st.data())
def test_random_sample_is_a_function_of_the_set(ids: set[str], data: st.DataObject) -> None:
    k, seed = data.draw(st.integers(1, len(ids))), data.draw(st.integers(0, 2**32))
    chosen = random_sample(sorted(ids), k, seed)
    assert chosen == sorted(chosen) and len(set(chosen)) == k and set(chosen) <= ids
    assert random_sample(data.draw(st.permutations(sorted(ids))), k, seed) == chosen


def test_random_sample_gives_equal_chances() -> None:
    found = Counter(tuple(random_sample(names(5), 2, seed)) for seed in range(1000))
    assert set(found) == set(itertools.combinations(names(5), 2))
    assert all(abs(count - 100) < 5 * math.sqrt(100) for count in found.values())


def test_random_concepts() -> None:
    concepts = ["oil", "ink", "hulk", "joker", "fog"]
    drawn = [random_concepts(concepts, 2, seed, reserved=["fog", "unheard-of"]) for seed in range(60)]
    assert {tuple(one) for one in drawn} == set(itertools.combinations(["hulk", "ink", "joker", "oil"], 2))
    assert random_concepts(set(concepts), 2, 3, reserved=["fog"]) == drawn[3]
    with pytest.raises(ValueError, match="cannot choose 5 base concepts of the 4 that are not reserved"):
        random_concepts(concepts, 5, seed=0, reserved=["fog"])


def test_errors() -> None:
    points = np.zeros((3, 2))
    with pytest.raises(ValueError, match="cannot choose 4 of 3: ask for 1 to 3"):
        similarity_clusters(points, names(3), 4, seed=0)
    with pytest.raises(ValueError, match="cannot choose 0 of 3"):
        similarity_clusters(points, names(3), 0, seed=0)
    with pytest.raises(ValueError, match="distinct ids"):
        similarity_clusters(points, ["a", "a", "b"], 1, seed=0)
    with pytest.raises(ValueError, match="distinct ids"):
        similarity_clusters(points, names(2), 1, seed=0)
    with pytest.raises(ValueError, match="not finite"):
        similarity_clusters(points + np.nan, names(3), 1, seed=0)
    with pytest.raises(ValueError, match="cannot choose 4 of 3: ask for 1 to 3"):
        random_sample(names(3), 4, seed=0)
    with pytest.raises(ValueError, match="distinct ids: of 3 there are 2 different ones"):
        random_sample(["a", "a", "b"], 1, seed=0)
