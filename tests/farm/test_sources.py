from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from farm.errors import UserError
from farm.sources import (
    Photo,
    Skipped,
    SourcesConfig,
    Split,
    crops,
    fingerprint,
    list_photos,
    read_photos,
    split_photos,
)


def folder_config(folder: Path, **options: Any) -> SourcesConfig:
    return SourcesConfig(kind="folder", path=str(folder), **{"size": 32, **options})


def read(config: SourcesConfig) -> tuple[list[Photo], list[Skipped]]:
    """The photographs that can be used, and the files that cannot."""
    found = list(read_photos(config))
    return [f for f in found if isinstance(f, Photo)], [f for f in found if isinstance(f, Skipped)]


def write(path: Path, height: int = 40, width: int = 60, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(path)


def photo(height: int = 40, width: int = 60, *, id: str = "a") -> Photo:
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([y * 4, x * 4, np.zeros_like(x)], axis=-1).astype(np.uint8)
    return Photo(id=id, name=f"{id}.png", sha256="0" * 64, image=PIL.Image.fromarray(image))


def test_the_bundled_photographs() -> None:
    config = SourcesConfig()
    photos, skipped = read(config)
    names = {"astronaut", "chelsea", "china", "coffee", "flower", "rocket"}
    assert names <= {photo.id for photo in photos}
    assert not skipped
    assert [photo.name for photo in photos] == sorted(photo.name for photo in photos)
    for found in photos:
        red, _, blue = (np.asarray(channel, float) for channel in found.image.split())
        assert np.abs(red - blue).mean() > 5, "a colour photograph"
        assert all(crop.shape == (256, 256, 3) for crop in crops(found, config, 0).values())


def test_a_folder_is_read_with_everything_bad_listed(tmp_path: Path) -> None:
    write(tmp_path / "b/Two Words.PNG", seed=1)
    write(tmp_path / "a.jpg")
    write(tmp_path / "small.png", height=31)
    write(tmp_path / ".hidden.png", seed=5)
    write(tmp_path / ".cache/thumb.png", seed=6)
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:500])
    (tmp_path / "text.webp").write_text("no image")
    (tmp_path / "notes.txt").write_text("no image either")
    shutil.copy(tmp_path / "a.jpg", tmp_path / "copy.jpg")
    (tmp_path / "gone.tif").symlink_to(tmp_path / "nowhere")
    photos, skipped = read(folder_config(tmp_path))
    assert [(photo.id, photo.name) for photo in photos] == [
        ("a", "a.jpg"),
        ("b-two-words", "b/Two Words.PNG"),
    ]
    assert photos[0].image.size == (60, 40)
    assert [skip.name for skip in skipped] == ["broken.jpg", "copy.jpg", "small.png", "text.webp"]
    reasons = [skip.reason for skip in skipped]
    assert reasons[0].startswith("the image file is damaged")
    assert reasons[1] == "the same file as a.jpg"
    assert reasons[2] == "60 x 31 is smaller than sources.size, 32"
    assert reasons[3].startswith("not a JPEG")


def test_photographs_are_read_one_by_one(tmp_path: Path) -> None:
    """More may pass than memory holds; a folder of nothing usable is refused where they are ingested."""
    write(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    found = read_photos(folder_config(tmp_path))
    assert isinstance(next(found), Photo)
    (tmp_path / "b.png").unlink()
    assert next(found) == Skipped(name="b.png", reason="cannot be read: No such file or directory")
    assert next(found, None) is None


def test_an_unreadable_file_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.png")
    write(tmp_path / "b.png", seed=1)
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "a.png":
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    photos, skipped = read(folder_config(tmp_path))
    assert [photo.id for photo in photos] == ["b"]
    assert skipped == [Skipped(name="a.png", reason="cannot be read: Permission denied")]


def test_ids_are_unique(tmp_path: Path) -> None:
    for seed, name in enumerate(["a b.png", "a-b.png", "a/b.png", "写真.png", "絵.png", "é.png", "e.png"]):
        write(tmp_path / name, seed=seed)
    files = list_photos(folder_config(tmp_path))
    assert len({file.id for file in files}) == len(files) == 7
    assert all(file.id.isascii() and "/" not in file.id for file in files)


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda folder: folder.rmdir(), "there is no folder"),
        (lambda folder: (folder / "notes.txt").write_text("x"), "holds no images"),
    ],
)
def test_a_folder_without_photographs_is_told(tmp_path: Path, prepare: Any, says: str) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(UserError, match=says) as caught:
        list_photos(folder_config(folder))
    text = str(caught.value)
    assert text.startswith("sources.path: ")
    assert str(folder) in text
    assert text.endswith(".")
    assert "\n" not in text


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "folder"},
        {"kind": "bundled", "path": "x"},
        {"size": 250},
        {"size": 0},
        {"crops_per_photo": 0},
        {"crop_scale": (0.0, 1.0)},
        {"crop_scale": (0.9, 0.5)},
        {"crop_scale": (0.5, 1.5)},
        {"split": {"train": 0.9, "validation": 0.1, "test": 0.1}},
        {"crop": 3},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SourcesConfig(**wrong)


def test_a_single_crop_is_the_centre() -> None:
    (crop,) = crops(photo(32, 64), SourcesConfig(size=32), 5).values()
    assert np.array_equal(crop, np.asarray(photo(32, 64).image)[:, 16:48])


def test_shrinking_does_not_alias() -> None:
    """A chessboard of single pixels becomes an even grey."""
    board = np.repeat((np.indices((256, 256)).sum(axis=0) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2)
    fine = Photo(id="a", name="a", sha256="0" * 64, image=PIL.Image.fromarray(board))
    (crop,) = crops(fine, SourcesConfig(size=32), 0).values()
    assert np.abs(crop.astype(int) - 127).max() <= 8


def test_crops_follow_seed_and_photograph_alone() -> None:
    config = SourcesConfig(size=32, crops_per_photo=4, crop_scale=(0.5, 1.0))
    first = crops(photo(90, 120), config, 1)
    assert list(first) == ["a-000", "a-001", "a-002", "a-003"]
    assert all(crop.shape == (32, 32, 3) and crop.dtype == np.uint8 for crop in first.values())
    again = crops(photo(90, 120), config, 1)
    assert all(np.array_equal(first[key], again[key]) for key in first)
    others = [crops(photo(90, 120), config, 2), crops(photo(90, 120, id="b"), config, 1)]
    for other in others:
        assert not np.array_equal(first["a-000"], next(iter(other.values())))
    fewer = crops(photo(90, 120), config.model_copy(update={"crops_per_photo": 2}), 1)
    assert all(np.array_equal(first[key], fewer[key]) for key in fewer)


def test_a_small_crop_is_never_enlarged() -> None:
    """Neighbouring pixels of the ramp differ by at least 4, as in the photograph."""
    config = SourcesConfig(size=32, crops_per_photo=5, crop_scale=(0.1, 0.2))
    for crop in crops(photo(), config, 0).values():
        assert np.diff(crop[2:-2, 2:-2, 0].astype(int), axis=0).mean() > 3.9


@given(
    count=st.integers(3, 60),
    shares=st.tuples(st.integers(1, 100), st.integers(1, 100), st.integers(1, 100)),
    seed=st.integers(0, 2**32),
)
def test_splits_share_every_photograph_out_once(count: int, shares: tuple[int, int, int], seed: int) -> None:
    train, validation, test = (share / sum(shares) for share in shares)
    ids = [f"photo-{i:02d}" for i in range(count)]
    split = Split(train=train, validation=validation, test=test)
    parts = split_photos(ids, split, seed)
    assert sorted(parts["train"] + parts["validation"] + parts["test"]) == ids
    assert all(part for part in parts.values())
    assert parts == split_photos(ids[::-1], split, seed)
    if min(shares) * count > 2 * sum(shares):
        for part, share in zip(("train", "validation", "test"), (train, validation, test), strict=True):
            assert abs(len(parts[part]) - share * count) <= 1.5  # type: ignore[index]


def test_another_seed_splits_otherwise() -> None:
    ids = [str(i) for i in range(30)]
    assert split_photos(ids, Split(), 0) != split_photos(ids, Split(), 1)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_two_photographs_cannot_be_split(count: int) -> None:
    with pytest.raises(UserError, match="at least three"):
        split_photos(["a", "b"][:count], Split(), 0)


def test_the_fingerprint_follows_content_and_settings_not_the_place(tmp_path: Path) -> None:
    for folder in (tmp_path / "one", tmp_path / "two"):
        write(folder / "a.png")
        write(folder / "b.png", seed=1)
    one, two = (folder_config(tmp_path / name) for name in ("one", "two"))
    first = fingerprint(one)
    assert first == fingerprint(two) == json.loads(json.dumps(first))
    assert [sha256 for _, sha256 in first["photos"]] == [photo.sha256 for photo in read(one)[0]]
    assert first != fingerprint(folder_config(tmp_path / "one", size=16))
    write(tmp_path / "two/b.png", seed=2)
    assert first != fingerprint(two)
    (tmp_path / "two/b.png").rename(tmp_path / "two/c.png")
    write(tmp_path / "two/c.png", seed=1)
    assert first != fingerprint(two)
