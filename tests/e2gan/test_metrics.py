import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from e2gan.metrics import (
    CHUNK,
    PSNR_CAP,
    CleanFidFeatures,
    UntrainedFeatures,
    evaluate,
    frechet_distance,
    l1,
    psnr,
    ssim,
)
from e2gan.pairs import to_bytes, to_unit

rng = np.random.default_rng


def smooth(n: int, size: int = 32, seed: int = 0) -> Tensor:
    """Pictures with large and small structure, float -1..1."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, size // 8, size // 8, generator=generator)
    fine = torch.rand(n, 3, size, size, generator=generator)
    upscaled = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    return (0.8 * upscaled + 0.2 * fine) * 2 - 1


def test_paired_metrics_agree_with_skimage() -> None:
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    a = smooth(CHUNK + 3)[..., :24]
    b = (a + 0.3 * smooth(CHUNK + 3, seed=1)[..., :24]).clamp(-1, 1)
    expected_ssim, expected_psnr = [], []
    for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True):
        expected_psnr.append(peak_signal_noise_ratio(x, y, data_range=2))
        expected_ssim.append(
            structural_similarity(
                x,
                y,
                data_range=2,
                channel_axis=0,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
            )
        )
    assert ssim(a, b) == pytest.approx(np.mean(expected_ssim), abs=1e-5)
    assert psnr(a, b) == pytest.approx(np.mean(expected_psnr), abs=1e-4)
    assert l1(a, b) == pytest.approx((a - b).abs().mean().item(), rel=1e-5)


def test_paired_metrics_of_known_images() -> None:
    a, b = torch.full((2, 3, 16, 16), -1.0), torch.full((2, 3, 16, 16), 1.0)
    b[1] = a[1]
    assert l1(a, b) == 1.0
    assert psnr(a, b) == (0 + PSNR_CAP) / 2
    # Flat -1 against flat 1: the variances vanish, (2 mean mean + c1) / (mean^2 + mean^2 + c1) is left.
    assert ssim(a[:1], b[:1]) == pytest.approx((-2 + 0.0004) / (2 + 0.0004), abs=1e-6)


def test_bytes_are_taken_as_the_pairs_keep_them() -> None:
    a, b = to_bytes(smooth(3)), to_bytes(smooth(3, seed=1))
    assert l1(a, b) == l1(to_unit(a), to_unit(b))
    assert ssim(a, b) == ssim(to_unit(a), b)


def test_untrained_features_are_fixed_and_leave_the_global_generator_alone() -> None:
    images = smooth(CHUNK + 2)
    before = torch.get_rng_state()
    features = UntrainedFeatures()(images)
    assert torch.equal(torch.get_rng_state(), before)
    assert features.shape == (CHUNK + 2, 118)
    assert features.dtype == np.float64
    torch.manual_seed(99)
    np.testing.assert_array_equal(UntrainedFeatures()(images), features)
    np.testing.assert_allclose(UntrainedFeatures()(images[-1:])[0], features[-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(features[:, :3], images.mean(dim=(2, 3)).numpy(), atol=1e-6)


def test_untrained_distance_grows_with_the_harm() -> None:
    extractor = UntrainedFeatures()
    images = smooth(80)
    target = extractor(images)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(images.shape, generator=generator)
    distances = [
        frechet_distance(extractor((images + level * noise).clamp(-1, 1)), target) for level in (0, 0.05, 0.1, 0.2, 0.4)
    ]
    assert distances == sorted(distances)
    assert distances[0] == pytest.approx(0, abs=1e-9)
    assert distances[-1] > 20 * distances[1]


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


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(11, 20), st.integers(11, 20), st.integers(0, 10**6))
def test_paired_properties(n: int, height: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.rand(n, 3, height, width, generator=generator) * 2 - 1 for _ in range(2))
    assert 0 < l1(a, b) == l1(b, a) <= 2
    assert -1 <= ssim(a, b) < 1
    assert ssim(a, b) == pytest.approx(ssim(b, a), abs=1e-6)
    assert ssim(a, a) == pytest.approx(1, abs=1e-6)
    assert l1(a, a) == 0
    assert psnr(a, a) == PSNR_CAP > psnr(a, b) == psnr(b, a)


def test_evaluate_has_the_agreed_shape() -> None:
    class MeanColour:
        name = "fd_colour"

        def __call__(self, images: Tensor) -> NDArray[np.float64]:
            assert len(images) <= CHUNK
            assert images.dtype == torch.float32
            return images.mean(dim=(2, 3)).double().numpy()

    target, source = smooth(CHUNK + 4), smooth(CHUNK + 4, seed=1)
    generated = (target * 0.9 + source * 0.1).clamp(-1, 1)
    scores = evaluate(generated, target, to_bytes(source), [UntrainedFeatures(), MeanColour()])
    assert list(scores) == ["n", "l1", "l1_untouched", "psnr", "ssim", "frechet"]
    assert list(scores["frechet"]) == ["fd_untrained", "fd_colour"]
    assert scores["n"] == CHUNK + 4
    assert scores["l1"] == l1(generated, target) < scores["l1_untouched"]
    colours = (side.mean(dim=(2, 3)).double().numpy() for side in (generated, target))
    assert scores["frechet"]["fd_colour"] == pytest.approx(frechet_distance(*colours), rel=1e-4)
    assert all(type(value) is float for value in [scores["l1"], scores["ssim"], *scores["frechet"].values()])


def test_errors() -> None:
    a = smooth(2)
    with pytest.raises(ValueError, match="equal stacks"):
        l1(a, a[:1])
    with pytest.raises(ValueError, match="equal stacks"):
        psnr(a[:0], a[:0])
    with pytest.raises(ValueError, match="equal stacks"):
        ssim(a[0], a[0])
    with pytest.raises(ValueError, match="at least 11x11 pixels, not 10x32"):
        ssim(a[:, :, :10], a[:, :, :10])
    with pytest.raises(ValueError, match="at least 2 images a side, not 1 and 1"):
        evaluate(a[:1], a[:1], a[:1], [UntrainedFeatures()])
    with pytest.raises(ValueError, match="diverged"):
        evaluate(a * torch.nan, a, a, [])
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(np.full((3, 2), np.inf), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="of one d"):
        frechet_distance(np.zeros((3, 2)), np.zeros((3, 4)))


class StandInLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 128, 74, stride=75)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x)).flatten(1)


class StandIn(nn.Module):
    """What clean-fid uses of its Inception: `layers`, from 299x299 to 2,048 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = StandInLayers()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.fixture(scope="module")
def inception_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inception")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(StandIn()).save(folder / "inception-2015-12-05.pt")
    return folder


def test_clean_fid_features_are_those_of_the_package(inception_folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    images = smooth(5, size=48)
    for index, image in enumerate(to_bytes(images)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{index}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cleanfid import fid
        from cleanfid.inception_torchscript import InceptionV3W

        model = InceptionV3W(str(inception_folder), download=False)
        expected = fid.get_folder_features(
            str(tmp_path), model, num_workers=0, mode="clean", device=torch.device("cpu"), verbose=False
        )
    extractor = CleanFidFeatures(inception_folder)
    features = extractor(images)
    assert extractor.name == "clean_fid"
    assert features.shape == (5, 2048)
    assert features.dtype == np.float64
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-6)
    by_file = CleanFidFeatures(inception_folder / "inception-2015-12-05.pt")(to_bytes(images))
    np.testing.assert_array_equal(by_file, features)


def test_clean_fid_weights_come_only_when_asked_for(
    inception_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object) -> None:
        pytest.fail("nobody asked for a download")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    missing = tmp_path / "a" / "inception-2015-12-05.pt"
    with pytest.raises(ValueError, match=rf"missing at {missing}: put https://\S+inception-2015-12-05.pt there"):
        CleanFidFeatures(missing.parent)
    with pytest.raises(ValueError, match="loads Inception weights from a file named"):
        CleanFidFeatures(tmp_path / "other.pt")
    assert not missing.parent.exists()

    monkeypatch.setattr("urllib.request.urlopen", lambda _: (inception_folder / "inception-2015-12-05.pt").open("rb"))
    assert CleanFidFeatures(missing.parent, download=True)(smooth(2)).shape == (2, 2048)
    assert [file.name for file in missing.parent.iterdir()] == [missing.name]
