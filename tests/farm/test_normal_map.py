from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_controlnet import DEPTH_SIDE, depth_network

from farm.editors.normal_map import NormalMaps, Z, normal_map, normals

CPU = torch.device("cpu")

INSIDE = slice(1, -1)
"""Pixels whose slope does not reach over the image's border."""


def grid(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each pixel's x, to the right, and y, downwards, from the image's middle."""
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    return x - (width - 1) / 2, y - (height - 1) / 2


@settings(max_examples=25, deadline=None)
@given(slope_x=st.floats(-3, 3), slope_y=st.floats(-3, 3), height=st.integers(3, 12), width=st.integers(3, 12))
def test_a_plane_has_the_normal_of_its_slope(slope_x: float, slope_y: float, height: int, width: int) -> None:
    """Sobel's kernel makes eight times the slope of a plane."""
    x, y = grid(height, width)
    found = normals((slope_x * x + slope_y * y)[None], background_threshold=0)[0]
    expected = torch.tensor([8 * slope_x, 8 * slope_y, Z])
    expected /= expected.norm()
    assert torch.allclose(
        found[:, INSIDE, INSIDE], expected[:, None, None].expand(-1, height - 2, width - 2), atol=1e-5
    )


def test_the_normals_of_a_ball_point_outwards() -> None:
    """The red of what faces left is bright, the green of what faces up, and the blue of what faces the viewer."""
    x, y = grid(65, 65)
    radius = 60.0
    nearness = (radius**2 - x**2 - y**2).sqrt()
    found = normals(nearness[None], background_threshold=0)[0][:, INSIDE, INSIDE]
    outwards = torch.stack([-x, -y, nearness])[:, INSIDE, INSIDE] / radius
    in_image, expected = found[:2].flatten(1), outwards[:2].flatten(1)
    off_centre = expected.norm(dim=0) > 0.05
    cosine = torch.cosine_similarity(in_image, expected, dim=0)[off_centre]
    assert cosine.min() > 0.999
    # Sobel's eight and z's 2 pi tilt all alike: tan of the angle to the viewer is 8 / (2 pi) that of the ball.
    tilt = (found[:2].norm(dim=0) / found[2])[INSIDE, INSIDE]
    assert torch.allclose(tilt, 8 / Z * (outwards[:2].norm(dim=0) / outwards[2])[INSIDE, INSIDE], atol=2e-2)
    colours = normal_map(found[None])[0]
    middle = colours.shape[-1] // 2
    assert colours[0, middle, 0] > 180 > 80 > colours[0, middle, -1]
    assert colours[1, 0, middle] > 180 > 80 > colours[1, -1, middle]
    assert colours[:, middle, middle].tolist() == [127, 127, 255]


@pytest.mark.parametrize("level", [0.0, 1e-30, 700.0])
def test_what_is_flat_faces_the_viewer(level: float) -> None:
    found = normals(torch.full((2, 6, 7), level), background_threshold=0.4)
    assert torch.equal(found, torch.tensor([0.0, 0.0, 1.0])[None, :, None, None].expand(2, 3, 6, 7))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), threshold=st.floats(0, 1), size=st.tuples(st.integers(2, 20), st.integers(2, 20)))
def test_slopes_are_those_of_opencv_and_the_background_has_none(
    seed: int, threshold: float, size: tuple[int, int]
) -> None:
    depth = np.random.default_rng(seed).gamma(1, 3, size).astype(np.float32) + 20
    found = normals(torch.from_numpy(depth)[None], threshold)[0].numpy()
    nearness = (depth - depth.min()) / (depth.max() - depth.min())
    certain = np.abs(nearness - threshold) > 1e-4
    kept = nearness >= threshold
    x = cv2.Sobel(depth, cv2.CV_32F, 1, 0, ksize=3) * kept
    y = cv2.Sobel(depth, cv2.CV_32F, 0, 1, ksize=3) * kept
    expected = np.stack([x, y, np.full_like(x, Z)]) / np.sqrt(x**2 + y**2 + Z**2)
    assert np.allclose(found[:, certain], expected[:, certain], atol=1e-4)
    assert (found[:, certain & ~kept] == np.array([[0], [0], [1]])).all()
    assert np.allclose((found**2).sum(0), 1, atol=1e-5)


def test_an_image_s_depth_range_is_its_own() -> None:
    near, far = torch.rand(1, 9, 9), torch.rand(1, 9, 9) * 100 + 50
    together = normals(torch.cat([near, far]), 0.4)
    assert torch.equal(together, torch.cat([normals(near, 0.4), normals(far, 0.4)]))


def photo(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Blurred noise, `[3, height, width]` of whole levels in 0..1."""
    small = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    large = torch.nn.functional.interpolate(small, (height, width), mode="bicubic").clamp(0, 1)
    return (large[0] * 255).round() / 255


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return depth_network(tmp_path_factory.mktemp("depth"))


@pytest.fixture
def network(folder: Path) -> tuple[Any, Any]:
    from transformers import DPTForDepthEstimation, DPTImageProcessor

    estimator = DPTForDepthEstimation.from_pretrained(folder).eval()
    return estimator, DPTImageProcessor.from_pretrained(folder)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 96), (120, 72), (200, 200)])
def test_maps_are_those_of_the_model_card(network: tuple[Any, Any], height: int, width: int) -> None:
    """Its recipe in NumPy and OpenCV, on the photo's true proportions."""
    estimator, processor = network
    pixels = photo(height, width).permute(1, 2, 0).numpy()
    with torch.no_grad():
        depth = estimator(**processor(images=pixels, do_rescale=False, return_tensors="pt")).predicted_depth[0].numpy()
    assert depth.shape == (DEPTH_SIDE, DEPTH_SIDE)
    scale = DEPTH_SIDE / min(height, width)
    depth = cv2.resize(depth, (round(width * scale), round(height * scale)))
    nearness = (depth - depth.min()) / (depth.max() - depth.min())
    x, y = cv2.Sobel(depth, cv2.CV_32F, 1, 0, ksize=3), cv2.Sobel(depth, cv2.CV_32F, 0, 1, ksize=3)
    x[nearness < 0.4] = 0
    y[nearness < 0.4] = 0
    vectors = np.stack([x, y, np.full_like(x, np.pi * 2)], axis=2)
    vectors /= (vectors**2).sum(2, keepdims=True) ** 0.5
    expected = cv2.resize((vectors * 127.5 + 127.5).clip(0, 255).astype(np.uint8), (width, height))

    found = NormalMaps(estimator, processor, 0.4).of(photo(height, width)[None], CPU)
    assert found.shape == (1, 3, height, width)
    error = np.abs(found[0].permute(1, 2, 0).numpy() * 255 - expected)
    assert error.max() < 1.5
    assert expected.std((0, 1)).min() > 5


def test_a_photo_s_map_is_made_once_and_alone(network: tuple[Any, Any]) -> None:
    estimator, processor = network
    calls = []
    estimator.register_forward_hook(lambda _, given, made: calls.append(len(given[0])))
    maps = NormalMaps(estimator, processor, 0.4)
    photos = torch.stack([photo(40, 64, seed) for seed in range(3)])
    first = maps.of(photos[:2], CPU)
    both = maps.of(photos[[2, 0, 2, 1]], CPU)
    assert calls == [1, 1, 1]
    assert torch.equal(both[[1, 3]], first)
    assert torch.equal(both[0], both[2])
    alone = NormalMaps(estimator, processor, 0.4).of(photos[2:], CPU)
    assert torch.equal(alone[0], both[0])
    # The same bytes in another shape are another photo.
    maps.of(photos[:1].reshape(1, 3, 64, 40), CPU)
    assert len(calls) == 5


def test_only_so_many_maps_are_kept(network: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    estimator, processor = network
    photos = torch.stack([photo(32, 32, seed) for seed in range(3)])
    unbounded = NormalMaps(estimator, processor, 0.4).of(photos, CPU)
    monkeypatch.setattr("farm.editors.normal_map.KEPT_MAPS", 2)
    calls = []
    estimator.register_forward_hook(lambda *_: calls.append(1))
    maps = NormalMaps(estimator, processor, 0.4)
    assert torch.equal(maps.of(photos, CPU), unbounded)  # a batch may be of more
    calls.clear()
    made = []
    for index in (1, 0, 1, 2, 1, 0):  # the one least recently asked for makes room
        assert torch.equal(maps.of(photos[index : index + 1], CPU), unbounded[index : index + 1])
        made.append(len(calls))
    assert made == [0, 1, 1, 2, 2, 3]
