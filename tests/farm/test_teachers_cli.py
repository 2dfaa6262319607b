"""`farm teachers list | compare`, in this process, without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import yaml
from stage_farm import DOCUMENT, Cluster, built, copied, document_of
from terminal import Terminal

from farm.store import LocalStore

FILTERS = {"ink": {"kind": "procedural", "style": "charcoal"}, "blue": {"kind": "procedural", "style": "cyanotype"}}


@pytest.fixture
def teachers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(monkeypatch, capsys, "teachers")


@pytest.fixture
def store(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> LocalStore:
    """Photos that are chosen and not yet edited."""
    return copied(built(tmp_path_factory.getbasetemp()), tmp_path / "farm", "sources", "selections")


@pytest.fixture
def config(store: LocalStore, tmp_path: Path) -> Path:
    """A farm where night and sepia have two teachers each."""
    catalogue: list[dict[str, Any]] = [*DOCUMENT["catalogue"][:2], {"id": "night", "prompt": "at night"}]
    catalogue.append({"id": "sepia", "prompt": "sepia", "teachers": ["blue", "ink"]})
    path = tmp_path / "farm.yaml"
    path.write_text(yaml.safe_dump(document_of(store.root, catalogue=catalogue, teachers=FILTERS)))
    return path


def test_teachers_are_compared_and_listed(
    config: Path, store: LocalStore, teachers: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster()
    cluster.stand_in(monkeypatch)
    before = teachers.document("list", "-c", config)["concepts"]
    assert [(row["concept"], row["chosen"]) for row in before] == [
        ("charcoal", "procedural"),
        ("cyanotype", "procedural"),
        ("night", None),
        ("sepia", None),
    ]
    sheets = tmp_path / "sheets"
    status, out, err = teachers.farm("compare", "-c", config, "--concept", "sepia", "--sheets", sheets)
    assert status == 0, err
    assert cluster.done == ["comparison sepia"]
    assert [path.name for path in sheets.iterdir()] == ["sepia.webp"]
    with PIL.Image.open(sheets / "sepia.webp") as sheet:
        assert sheet.height == 3 * 128 + 2 * 2
    assert "(chosen)" in out and "structure" in out and "prompt" not in out.splitlines()[1]
    assert out.splitlines()[-1].startswith("quality.clip is not set: the score knows nothing of the prompt")
    assert not list(store.list("edits/"))

    status, out, err = teachers.farm("compare", "-c", config, "--json")
    assert status == 0 and cluster.done == ["comparison sepia", "comparison night"]
    found = json.loads(out)["concepts"]
    assert found.keys() == {"night", "sepia"} and found["sepia"]["scores"].keys() == {"ink", "blue"}
    after = {row["concept"]: row["chosen"] for row in teachers.document("list", "-c", config)["concepts"]}
    assert {c: after[c] for c in found} == {c: choice["teacher"] for c, choice in found.items()}
    (line,) = (line for line in teachers.good("list", "-c", config).splitlines() if line.startswith("sepia"))
    assert line.split()[1:] == [after["sepia"], "of", "blue,", "ink"]


def test_a_comparison_that_fails_is_status_1(config: Path, teachers: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    Cluster("sepia").stand_in(monkeypatch)
    status, out, err = teachers.farm("compare", "-c", config, "--json")
    assert status == 1
    assert json.loads(out)["failures"] == {"sepia": "comparison: the teacher gave up"}
    assert json.loads(out)["concepts"].keys() == {"night"}
    assert "failed: sepia: comparison: the teacher gave up" in err


def test_nothing_to_compare(tmp_path: Path, teachers: Terminal, store: LocalStore) -> None:
    path = tmp_path / "plain.yaml"
    path.write_text(yaml.safe_dump(document_of(store.root)))
    status, out, err = teachers.farm("compare", "-c", path)
    assert (status, out) == (0, "") and "no concept has more than one teacher" in err


def test_mistakes(config: Path, teachers: Terminal, tmp_path: Path) -> None:
    assert "did you mean sepia?" in teachers.mistake("compare", "-c", config, "--concept", "sepya")
    (tmp_path / "file").touch()
    told = teachers.mistake("compare", "-c", config, "--sheets", tmp_path / "file")
    assert told == f"{tmp_path / 'file'}: cannot be made a folder (File exists); choose another place."
