import os
import warnings
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from e2gan.selection import (
    ClipImageEmbedding,
    representative_concepts,
    similarity_clusters,
    thumbnail_embedding,
)

DATA = Path(os.environ.get("FARM_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def names(n: int) -> list[str]:
    return [f"{index:04}" for index in range(n)]


def noise(n: int, height: int = 40, width: int = 40, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, height, width), generator=generator, dtype=torch.uint8)


def flat(*colour: int) -> Tensor:
    return torch.tensor(colour, dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 32, 32)


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
    with pytest.raises(ValueError, match="uint8"):
        thumbnail_embedding(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="uint8"):
        thumbnail_embedding(noise(0))


def test_thumbnail_of_flat_images_is_their_colour_in_oklab() -> None:
    white, red, black = (thumbnail_embedding(flat(*rgb))[0] for rgb in ((255,) * 3, (255, 0, 0), (0,) * 3))
    # Ottosson's own figures, of white and of sRGB red.
    np.testing.assert_allclose(white.reshape(5, 64)[:3, 0] * 8, [1, 0, 0], atol=1e-4)
    np.testing.assert_allclose(red.reshape(5, 64)[:3, 0] * 8, [0.62796, 0.22486, 0.12585], atol=1e-4)
    assert not white[192:].any()
    assert not black.any()
    assert np.linalg.norm(white - black) == pytest.approx(1.0, abs=1e-4)  # the colours' distance, over the image


def test_thumbnail_tells_directions_apart() -> None:
    ramp = torch.arange(64, dtype=torch.uint8).mul(4).expand(1, 3, 64, 64)
    across, down = thumbnail_embedding(ramp)[0, 192:], thumbnail_embedding(ramp.mT)[0, 192:]
    assert across.reshape(8, 16)[0].all() and not across.reshape(8, 16)[1:7].any()
    assert down.reshape(8, 16)[4].all() and not down.reshape(8, 16)[[0, 1, 2, 6, 7]].any()
    assert np.linalg.norm(across) == pytest.approx(0.5)
    flipped = thumbnail_embedding(ramp.flip(3))[0, 192:].reshape(8, 4, 4)[:, :, ::-1]
    np.testing.assert_allclose(flipped.ravel(), across, atol=1e-6)  # opposite directions are one


@pytest.mark.parametrize("size", [(1, 1), (7, 90), (64, 64), (200, 150)])
def test_thumbnail_takes_any_size(size: tuple[int, int]) -> None:
    images = noise(70, *size)
    embeddings = thumbnail_embedding(images)
    assert embeddings.shape == (70, 320)
    assert embeddings.dtype == np.float64
    assert np.isfinite(embeddings).all()
    np.testing.assert_allclose(thumbnail_embedding(images[66:67])[0], embeddings[66], rtol=1e-12, atol=1e-12)


def test_near_duplicates_lie_closer_than_other_photographs() -> None:
    from PIL import Image

    files = sorted((DATA / "photos").glob("*.jpg"))[:24]
    if not files:
        pytest.skip(f"no photographs under {DATA}; set FARM_TEST_DATA")
    photos = [Image.open(file).convert("RGB").resize((96, 96)) for file in files]
    brighter = [photo.point(lambda value: min(255, int(value * 1.1))) for photo in photos]
    images = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in photos + brighter])
    e = thumbnail_embedding(images)
    distances = np.linalg.norm(e[:24, None] - e[None, 24:], axis=2)
    assert (distances.argmin(axis=1) == np.arange(24)).all()
    # Clustering into as many as there are scenes keeps about one picture of each.
    chosen = similarity_clusters(e, [f"{i % 24:02}-{i // 24}" for i in range(48)], 24, seed=0)
    assert len({name[:2] for name in chosen}) >= 23


def test_clip_image_embedding_of_a_tiny_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=16,
    )
    model = transformers.CLIPVisionModelWithProjection(config).eval()
    model.save_pretrained(tmp_path)
    images = noise(3, 48, 64)
    embeddings = ClipImageEmbedding(tmp_path)(images)
    assert embeddings.shape == (3, 16)
    assert embeddings.dtype == np.float64
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1)

    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    with torch.no_grad():
        pixels = processor(list(images), return_tensors="pt")["pixel_values"]
        expected = torch.nn.functional.normalize(model(pixel_values=pixels).image_embeds, dim=1)
    np.testing.assert_allclose(embeddings, expected.numpy(), atol=2e-3)


def test_missing_clip_says_how_to_fetch_it(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"no CLIPVisionModelWithProjection at .*hf download"):
        ClipImageEmbedding(tmp_path)
    with pytest.raises(ValueError, match=r"at 'farm/no-such-model'.*hf download"):
        ClipImageEmbedding("farm/no-such-model")
