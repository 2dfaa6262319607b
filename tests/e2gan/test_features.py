import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pictures import smooth
from torch import Tensor, nn

from e2gan.distances import frechet_distance
from e2gan.features import CHUNK, CachedFeatures, CleanFidFeatures, UntrainedFeatures
from e2gan.pairs import to_bytes


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


def test_clean_fid_is_known_by_its_weights(inception_folder: Path, tmp_path: Path) -> None:
    here = CleanFidFeatures(inception_folder)
    copy = tmp_path / "inception-2015-12-05.pt"
    copy.write_bytes((inception_folder / copy.name).read_bytes())
    assert CleanFidFeatures(copy).key == here.key
    assert here.key.startswith("clean_fid 299 ") and here.kid_name == "clean_kid"


class Counting:
    """The mean colour, and how often it was asked for."""

    name, kid_name, key = "fd_colour", "kd_colour", "colour"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: Tensor) -> NDArray[np.float64]:
        self.calls += 1
        return images.double().mean(dim=(2, 3)).numpy()


def test_features_are_computed_once_an_image_set(tmp_path: Path) -> None:
    counting, images = Counting(), smooth(6)
    cached = CachedFeatures(counting, tmp_path / "cache")
    assert (cached.name, cached.kid_name, cached.key) == ("fd_colour", "kd_colour", "colour")
    features = cached(images)
    np.testing.assert_array_equal(features, counting(images))
    counting.calls = 0
    np.testing.assert_array_equal(CachedFeatures(counting, tmp_path / "cache")(images.clone()), features)
    # The same memory laid out otherwise is the same images.
    np.testing.assert_array_equal(cached(images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)), features)
    assert counting.calls == 0
    (file,) = (tmp_path / "cache").iterdir()
    np.testing.assert_array_equal(np.load(file), features)  # a plain .npy


def test_whatever_decides_the_features_is_in_their_address(tmp_path: Path) -> None:
    images = to_bytes(smooth(4))
    changed = images.clone()
    changed[3, 2, -1, -1] += 1
    counting = Counting()
    cached = CachedFeatures(counting, tmp_path)
    sets = [images, changed, images[:3], images.flip(0), images.view(4, 3, 16, 64), images.view(torch.int8)]
    for image_set in sets:
        np.testing.assert_array_equal(cached(image_set), image_set.double().mean(dim=(2, 3)).numpy())
    assert counting.calls == len(sets) == len(list(tmp_path.iterdir()))

    seeds = [CachedFeatures(UntrainedFeatures(seed), tmp_path)(images) for seed in (0, 1)]
    np.testing.assert_array_equal(seeds[1], UntrainedFeatures(1)(images))
    assert not np.array_equal(*seeds)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_file_is_computed_anew(cache: Path, data: st.DataObject) -> None:
    counting, images = Counting(), smooth(2)
    cached = CachedFeatures(counting, cache)
    wanted = cached(images)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    if data.draw(st.booleans()):
        file.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    else:
        place, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
    counting.calls = 0
    np.testing.assert_array_equal(cached(images), wanted)
    assert counting.calls == 1
    assert file.read_bytes() == whole and list(cache.iterdir()) == [file]


def test_a_failed_extraction_leaves_nothing(tmp_path: Path) -> None:
    class Broken(Counting):
        def __call__(self, images: Tensor) -> NDArray[np.float64]:
            raise ValueError("no features today")

    with pytest.raises(ValueError, match="no features today"):
        CachedFeatures(Broken(), tmp_path)(smooth(1))
    assert not list(tmp_path.iterdir())
