"""`farm init`: what it asks, what it writes, and that what it writes is a farm."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import yaml
from terminal import Terminal

from farm.config_file import load_config
from farm.editors.procedural import style_names
from farm.plan import make_plan
from farm.preflight import weights_of
from farm.start import _PROMPTS, OF_DIFFUSION, OF_FILTERS


@pytest.fixture
def init(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Terminal:
    monkeypatch.chdir(tmp_path)
    return Terminal(monkeypatch, capsys, "init")


def photos(folder: Path, count: int, side: int) -> Path:
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (side, side + 8, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "notes.jpg").write_text("no picture")
    return folder


class Keyboard(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_it_writes_by_itself_is_a_farm_of_filters(init: Terminal) -> None:
    said = init.good("--yes")
    assert "farm run --config farm.yaml" in said
    text = Path("farm.yaml").read_text()
    config = load_config("farm.yaml")
    assert config == load_config("farm.yaml", ["version=1"])
    assert [concept.id for concept in config.catalogue] == list(OF_FILTERS)
    assert (config.name, config.store, config.sources.kind, config.sources.size) == ("farm", "work/farm", "bundled", 64)
    assert not set(config.base.concepts) & set(config.ranks.concepts)
    plan = make_plan(config)
    assert len(plan.photos["photos"]) == 7 and not weights_of(plan)
    for filter_name in style_names():
        assert filter_name in text
    comments = sum(line.lstrip().startswith("#") or "  # " in line for line in text.splitlines())
    assert comments > 20 and max(map(len, text.splitlines())) < 210


def test_every_filter_has_a_prompt() -> None:
    assert set(_PROMPTS) | {"charcoal"} == set(style_names())


def test_a_folder_of_photos_and_of_networks(init: Terminal, tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 40, 80)
    networks = tmp_path / "networks"
    networks.mkdir()
    for name in ("La Muse", "wave", "udnie"):
        (networks / f"{name}.onnx").write_bytes(name.encode())
    document = init.document("my farm.yaml", "--yes", "--photos", folder, "--teacher", networks, "--store", "s3://b/p")
    assert document == {
        "file": "my farm.yaml",
        "photos": 40,
        "teacher": "onnx",
        "concepts": ["la-muse", "udnie", "wave"],
    }
    config = load_config("my farm.yaml")
    assert (config.name, config.store, config.sources.path) == ("my-farm", "s3://b/p", str(folder))
    assert config.sources.crops_per_photo == 9  # 336 images of 40 photographs
    assert {w.model for w in weights_of(make_plan(config))} == {str(file) for file in networks.iterdir()}
    [editor] = config.candidates("la-muse").values()
    assert editor.kind == "onnx" and editor.path == str(networks / "La Muse.onnx")


def test_one_network_has_filters_beside_it(init: Terminal, tmp_path: Path) -> None:
    (tmp_path / "wave.onnx").write_bytes(b"network")
    init.good("--yes", "--teacher", "wave.onnx")
    config = load_config("farm.yaml")
    assert {c.id: [*config.candidates(c.id)] for c in config.catalogue} == {
        "charcoal": ["procedural"],
        "watercolour": ["procedural"],
        "cyanotype": ["procedural"],
        "wave": ["wave"],
    }
    assert "wave" not in config.base.concepts


@pytest.mark.parametrize("kind", ["instruct-pix2pix", "instruct-diffusion"])
def test_diffusion_teachers(init: Terminal, tmp_path: Path, kind: str) -> None:
    init.good("--yes", "--teacher", kind, "--model", "some/model")
    config = load_config("farm.yaml")
    assert [concept.id for concept in config.catalogue] == list(OF_DIFFUSION)
    assert all(concept.captions for concept in config.catalogue)
    [editor] = config.candidates("sunset").values()
    assert editor.kind == kind and getattr(editor, "model") == "some/model"  # noqa: B009
    init.good("--yes", "--force", "--teacher", kind, "--model", "m", "--concept", "sad-person,mine=add, and more, dots")
    prompts = {concept.id: concept.prompt for concept in load_config("farm.yaml").catalogue}
    assert list(prompts) == ["sad-person", "mine"] and prompts["mine"] == "add, and more, dots"


def test_answers_at_a_terminal(init: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = photos(tmp_path / "photos", 4, 40)
    answers = [
        "filtres",
        "filters",
        str(tmp_path / "none"),
        str(folder),
        "night, nihgt",
        "night; winter=snow, lots",
        "",
    ]
    monkeypatch.setattr(sys, "stdin", Keyboard("".join(f"{answer}\n" for answer in answers)))
    status, out, err = init.farm("mine.yaml")
    assert status == 0, err
    assert "did you mean filters?" in err and "there is no folder" in err and "did you mean night?" in err
    config = load_config("mine.yaml")
    assert {c.id: c.prompt for c in config.catalogue} == {"night": "the same scene at night", "winter": "snow, lots"}
    assert (config.sources.size, config.store) == (32, "work/mine"), "the photographs are smaller than 64 pixels"
    assert "4 photographs, 2 concepts (night, winter)" in out


@pytest.mark.parametrize("text", ["a: b", "'", '"', "# x", "{x}", "über  alles", "yes", "1e3", "- x", "*"])
def test_answers_that_yaml_would_read_otherwise(init: Terminal, tmp_path: Path, text: str) -> None:
    folder = photos(tmp_path / text, 3, 64)
    init.good("--yes", "--photos", folder.name, "--store", text, "--concept", f"night={text}", "--concept", "fog")
    config = load_config("farm.yaml")
    assert (config.sources.path, config.store) == (text, text)
    assert config.catalogue[0].prompt == " ".join(text.split())


def test_mistakes(init: Terminal, tmp_path: Path) -> None:
    def told(*arguments: object) -> str:
        return init.mistake(*arguments)

    assert told("--teacher", "filters").startswith("farm init: nobody is there to ask; give --photos")
    assert told("--yes", "--photos", tmp_path / "none").startswith("--photos: there is no folder")
    two = photos(tmp_path / "two", 2, 64)
    assert "has 2 photographs of 32 pixels or more, and a farm needs three" in told("--yes", "--photos", two)
    assert "did you mean instruct-pix2pix or" in told("--yes", "--teacher", "instruct-pix2pics")
    assert "holds no .onnx file" in told("--yes", "--teacher", two)
    assert told("--yes", "--teacher", "instruct-diffusion").startswith("--model: instruct-diffusion has no usual")
    assert told("--yes", "--model", "m").startswith("--model: only diffusion teachers take one")
    assert told("--yes", "--concept", "night").startswith("--concept: a farm needs two at least")
    assert told("--yes", "--concept", "night,night") == "--concept: night is there twice; ids are unique."
    assert told("--yes", "--concept", "Night Sky,fog").startswith("--concept: 'Night Sky' is no id")
    diffusion = ("--yes", "--teacher", "flux-kontext", "--concept")
    assert "zombi has no prompt; write zombi=PROMPT" in told(*diffusion, "zombi,sunset")
    assert told(".", "--yes", "--force").startswith(".: is a folder; give the name of the file to write")
    assert told("nowhere/farm.yaml", "--yes").startswith("nowhere/farm.yaml: cannot be written (")
    assert not list(tmp_path.glob("*.yaml"))


def test_nothing_is_written_over(init: Terminal) -> None:
    Path("farm.yaml").write_text("precious")
    assert init.mistake("--yes") == "farm.yaml: is there already; --force writes over it, or give another name."
    assert Path("farm.yaml").read_text() == "precious"
    init.good("--yes", "--force")
    assert yaml.safe_load(Path("farm.yaml").read_text())["version"] == 1


def test_json_is_all_of_standard_output(init: Terminal) -> None:
    status, out, err = init.farm("--yes", "--json")
    document: dict[str, Any] = json.loads(out)
    assert (status, err) == (0, "") and document["concepts"] == list(OF_FILTERS)
