"""Feature vectors of images, for Fréchet and kernel distances (E2GAN, section 5.1).

A distance carries the name of its features: on the Inception weights of Clean-FID they are `clean_fid` and
`clean_kid`; on the embedded random network, which needs no weights, `fd_untrained` and `kd_untrained`. The two are
not comparable, nor is either comparable with plain FID and KID.

Images are float `[n, 3, height, width]` in -1..1 or, as in `Pairs`, uint8 0..255, and are taken in chunks.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from e2gan.pairs import to_bytes, to_unit

Features = NDArray[np.float64]
"""Float64 `[n, d]`, one row an image."""

CHUNK = 32


class FeatureExtractor(Protocol):
    """Turns images into feature vectors, each image by itself."""

    @property
    def name(self) -> str:
        """The name of the Fréchet distance these features yield, e.g. `fd_untrained`."""

    @property
    def kid_name(self) -> str:
        """The name of the kernel distance these features yield, e.g. `kd_untrained`."""

    @property
    def key(self) -> str:
        """What besides the images decides the features: the network, its seed or weights, its input size."""

    def __call__(self, images: Tensor) -> Features:
        """Images `[n, 3, height, width]`, uint8 or float in -1..1, to float64 `[n, d]`."""


class UntrainedFeatures:
    """Features of a small random convolution network, fixed by its seed: no weights, no download.

    Mean and standard deviation of every channel, of the image itself and after each of three strided
    convolutions: 118 numbers an image. Good enough to rank runs of one farm against each other; never to be
    called FID.
    """

    name = "fd_untrained"
    kid_name = "kd_untrained"

    def __init__(self, seed: int = 0) -> None:
        self.key = f"{self.name} seed {seed}"
        generator = torch.Generator().manual_seed(seed)
        self._kernels = [
            torch.randn(width, previous, 4, 4, generator=generator) * math.sqrt(2 / (previous * 16))
            for previous, width in ((3, 8), (8, 16), (16, 32))
        ]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Images `[n, 3, height, width]`, sides of at least 8, to float64 `[n, 118]`."""
        return np.concatenate([self._features(chunk) for chunk in chunks(images)])

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
    kid_name = "clean_kid"

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
        self._file, self._device = file, device

    @cached_property
    def key(self) -> str:
        """Named by the weights' content, not by their path; the network takes 299x299."""
        with self._file.open("rb") as file:
            return f"{self.name} 299 {hashlib.file_digest(file, 'sha256').hexdigest()}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Images `[n, 3, height, width]` to float64 `[n, 2048]`."""
        features = []
        for chunk in chunks(images):
            raw = to_bytes(chunk).permute(0, 2, 3, 1).cpu().numpy()
            resized = np.stack([self._resize(image) for image in raw]).transpose(0, 3, 1, 2)
            batch = torch.from_numpy(np.ascontiguousarray(resized)).to(self._device)
            features.append(self._model(batch).double().cpu().numpy())
        return np.concatenate(features)


class CachedFeatures:
    """An extractor that writes the features of an image set to a folder and reads them there the next time.

    A file is named by the sha256 of the images' bytes, shape and dtype and of the extractor's `key`. It is a `.npy`
    with the sha256 of what precedes at its end, so a damaged one is noticed, and computed anew. Several processes may
    share a folder.

    Args:
        extractor: whose features these are; the names are its own.
        folder: made if missing; may be deleted at any time.
    """

    def __init__(self, extractor: FeatureExtractor, folder: str | Path) -> None:
        self.name, self.kid_name, self.key = extractor.name, extractor.kid_name, extractor.key
        self._extractor = extractor
        self._folder = Path(folder)

    def __call__(self, images: Tensor) -> Features:
        """Images as the extractor takes them to its float64 `[n, d]`."""
        path = self._folder / f"{self._address(images)}.npy"
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            data = b""
        if hashlib.sha256(data[:-32]).digest() == data[-32:]:
            stored: Features = np.load(io.BytesIO(data))
            return stored
        features = self._extractor(images)
        buffer = io.BytesIO()
        np.save(buffer, features)
        data = buffer.getvalue()
        self._folder.mkdir(parents=True, exist_ok=True)
        # Under a name of its own first: another process must never read half a file.
        temporary = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.tmp")
        temporary.write_bytes(data + hashlib.sha256(data).digest())
        temporary.replace(path)
        return features

    def _address(self, images: Tensor) -> str:
        address = hashlib.sha256(json.dumps([self.key, [*images.shape], str(images.dtype)]).encode())
        address.update(images.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return address.hexdigest()


def chunks(images: Tensor) -> Iterator[Tensor]:
    """The images as float32 in -1..1, at most `CHUNK` at a time."""
    for start in range(0, len(images), CHUNK):
        chunk = images[start : start + CHUNK]
        yield to_unit(chunk) if chunk.dtype == torch.uint8 else chunk.float()
