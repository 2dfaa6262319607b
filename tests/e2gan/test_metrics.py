import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pictures import smooth
from torch import Tensor

from e2gan.distances import few_images, frechet_distance, frechet_interval, kernel_distance
from e2gan.features import CHUNK, CachedFeatures, UntrainedFeatures
from e2gan.metrics import (
    PSNR_CAP,
    append_record,
    contrast,
    each_image,
    evaluate,
    l1,
    mean_interval,
    psnr,
    ssim,
    variety,
)
from e2gan.pairs import to_bytes, to_unit


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


class MeanColour:
    name, kid_name, key = "fd_colour", "kd_colour", "colour"

    def __call__(self, images: Tensor) -> NDArray[np.float64]:
        return images.mean(dim=(2, 3)).double().numpy()


def test_evaluate_has_the_agreed_shape() -> None:
    target, source = smooth(CHUNK + 4), smooth(CHUNK + 4, seed=1)
    generated = (target * 0.9 + source * 0.1).clamp(-1, 1)
    scores = evaluate(generated, target, to_bytes(source), [UntrainedFeatures(), MeanColour()])
    assert list(scores) == ["n", "l1", "l1_untouched", "psnr", "ssim", "frechet", "kid", "warning"]
    assert list(scores["frechet"]) == ["fd_untrained", "fd_colour"]
    assert list(scores["kid"]) == ["kd_untrained", "kd_colour"]
    assert scores["n"] == CHUNK + 4
    assert scores["l1"] == l1(generated, target) < scores["l1_untouched"]
    colours = [side.mean(dim=(2, 3)).double().numpy() for side in (generated, target)]
    assert scores["frechet"]["fd_colour"] == frechet_distance(*colours)
    assert scores["kid"]["kd_colour"] == kernel_distance(*colours)
    assert scores["warning"] == few_images(CHUNK + 4)
    numbers = [scores["l1"], scores["ssim"], *scores["frechet"].values(), *scores["kid"].values()]
    assert all(type(value) is float for value in numbers)
    assert json.loads(json.dumps(scores)) == scores
    alone = evaluate(generated, target, source, [])
    assert alone["frechet"] == alone["kid"] == {} and alone["warning"] is None


def test_evaluate_resamples_pairs_when_asked(tmp_path: Path) -> None:
    target, source = smooth(12), smooth(12, seed=1)
    generated = (target * 0.9 + source * 0.1).clamp(-1, 1)
    extractor = CachedFeatures(UntrainedFeatures(), tmp_path)
    scores = evaluate(generated, target, source, [extractor], bootstrap=20, seed=3)
    features = UntrainedFeatures()(generated), UntrainedFeatures()(target)
    estimate = frechet_interval(*features, resamples=20, paired=True, seed=3)
    assert scores["frechet_interval"] == {"fd_untrained": vars(estimate)}
    assert estimate.value == scores["frechet"]["fd_untrained"]
    assert json.loads(json.dumps(scores)) == scores
    assert evaluate(generated, target, source, [extractor], bootstrap=20, seed=3) == scores


@pytest.mark.parametrize("level", [-1.0, 0.0, 1.0])
def test_images_of_one_colour_have_scores(level: float) -> None:
    flat = torch.full((3, 3, 16, 16), level)
    scores = evaluate(flat, flat, flat, [UntrainedFeatures()], bootstrap=5)
    assert (scores["l1"], scores["psnr"], scores["ssim"]) == (0, PSNR_CAP, pytest.approx(1))
    assert scores["frechet"]["fd_untrained"] == pytest.approx(0, abs=1e-9)
    assert scores["kid"]["kd_untrained"] == pytest.approx(0, abs=1e-9)


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
    bad = a.clone()
    bad[1, 2, 3, 4] = torch.nan
    with pytest.raises(ValueError, match="generated images hold values that are not finite: the training diverged"):
        evaluate(bad, a, a, [])
    with pytest.raises(ValueError, match="target images hold values that are not finite: make these edits anew"):
        evaluate(a, bad, a, [])
    with pytest.raises(ValueError, match="source images hold values that are not finite: leave these photos out"):
        evaluate(a, a, bad, [])


def test_records_are_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append_record(path, {"b": 1.5, "a": {"z": None, "y": "Fréchet\n"}})
    append_record(str(path), {"c": [1, 2]})
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines == ['{"a": {"y": "Fréchet\\n", "z": null}, "b": 1.5}', '{"c": [1, 2]}']
    for value in (float("nan"), float("inf"), [{"deep": -float("inf")}]):
        with pytest.raises(ValueError, match=r"a record for .*records.jsonl holds NaN or infinity"):
            append_record(path, {"score": value})
    assert path.read_text(encoding="utf-8").splitlines() == lines


def test_parallel_writers_do_not_mix_their_lines(tmp_path: Path) -> None:
    """Threads open the file each for itself, as processes do."""
    path = tmp_path / "records.jsonl"

    def write(number: int) -> None:
        append_record(path, {"number": number, "filling": "x" * 20_000})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(400)))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(record["number"] for record in records) == list(range(400))


def test_each_image_has_what_the_means_are_of() -> None:
    a, b = smooth(CHUNK + 3), smooth(CHUNK + 3, seed=1)
    found = each_image(a, b)
    for name, function in (("l1", l1), ("psnr", psnr), ("ssim", ssim)):
        alone = [function(x[None], y[None]) for x, y in zip(a, b, strict=True)]
        assert found[name] == pytest.approx(alone, abs=1e-6) and found[name].shape == (CHUNK + 3,)
        assert found[name].mean() == pytest.approx(function(a, b), abs=1e-12)
    with pytest.raises(ValueError, match="SSIM needs images of at least 11x11 pixels"):
        each_image(a[..., :10], b[..., :10])


@pytest.mark.parametrize("n", [2, 12, 300])
def test_the_interval_of_a_mean_agrees_with_scipys_bootstrap(n: int) -> None:
    from scipy.stats import bootstrap

    values = np.random.default_rng(n).gamma(2.0, size=n)
    found = mean_interval(values, resamples=9999, confidence=0.9, seed=1)
    options = {"n_resamples": 9999, "confidence_level": 0.9, "method": "percentile", "vectorized": True}
    theirs = bootstrap((values,), np.mean, rng=np.random.default_rng(2), **options).confidence_interval
    assert found == pytest.approx((theirs.low, theirs.high), abs=0.1 * values.std() / np.sqrt(n))
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
    assert n == 2 or mean_interval(values, seed=1) != mean_interval(values, seed=2)
    json.dumps(found)


def test_the_interval_of_many_values_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(3, 2, size=2000)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert mean_interval(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert mean_interval(np.full(5, 0.25)) == (0.25, 0.25)


def test_variety_and_contrast_by_brute_force() -> None:
    images = smooth(CHUNK + 5)
    n = len(images)
    pairs = [float((images[i] - images[j]).double().square().mean()) for i in range(n) for j in range(n) if i != j]
    assert variety(images) == pytest.approx(np.sqrt(np.mean(pairs)), rel=1e-6)
    spreads = [np.sqrt(np.mean([np.var(channel) for channel in image])) for image in images.double().numpy()]
    assert contrast(images) == pytest.approx(np.mean(spreads), rel=1e-6)
    assert contrast(to_bytes(images)) == pytest.approx(contrast(images), abs=0.01)
    assert variety(images[:1].expand_as(images)) == pytest.approx(0, abs=1e-7) and contrast(images[:1]) > 0
    colours = torch.rand(n, 3, 1, 1).expand(n, 3, 16, 16)
    assert contrast(colours) == pytest.approx(0, abs=1e-7) and variety(colours) > 0
    with pytest.raises(ValueError, match="at least two images, not 1"):
        variety(images[:1])
