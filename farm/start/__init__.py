"""A farm's first configuration, made of four answers: photos, teacher, concepts, store.

What it leaves out has a default; what it sets is small enough for a laptop, and the file's comments say what to raise.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image

from farm.catalogue import PACKAGED, load_catalogue, slug
from farm.editors import KINDS
from farm.editors.procedural import style_names
from farm.errors import UserError
from farm.sources import SourcesConfig, list_photos
from farm.spelling import near
from farm.yaml_line import flow

FILTERS = "filters"
"""The answer that means image filters, which need no weights."""
DIFFUSION = tuple(kind for kind in KINDS if kind not in ("procedural", "onnx"))
OF_FILTERS = ("charcoal", "watercolour", "cyanotype", "pop-art", "sepia", "night")
OF_DIFFUSION = (
    "sunset",
    "starry-sky",
    "pencil-landscape",
    "forest-in-the-mist",
    "oil-painting",
    "forest-in-the-winter",
)
BESIDE_NETWORKS = ("charcoal", "watercolour", "cyanotype")
"""Filters that the base learns where there are too few networks for it."""
IMAGES, CLUSTERS = 336, 160
"""Source images to cut at least, and training images to choose: the demo's."""
MOST_CROPS = 48
FEW = {"train": 0.6, "validation": 0.14, "test": 0.26}
"""How few photographs are split."""
MANY = {"train": 0.8, "validation": 0.1, "test": 0.1}

_PROMPTS = {
    "autumn": "a scene in autumn colours",
    "blueprint": "a blueprint",
    "comic": "a comic book panel",
    "cyanotype": "a cyanotype photograph in blue and white",
    "emboss": "an embossed grey relief",
    "fog": "the same scene in thick fog",
    "golden-hour": "the same scene in the last light of the day",
    "infrared": "an infrared photograph",
    "linocut": "a linocut print",
    "neon": "a picture in neon lights",
    "night": "the same scene at night",
    "oil-painting": "an oil painting",
    "pixel-art": "pixel art",
    "pointillism": "a pointillist painting",
    "pop-art": "a pop art print",
    "risograph": "a risograph print",
    "sepia": "an old sepia photograph",
    "stained-glass": "a stained glass window",
    "thermal": "a thermal camera picture",
    "underwater": "the same scene under water",
    "vaporwave": "a vaporwave picture",
    "watercolour": "a watercolour painting",
    "winter": "the same scene in winter",
    "x-ray": "an x-ray picture",
}


@dataclass(frozen=True, kw_only=True)
class Photos:
    """Where photographs come from, and how many of them are large enough. folder: None for those in the packages."""

    folder: str | None
    size: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Who edits. kind: `filters`, `onnx` or a diffusion family. networks: ONNX files by concept's id."""

    kind: str
    model: str | None = None
    networks: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """All that a first configuration is made of. file: what its comments call it. concepts: catalogue entries."""

    file: str
    name: str
    photos: Photos
    teacher: Teacher
    concepts: Sequence[dict[str, Any]]
    store: str


def find_photos(folder: str, teacher: Teacher) -> Photos:
    """The photographs of a folder, or with an empty answer those that come with scikit-learn and scikit-image.

    Raises:
        UserError: there is no such folder, or it has fewer than three that can be used.
    """
    size = 128 if teacher.kind in DIFFUSION else 64
    try:
        files = list_photos(SourcesConfig(kind="folder", path=folder) if folder else SourcesConfig())
    except UserError as error:
        raise UserError(f"--photos: {str(error).removeprefix('sources.path: ')}") from error
    sides = [side for file in files if (side := _shorter_side(file.path))]
    if sum(side >= size for side in sides) < max(3, len(sides) / 2):  # small pictures make a farm of small pictures
        size = max((small for small in (64, 48, 32) if sum(side >= small for side in sides) >= 3), default=size)
    usable = sum(side >= size for side in sides)
    if usable < 3:
        raise UserError(
            f"--photos: {folder} has {usable} photographs of 32 pixels or more, and a farm needs three: one to train "
            "on, one to choose by, one to test with."
        )
    return Photos(folder=folder or None, size=size, count=usable)


def _shorter_side(path: Path) -> int | None:
    try:
        with PIL.Image.open(path) as image:
            return min(image.size)
    except Exception:  # Pillow raises anything on hostile data; a run skips the file and says why
        return None


def find_teacher(answer: str, model: str | None = None) -> Teacher:
    """What an answer means: `filters`, a diffusion family's kind, or an ONNX file or a folder of them.

    model: of a diffusion family, a folder or a hub id; its usual one when left out.

    Raises:
        UserError: it is none of these.
    """
    path = Path(answer).expanduser()
    if answer in DIFFUSION:
        if answer == "instruct-diffusion" and model is None:
            raise UserError("--model: instruct-diffusion has no usual weights; give the folder of converted ones.")
        return Teacher(kind=answer, model=model)
    if model is not None:
        raise UserError(f"--model: only diffusion teachers take one, and {answer} is none of {', '.join(DIFFUSION)}.")
    if answer == FILTERS:
        return Teacher(kind=FILTERS)
    files = (
        sorted(path.glob("*.onnx")) if path.is_dir() else [path] if path.suffix == ".onnx" and path.is_file() else []
    )
    if not files:
        there = "holds no .onnx file" if path.is_dir() else "is no teacher"
        hint = near(answer, (FILTERS, *DIFFUSION))
        raise UserError(f"--teacher: {answer} {there}; give an ONNX file, a folder of them, or a kind: {hint}")
    return Teacher(kind="onnx", networks={slug(file.stem) or "network": _as_given(file, answer) for file in files})


def _as_given(file: Path, answer: str) -> str:
    """The file's path in the user's own words: relative or with a tilde where the answer was."""
    return answer if answer.endswith(".onnx") else f"{answer.rstrip('/')}/{file.name}"


def offered(teacher: Teacher) -> list[str]:
    """The ids to offer where no concepts are named."""
    if teacher.kind == "onnx":
        few = BESIDE_NETWORKS if len(teacher.networks) < 3 else ()
        return [*few, *teacher.networks]
    return list(OF_FILTERS if teacher.kind == FILTERS else OF_DIFFUSION)


def find_concepts(items: Sequence[str], teacher: Teacher) -> list[dict[str, Any]]:
    """Catalogue entries of `ID` or `ID=PROMPT`.

    An id alone is a filter's, a network's, or for a diffusion teacher one of the packaged catalogues'.

    Raises:
        UserError: fewer than two, one twice, or one that nothing is known of.
    """
    packaged: dict[str, dict[str, Any]] = {}
    if teacher.kind in DIFFUSION:
        packaged = {entry["id"]: entry for path in PACKAGED for entry in load_catalogue(path)}
    entries = [_entry(*item.partition("=")[::2], teacher, packaged) for item in items]
    ids = [entry["id"] for entry in entries]
    if twice := sorted({i for i in ids if ids.count(i) > 1}):
        raise UserError(f"--concept: {twice[0]} is there twice; ids are unique.")
    if len(entries) < 2:
        raise UserError("--concept: a farm needs two at least: one for its base to learn, one to search ranks on.")
    return entries


def _entry(name: str, prompt: str, teacher: Teacher, packaged: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    name, prompt = name.strip(), " ".join(prompt.split())
    if not re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", name):
        raise UserError(f"--concept: {name!r} is no id, which is lower-case words joined by hyphens: {slug(name)!r}?")
    if name in teacher.networks:
        words = name.replace("-", " ")
        return {"id": name, "prompt": prompt or f"a painting in the style of {words}", "teachers": [name]}
    if teacher.kind in DIFFUSION:
        if prompt:
            return {"id": name, "prompt": prompt}
        if name not in packaged:
            raise UserError(
                f"--concept: {name} has no prompt; write {name}=PROMPT, or take a packaged one: {near(name, packaged)}"
            )
        return {key: value for key, value in packaged[name].items() if key not in ("name", "sets")}
    styles = style_names()
    if name not in styles:
        known = [*teacher.networks, *styles]
        raise UserError(f"--concept: there is no filter {name}; {near(name, known)} Filters know no other edits.")
    return {"id": name, "prompt": prompt or _PROMPTS.get(name, f"a {name} drawing"), "editor": {"kind": "procedural"}}


def configuration(answers: Answers) -> str:
    """The commented YAML."""
    import jinja2

    photos, teacher, concepts = answers.photos, answers.teacher, answers.concepts
    crops = min(MOST_CROPS, math.ceil(IMAGES / photos.count))
    few = photos.count < 20
    train = photos.count * crops * (FEW if few else MANY)["train"]
    learned = min(4, max(1, len(concepts) // 2))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # no page: nothing to escape but what YAML needs, which `flow` does
    environment.filters["flow"] = flow
    return environment.get_template("farm.yaml.j2").render(
        file=answers.file,
        name=answers.name,
        store=answers.store,
        photos=photos,
        crops=crops,
        split=FEW if few else MANY,
        clusters=CLUSTERS if train * 0.8 >= CLUSTERS else None,
        teacher=teacher,
        teachers=_teachers(teacher, [entry["id"] for entry in concepts]),
        concepts=concepts,
        base=[entry["id"] for entry in concepts[:learned]],
        ranks=[entry["id"] for entry in concepts[learned : learned + 1]],
        diffusion=teacher.kind in DIFFUSION,
        installed=importlib.util.find_spec("diffusers") is not None,
        filters=style_names(),
        cpus=min(2, os.cpu_count() or 1),
        gpus=1 if Path("/dev/nvidia0").exists() else 0,
    )


def _teachers(teacher: Teacher, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    if teacher.kind in DIFFUSION:
        return {teacher.kind: {"kind": teacher.kind, **({"model": teacher.model} if teacher.model else {})}}
    return {name: {"kind": "onnx", "path": path} for name, path in teacher.networks.items() if name in ids}
