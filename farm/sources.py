"""Photographs, cut into the square source images that teachers edit and networks learn from."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import PIL.Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from farm.errors import UserError
from farm.images import ImageError, decode

if TYPE_CHECKING:
    from typing import Self

    from e2gan.pairs import Image

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}

BUNDLED = (
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("sklearn", "datasets/images/china.jpg"),
    ("skimage", "data/coffee.png"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/rocket.jpg"),
)
"""Colour photographs inside the wheels of scikit-learn and scikit-image, sorted by file name."""

SplitName = Literal["train", "validation", "test"]


class Split(BaseModel):
    """The shares of photographs in training, validation and test; together 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: float = Field(default=0.8, gt=0)
    validation: float = Field(default=0.1, gt=0)
    test: float = Field(default=0.1, gt=0)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        total = self.train + self.validation + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train, validation and test must add up to 1, not {total:g}")
        return self


class SourcesConfig(BaseModel):
    """The `sources` section of a farm's configuration.

    kind: `bundled`, the photographs that come with scikit-learn and scikit-image, or `folder`, those below
        `path`.
    size: side of a source image in pixels, a multiple of 16.
    crops_per_photo: source images a photograph gives.
    crop_scale: range of a crop's side as a share of the photograph's shorter side; a single crop at (1, 1) is
        the centre, others lie anywhere.
    split: shares of photographs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["bundled", "folder"] = "bundled"
    path: str | None = None
    size: int = Field(default=256, ge=16, multiple_of=16)
    crops_per_photo: int = Field(default=1, ge=1, le=1000)
    crop_scale: tuple[float, float] = (1.0, 1.0)
    split: Split = Split()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.kind == "folder") != (self.path is not None):
            raise ValueError("path is needed with kind: folder and refused with kind: bundled")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale must be a range within 0..1, not [{low:g}, {high:g}]")
        return self


@dataclass(frozen=True, kw_only=True)
class PhotoFile:
    """A photograph's file: `id` a unique slug, `name` its path below the folder."""

    id: str
    name: str
    path: Path


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A decoded photograph; `sha256` is that of its file, `image` is RGB."""

    id: str
    name: str
    sha256: str
    image: PIL.Image.Image


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A file that was left out, and why, as a clause such as "not an image"."""

    name: str
    reason: str


def list_photos(config: SourcesConfig) -> list[PhotoFile]:
    """The photographs' files, sorted by name; nothing is opened yet.

    Raises:
        UserError: the folder is missing or holds no image files.
    """
    named = _bundled() if config.kind == "bundled" else _below(Path(config.path or "").expanduser())
    slugs = Counter(_slug(name) for name in named)
    return [PhotoFile(id=_photo_id(name, slugs), name=name, path=named[name]) for name in sorted(named)]


def read_photos(config: SourcesConfig) -> Iterator[Photo | Skipped]:
    """Read and decode the photographs one by one: more of them may pass than memory holds.

    Left out are files that cannot be decoded, photographs smaller than a source image, and copies of one
    before, which could otherwise be both trained on and tested on.

    Raises:
        UserError: see `list_photos`.
    """
    seen: dict[str, str] = {}
    for file in list_photos(config):
        try:
            data = file.path.read_bytes()
            image = decode(data, what=file.name)
        except OSError as error:
            yield Skipped(name=file.name, reason=f"cannot be read: {error.strerror or error}")
            continue
        except ImageError as error:
            yield Skipped(name=file.name, reason=str(error).removeprefix(f"{file.name}: "))
            continue
        sha256 = hashlib.sha256(data).hexdigest()
        if min(image.size) < config.size:
            reason = f"{image.width} x {image.height} is smaller than sources.size, {config.size}"
            yield Skipped(name=file.name, reason=reason)
        elif sha256 in seen:
            yield Skipped(name=file.name, reason=f"the same file as {seen[sha256]}")
        else:
            seen[sha256] = file.name
            yield Photo(id=file.id, name=file.name, sha256=sha256, image=image)


def crops(photo: Photo, config: SourcesConfig, seed: int) -> dict[str, Image]:
    """Cut a photograph into `{"<photo id>-<number>": uint8 [size, size, 3]}`.

    The same photograph and seed give the same crops, whatever other photographs there are. A crop is never
    smaller than `size`, so none is enlarged.
    """
    rng = np.random.default_rng(_derived(seed, photo.id))
    width, height = photo.image.size
    centred = config.crops_per_photo == 1 and config.crop_scale == (1.0, 1.0)
    found = {}
    for number in range(config.crops_per_photo):
        side = max(float(config.size), min(width, height) * rng.uniform(*config.crop_scale))
        across, down = (0.5, 0.5) if centred else rng.uniform(size=2)
        left, top = (width - side) * across, (height - side) * down
        box = (left, top, left + side, top + side)
        square = photo.image.resize((config.size, config.size), PIL.Image.Resampling.LANCZOS, box=box)
        found[f"{photo.id}-{number:03d}"] = np.asarray(square)
    return found


def split_photos(ids: Sequence[str], split: Split, seed: int) -> dict[SplitName, list[str]]:
    """Share photographs out by a seeded shuffle, at least one to each part; ids come back sorted.

    Raises:
        UserError: there are fewer than three photographs.
    """
    if len(ids) < 3:
        raise UserError(
            f"sources.path: {len(ids)} usable photographs cannot be split in training, validation and test; "
            "give at least three."
        )
    order = [sorted(ids)[i] for i in np.random.default_rng(seed).permutation(len(ids))]
    validation = min(max(1, round(len(ids) * split.validation)), len(ids) - 2)
    test = min(max(1, round(len(ids) * split.test)), len(ids) - 1 - validation)
    return {
        "train": sorted(order[validation + test :]),
        "validation": sorted(order[:validation]),
        "test": sorted(order[validation : validation + test]),
    }


def fingerprint(config: SourcesConfig) -> dict[str, Any]:
    """What source images depend on besides the seed, as JSON: the settings, and each file's name and content.

    Files are read but not decoded, and where the folder lies does not matter.

    Raises:
        UserError: see `list_photos`.
    """
    contents = [[file.name, _content(file.path)] for file in list_photos(config)]
    return {"config": config.model_dump(mode="json", exclude={"path"}), "photos": contents}


def _content(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:  # will be skipped
        return None


def _bundled() -> dict[str, Path]:
    named = {}
    for package, inside in BUNDLED:
        spec = importlib.util.find_spec(package)  # finds the package without importing it
        places = spec.submodule_search_locations if spec else None
        path = Path(places[0]) / inside if places else None
        if path is None or not path.is_file():
            raise UserError(
                f"sources.kind: {inside} of the package {package} is not installed, so there are no bundled "
                "photographs; install scikit-learn and scikit-image or set kind: folder and sources.path."
            )
        named[path.name] = path
    return named


def _below(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"sources.path: there is no folder {folder}; name a folder of photographs.")
    named = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file()
    }
    named = {name: path for name, path in named.items() if not re.search(r"(^|/)\.", name)}
    if not named:
        kinds = ", ".join(sorted(SUFFIXES))
        raise UserError(f"sources.path: the folder {folder} holds no images; put some there ({kinds}).")
    return named


def _photo_id(name: str, slugs: Counter[str]) -> str:
    slug = _slug(name)
    return f"{slug}-{hashlib.sha256(name.encode()).hexdigest()[:8]}" if slugs[slug] > 1 else slug


def _slug(name: str) -> str:
    plain = unicodedata.normalize("NFKD", str(Path(name).with_suffix(""))).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")[:80].rstrip("-") or "photo"


def _derived(seed: int, photo_id: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\ncrops\n{photo_id}".encode()).digest()[:8], "big")
