"""How good the generated images are: paired metrics and Fréchet distances (E2GAN, section 5.1).

Feature extraction is apart from the arithmetic, and a Fréchet distance carries the name of its features: on
the Inception weights of Clean-FID it is `clean_fid`; on the embedded random network, which needs no weights,
it is `fd_untrained`. The two are not comparable, nor is either comparable with plain FID.

Images are float `[n, 3, height, width]` in -1..1 or, as in `Pairs`, uint8 0..255, and are taken in chunks.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from e2gan.pairs import to_bytes, to_unit

Features = NDArray[np.float64]
"""Float64 `[n, d]`, one row an image."""

CHUNK = 32
PSNR_CAP = 100.0
"""The PSNR, in dB, given to identical images, whose own is infinite."""


class FeatureExtractor(Protocol):
    """Turns images into feature vectors, each image by itself."""

    @property
    def name(self) -> str:
        """The name of the Fréchet distance these features yield, e.g. `fd_untrained`."""

    def __call__(self, images: Tensor) -> Features:
        """Images `[n, 3, height, width]` in -1..1 to float64 `[n, d]`."""


class Scores(TypedDict):
    """What `evaluate` returns; every value can be written as JSON.

    n: images. l1, psnr, ssim: generated to target. l1_untouched: source to target, what doing nothing would
    score. frechet: extractor name to the distance between generated and target.
    """

    n: int
    l1: float
    l1_untouched: float
    psnr: float
    ssim: float
    frechet: dict[str, float]


def l1(a: Tensor, b: Tensor) -> float:
    """Mean absolute difference, 0..2 for images in -1..1.

    Raises:
        ValueError: not two equal stacks of at least one RGB image.
    """
    return _mean(lambda x, y: (x - y).abs().mean(dim=(1, 2, 3)), a, b)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB: each image's own (data range 2, at most `PSNR_CAP`), then their mean.

    Raises:
        ValueError: not two equal stacks of at least one RGB image.
    """

    def per_image(x: Tensor, y: Tensor) -> Tensor:
        error = (x - y).double().square().mean(dim=(1, 2, 3))
        return (10 * torch.log10(4 / error)).clamp(max=PSNR_CAP)

    return _mean(per_image, a, b)


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity, -1..1 (Wang et al., 2004): 11x11 Gaussian window, sigma 1.5, data range 2.

    The mean over windows that lie inside the image, over channels and over images.

    Raises:
        ValueError: not two equal stacks of at least one RGB image, or a side below 11 pixels.
    """
    _check_pair(a, b)
    if min(a.shape[2:]) < 11:
        raise ValueError(f"SSIM needs images of at least 11x11 pixels, not {a.shape[2]}x{a.shape[3]}")
    window = torch.exp(-torch.arange(-5, 6, dtype=torch.float64).square() / (2 * 1.5**2))
    window = window / window.sum()
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2

    def band(size: int) -> Tensor:
        """`[size - 10, size]`, the window in every row one further along: a convolution as a product."""
        rows = torch.zeros(size - 10, size)
        for offset, weight in enumerate(window.tolist()):
            rows.diagonal(offset).fill_(weight)
        return rows.to(a.device)

    down, across = band(a.shape[2]), band(a.shape[3]).mT

    def blur(x: Tensor) -> Tensor:
        return down @ x @ across

    def per_image(x: Tensor, y: Tensor) -> Tensor:
        mean_x, mean_y = blur(x), blur(y)
        var_x, var_y = blur(x * x) - mean_x * mean_x, blur(y * y) - mean_y * mean_y
        cov = blur(x * y) - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
        return (luminance * (2 * cov + c2) / (var_x + var_y + c2)).mean(dim=(1, 2, 3))

    return _mean(per_image, a, b)


class UntrainedFeatures:
    """Features of a small random convolution network, fixed by its seed: no weights, no download.

    Mean and standard deviation of every channel, of the image itself and after each of three strided
    convolutions: 118 numbers an image. Good enough to rank runs of one farm against each other; never to be
    called FID.
    """

    name = "fd_untrained"

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._kernels = [
            torch.randn(width, previous, 4, 4, generator=generator) * math.sqrt(2 / (previous * 16))
            for previous, width in ((3, 8), (8, 16), (16, 32))
        ]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Images `[n, 3, height, width]`, sides of at least 8, to float64 `[n, 118]`."""
        return np.concatenate([self._features(chunk) for chunk in _chunks(images)])

    def _features(self, x: Tensor) -> Features:
        levels = [x]
        for kernel in self._kernels:
            x = F.leaky_relu(F.conv2d(x, kernel.to(x.device), stride=2, padding=1), 0.2)
            levels.append(x)
        flat = [level.flatten(2) for level in levels]
        features = [part for level in flat for part in (level.mean(dim=2), level.std(dim=2, correction=0))]
        return torch.cat(features, dim=1).double().cpu().numpy()


class CleanFidFeatures:
    """Inception features the way Clean-FID makes them (Parmar et al., CVPR 2022): 2,048 numbers an image.

    Images are quantised to 0..255 as its PNG files are, resized to 299x299 by its own resizer (PIL bicubic,
    no quantisation after), and pass through its TorchScript Inception-V3.

    Args:
        path: the weights file `inception-2015-12-05.pt` or its folder; by default where clean-fid keeps it
            (/tmp).
        download: fetch the file into that folder if it is missing. Off, nothing ever touches the network.
        device: where the network runs.

    Raises:
        ValueError: the weights are not there and `download` is off.
        OSError: the download failed.
    """

    name = "clean_fid"

    def __init__(self, path: str | Path | None = None, *, download: bool = False, device: str = "cpu") -> None:
        from cleanfid.downloads_helper import check_download_inception, inception_url
        from cleanfid.inception_torchscript import InceptionV3W
        from cleanfid.resize import build_resizer

        file_name = inception_url.rsplit("/", 1)[-1]
        file = Path("/tmp" if path is None else path)
        if file.suffix != ".pt":
            file = file / file_name
        if file.name != file_name:
            raise ValueError(f"clean-fid loads Inception weights from a file named {file_name}, not {file}")
        if not file.exists():
            if not download:
                raise ValueError(
                    f"Inception weights for clean_fid are missing at {file}: put {inception_url} there, "
                    f"or ask for the download"
                )
            # Into a folder of its own first: another process must never load half a file.
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=file.parent) as folder:
                Path(check_download_inception(fpath=folder)).replace(file)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit")
            self._model = InceptionV3W(str(file.parent), download=False).to(device)
        self._resize: Callable[[NDArray[np.uint8]], NDArray[np.float32]] = build_resizer("clean")
        self._device = device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Images `[n, 3, height, width]` to float64 `[n, 2048]`."""
        features = []
        for chunk in _chunks(images):
            raw = to_bytes(chunk).permute(0, 2, 3, 1).cpu().numpy()
            resized = np.stack([self._resize(image) for image in raw]).transpose(0, 3, 1, 2)
            batch = torch.from_numpy(np.ascontiguousarray(resized)).to(self._device)
            features.append(self._model(batch).double().cpu().numpy())
        return np.concatenate(features)


def frechet_distance(features_a: Features, features_b: Features) -> float:
    """Fréchet distance between Gaussians fitted to two feature sets `[n, d]` and `[m, d]`; at least 0.

    `|mean_a - mean_b|^2 + tr(cov_a) + tr(cov_b) - 2 tr((cov_a cov_b)^1/2)`, covariances unbiased, in float64.
    With centred rows A and B the eigenvalues of `cov_a cov_b` are the squared singular values of `A B^T`, up
    to the counts, so no matrix root is taken and fewer images than features are no trouble.

    Raises:
        ValueError: fewer than two rows, unequal widths, or features that are not finite.
    """
    if features_a.ndim != 2 or features_b.ndim != 2 or features_a.shape[1] != features_b.shape[1]:
        raise ValueError(f"feature sets must be [n, d] of one d, not {features_a.shape} and {features_b.shape}")
    if min(len(features_a), len(features_b)) < 2:
        raise ValueError(
            f"a Fréchet distance needs at least 2 images a side, not {len(features_a)} and {len(features_b)}"
        )
    a, b = features_a.astype(np.float64), features_b.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("features hold values that are not finite, so they have no Fréchet distance")
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    a, b = (a - mean_a) / math.sqrt(len(a) - 1), (b - mean_b) / math.sqrt(len(b) - 1)
    # A = QR keeps the singular values of A B^T in R_a R_b^T, which is never larger than [d, d].
    root_a, root_b = (np.asarray(np.linalg.qr(side, mode="r")) for side in (a, b))
    overlap = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    distance = np.square(mean_a - mean_b).sum() + np.square(a).sum() + np.square(b).sum() - 2 * overlap
    return max(0.0, float(distance))


def evaluate(generated: Tensor, target: Tensor, untouched: Tensor, extractors: Sequence[FeatureExtractor]) -> Scores:
    """Score generated images against the teacher's, pair by pair and as sets.

    Args:
        generated, target, untouched: `[n, 3, height, width]`, the student's and the teacher's image of each
            source and the source itself.
        extractors: one Fréchet distance each, between generated and target; none is fine.

    Raises:
        ValueError: the stacks differ in shape or are empty, a side is below 11 pixels, generated values are
            not finite, or there are fewer than two images for a Fréchet distance.
    """
    if not all(torch.isfinite(chunk).all() for chunk in _chunks(generated)):
        raise ValueError("the generated images hold values that are not finite: the training diverged")
    scores = Scores(
        n=len(generated),
        l1=l1(generated, target),
        l1_untouched=l1(untouched, target),
        psnr=psnr(generated, target),
        ssim=ssim(generated, target),
        frechet={},
    )
    for extractor in extractors:
        of_generated = np.concatenate([extractor(chunk) for chunk in _chunks(generated)])
        of_target = np.concatenate([extractor(chunk) for chunk in _chunks(target)])
        scores["frechet"][extractor.name] = frechet_distance(of_generated, of_target)
    return scores


def _mean(per_image: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> float:
    """The mean over images of a per-image measure `[n]`, chunk by chunk, summed in float64."""
    _check_pair(a, b)
    with torch.no_grad():
        chunks = zip(_chunks(a), _chunks(b), strict=True)
        return sum(float(per_image(x, y).double().sum()) for x, y in chunks) / len(a)


def _check_pair(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3 or not len(a):
        raise ValueError(f"paired metrics need equal stacks [n, 3, h, w], not {[*a.shape]} and {[*b.shape]}")


def _chunks(images: Tensor) -> Iterator[Tensor]:
    """The images as float32 in -1..1, at most `CHUNK` at a time."""
    for start in range(0, len(images), CHUNK):
        chunk = images[start : start + CHUNK]
        yield to_unit(chunk) if chunk.dtype == torch.uint8 else chunk.float()
