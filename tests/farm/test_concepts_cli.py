"""`farm concepts list | show | validate | add`, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sound_adapters import put_adapter
from terminal import Terminal

from farm.catalogue import PACKAGED, check_concepts, load_catalogue
from farm.registry import Registry
from farm.store import LocalStore

FARM: dict[str, Any] = {
    "name": "tiny",
    "catalogue": [
        {"id": "fog", "prompt": "add fog", "category": "weather", "sets": ["base"], "editor": {"kind": "procedural"}},
        {"id": "ink", "prompt": "make it an ink drawing", "sets": ["random"]},
        {"id": "night", "prompt": "make it night", "sets": ["evaluation"], "teachers": ["waves"]},
    ],
    "teachers": {
        "filters": {"kind": "procedural", "style": "charcoal"},
        "waves": {"kind": "procedural", "style": "sepia"},
    },
    "base": {"concepts": ["fog"]},
    "ranks": {"concepts": ["ink"]},
}
MINE = """\
# My own concepts.

- {id: sad-clown, name: Sad clown, domain: face, prompt: turn the person into a sad clown}  # from the fair
- id: rust
  prompt: >-
    make everything
    rusty
# the end
"""


@pytest.fixture
def concepts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Terminal:
    monkeypatch.chdir(tmp_path)
    return Terminal(monkeypatch, capsys, "concepts")


@pytest.fixture
def farm(tmp_path: Path) -> Path:
    path = tmp_path / "farm.yaml"
    path.write_text(yaml.safe_dump({**FARM, "store": str(tmp_path / "store")}))
    return path


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(MINE)
    return path


def ids(lines: str) -> list[str]:
    return [line.split()[0] for line in lines.splitlines()]


def test_the_packaged_concepts_are_listed(concepts: Terminal, mine: Path) -> None:
    faces, landscapes = ([c["id"] for c in load_catalogue(name)] for name in ("ffhq", "scenery"))
    assert ids(concepts.good("list")) == faces + landscapes
    assert ids(concepts.good("list", "--catalogue", "scenery")) == landscapes
    assert concepts.good("list", "--catalogue", mine).splitlines()[1].split(None, 3)[3] == "make everything rusty"
    rows = concepts.document("list")["concepts"]
    assert [row["id"] for row in rows] == faces + landscapes
    assert rows[0] == {
        **check_concepts(load_catalogue("ffhq"))[0][0].model_dump(mode="json"),
        "reserved": False,
    }


def test_lists_are_narrowed(concepts: Terminal) -> None:
    listed = load_catalogue("ffhq")
    for arguments, wanted in (
        (["--category", "hair"], [c["id"] for c in listed if c["category"] == "hair"]),
        (["--set", "random"], [c["id"] for c in listed if "random" in c.get("sets", ())]),
        (
            ["--set", "random", "--set", "base"],
            [c["id"] for c in listed if {"random", "base"} & set(c.get("sets", ()))],
        ),
        (["--set", "base", "--category", "hair"], ["pink-hair"]),
    ):
        assert ids(concepts.good("list", "--catalogue", "ffhq", *arguments)) == wanted
        rows = concepts.document("list", "--catalogue", "ffhq", *arguments)["concepts"]
        assert [row["id"] for row in rows] == wanted
    assert concepts.mistake("list", "--category", "hairs").endswith("did you mean hair?")
    assert concepts.mistake("list", "--set", "train").startswith("--set train: the sets are base, random, evaluation;")
    assert concepts.mistake("list", "--set", "seed=3") == (
        "--set seed=3: overrides a farm's configuration, so it needs --config."
    )


def test_a_farms_concepts(concepts: Terminal, farm: Path) -> None:
    lines = concepts.good("list", "--config", farm).splitlines()
    assert [line.split(None, 3) for line in lines] == [
        ["fog", "-", "procedural", "add fog"],
        ["ink", "-", "filters,waves", "make it an ink drawing"],
        ["night", "-", "waves", "make it night"],
    ]
    assert ids(concepts.good("list", "-c", farm, "--set", "base", "--set", "catalogue.1.sets=[base]")) == ["fog", "ink"]
    store = LocalStore(farm.parent / "store")
    Registry(store).publish("ink", **put_adapter(store, "ink", "old"))
    assert concepts.good("list", "--config", farm, "--set", "random").split()[:3] == ["ink", "v1", "filters,waves"]
    [row] = concepts.document("list", "--config", farm, "--category", "weather")["concepts"]
    assert row["id"] == "fog" and row["stages"]["edits"] == "missing" and row["published"] is None
    assert concepts.mistake("list", "-c", farm, "--catalogue", "ffhq").startswith("--catalogue: the farm of --config")


def test_one_concept(concepts: Terminal, farm: Path) -> None:
    shown = dict(line.split(None, 1) for line in concepts.good("show", "low-quality-photo").splitlines())
    assert shown == {
        "id": "low-quality-photo",
        "name": "Low Quality photo",
        "category": "photography",
        "domain": "face",
        "sets": "base, evaluation",
        "base": "never, it is reserved for evaluation",
        "prompt": "make it a low quality photo",
        "before": "a photo of a person",
        "after": "a low quality photo of a person",
        "teacher": "any of the farm's",
    }
    assert concepts.document("show", "pink-hair")["captions"] == [
        "a photo of a person",
        "a photo of a person with pink hair",
    ]
    for concept_id, teacher in (("fog", "procedural"), ("ink", "any of the farm's"), ("night", "waves")):
        lines = concepts.good("show", concept_id, "--config", farm).splitlines()
        assert lines[-1].split(None, 1) == ["teacher", teacher]


def test_a_concept_that_is_not_there(concepts: Terminal, farm: Path) -> None:
    told = concepts.mistake("show", "zombi")
    assert told.startswith("concept: there is no concept 'zombi' in the catalogue; did you mean zombie or ")
    assert concepts.mistake("show", "van-gogh").endswith("did you mean vangogh-style or vincent-van-gogh-style?")
    assert concepts.mistake("show", "zombie", "-c", farm).endswith("there are fog, ink, night.")
    assert concepts.mistake("show", "Pink hair").endswith("joined by single hyphens; did you mean pink-hair?")
    assert ", 270 more." in concepts.mistake("show", "火")


def test_sound_catalogues(concepts: Terminal, farm: Path, mine: Path) -> None:
    assert concepts.good("validate").splitlines() == [
        "ffhq: 260 concepts, no problem found",
        "scenery: 20 concepts, no problem found",
    ]
    assert concepts.good("validate", "--catalogue", mine) == f"{mine}: 2 concepts, no problem found\n"
    assert concepts.document("validate", "--config", farm) == {
        "catalogues": [{"catalogue": str(farm), "concepts": 3, "problems": []}]
    }


def test_every_problem_is_a_line(concepts: Terminal, tmp_path: Path, farm: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "- {id: Fog, prompt: add fog, domain: pets}\n"
        "- {id: mist, prompt: add mist}\n- {id: haze, prompt: Add the MIST.}\n- {id: mist, prompt: add drizzle}\n"
    )
    status, out, err = concepts.farm("validate", "--catalogue", path)
    assert (status, err) == (1, "")
    assert out.splitlines() == [
        f"{path}: 'Fog': id: an id is lower-case words and digits joined by single hyphens, not 'Fog'.",
        f"{path}: 'Fog': domain: should be 'face' or 'scenery', not 'pets'.",
        f"{path}: the id 'mist' occurs 2 times; ids must be unique.",
        f"{path}: 'mist' and 'haze' have the same prompt 'add mist'; keep one of them.",
    ]
    status, out, err = concepts.farm("validate", "--catalogue", path, "--json")
    assert (status, err) == (1, "")
    [row] = json.loads(out)["catalogues"]
    assert row["concepts"] == 4 and len(row["problems"]) == 4
    assert concepts.mistake("list", "--catalogue", path).startswith(f"{path}: 'Fog': id: ")
    assert concepts.mistake("validate", "--catalogue", "none.yaml").startswith("none.yaml: cannot be read")


def test_a_farm_whose_prompts_repeat(concepts: Terminal, farm: Path) -> None:
    status, out, _ = concepts.farm("validate", "-c", farm, "--set", "catalogue.1.prompt=Add some fog")
    assert status == 0, out
    status, out, _ = concepts.farm("validate", "-c", farm, "--set", "catalogue.1.prompt=Add a fog")
    assert (status, out) == (1, f"{farm}: 'fog' and 'ink' have the same prompt 'add fog'; keep one of them.\n")


def test_added_at_the_end(concepts: Terminal, mine: Path) -> None:
    before = load_catalogue(mine)
    said = concepts.good(
        *("add", "frost-flowers", "--name", "Frost flowers", "--category", "weather", "--to", mine),
        *("--prompt", "cover it with frost: white,  and cold", "--before", "a photo", "--after", "a photo, frosted"),
    )
    assert said == f"{mine}: added frost-flowers\n"
    added = {
        "id": "frost-flowers",
        "name": "Frost flowers",
        "category": "weather",
        "domain": "scenery",
        "prompt": "cover it with frost: white, and cold",
        "captions": ["a photo", "a photo, frosted"],
    }
    text = mine.read_text()
    assert text.startswith(MINE) and text.count("\n") == MINE.count("\n") + 1
    assert load_catalogue(mine) == [*before, added]
    shown = concepts.document("show", "frost-flowers", "--catalogue", mine)
    assert {key: shown[key] for key in added} == added
    assert not list(mine.parent.glob(".*"))


def test_added_to_a_new_file(concepts: Terminal, tmp_path: Path) -> None:
    document = concepts.document("add", "frost-flowers", "--prompt", "cover it with frost flowers")
    assert (document["to"], document["notes"], document["added"]["id"]) == ("concepts.yaml", [], "frost-flowers")
    assert (tmp_path / "concepts.yaml").read_text() == (
        "- {id: frost-flowers, category: other, domain: scenery, prompt: cover it with frost flowers}\n"
    )


def test_a_packaged_twin_is_a_note(concepts: Terminal, tmp_path: Path) -> None:
    status, out, err = concepts.farm("add", "undead", "--prompt", "make him a zombie", "--domain", "face")
    assert (status, out) == (0, "concepts.yaml: added undead\n")
    assert err == (
        "note: the packaged 'zombie' has nearly the same prompt ('make him a zombie', 'turn the person into a zombie')"
        " and is reserved for evaluation\n"
    )


@pytest.mark.parametrize(
    ("text", "indent"),
    [
        ("- {id: fog, prompt: add fog}", ""),
        ("# mine\n  - {id: fog, prompt: add fog}\n\n  # more to come\n", "  "),
        ("---\n- id: fog\n  prompt: |\n    add fog\n", ""),
        ("- {id: fog, prompt: add fog}\r\n", ""),
        ("# nothing yet\n", ""),
    ],
)
def test_lists_written_otherwise(concepts: Terminal, tmp_path: Path, text: str, indent: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(text.encode())
    known = load_catalogue(path)
    concepts.good("add", "rust", "--prompt", "make everything rusty", "--to", path)
    longer = path.read_bytes().decode()
    assert longer.startswith(text) and longer.splitlines()[-1].startswith(f"{indent}- {{id: rust, ")
    assert [c["id"] for c in load_catalogue(path)] == [c["id"] for c in known] + ["rust"]


def test_a_linked_file_stays_linked(concepts: Terminal, mine: Path, tmp_path: Path) -> None:
    (tmp_path / "link.yaml").symlink_to(mine)
    concepts.good("add", "frost-flowers", "--prompt", "cover it with frost flowers", "--to", "link.yaml")
    assert (tmp_path / "link.yaml").is_symlink() and len(load_catalogue(mine)) == 3


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["Sad Clown", "--prompt", "x"],
            "'Sad Clown': an id is lower-case words and digits joined by single hyphens, ",
        ),
        (
            ["-", "--prompt", "x"],
            "'-': an id is lower-case words and digits joined by single hyphens, such as sad-person.",
        ),
        (["x" * 81, "--prompt", "x"], "concepts add: 'xxx"),
        (["frost", "--prompt", ""], "concepts add: 'frost': the key prompt is missing."),
        (["frost", "--prompt", " \n"], "concepts add: 'frost': prompt: String should have at least 1 character"),
        (
            ["frost", "--prompt", "x" * 1001],
            "concepts add: 'frost': prompt: String should have at most 1000 characters",
        ),
        (
            ["frost", "--prompt", "x", "--domain", "pets"],
            "concepts add: 'frost': domain: should be 'face' or 'scenery',",
        ),
        (["frost", "--prompt", "x", "--category", "My own"], "concepts add: 'frost': category: an id is lower-case"),
        (["frost", "--prompt", "x", "--before", "a photo"], "--after is missing; captions come in pairs."),
        (["frost", "--prompt", "x", "--after", "a photo"], "--before is missing; captions come in pairs."),
        (
            ["frost", "--prompt", "x", "--to", "ffhq"],
            "--to ffhq: that catalogue comes with the package; give the path of",
        ),
        (["frost", "--prompt", "x", "--to", "."], ".: cannot be read (Is a directory); give the path of a YAML file."),
        (["frost", "--prompt", "x", "--to", "none/mine.yaml"], "/none/mine.yaml: cannot be written (No such file or"),
        (
            ["sad-clown", "--prompt", "x"],
            "mine.yaml: 'sad-clown' is not added, for 'sad-clown' is there with the same id.",
        ),
        (
            ["red-rust", "--prompt", "Make everything rusty!"],
            "'rust' is there with the same prompt 'Make everything rusty!'.",
        ),
        (
            ["clown", "--prompt", "make him a sad clown", "--domain", "face"],
            "'clown' is not added, for 'sad-clown' is there with nearly the same prompt ('make him a sad clown', ",
        ),
    ],
)
def test_what_is_not_added(concepts: Terminal, mine: Path, tmp_path: Path, arguments: list[str], told: str) -> None:
    to = [] if "--to" in arguments else ["--to", "mine.yaml"]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert told in concepts.mistake("add", *to, *arguments)
    assert mine.read_text() == MINE
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "text", ["[{id: fog, prompt: add fog}]\n", "- {id: fog, prompt: add fog}\n...\n", "--- [] # none\n"]
)
def test_a_list_that_takes_no_lines(concepts: Terminal, tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    told = concepts.mistake("add", "rust", "--prompt", "make it rusty", "--to", path)
    assert told == (
        f"{path}: nothing can be appended to this list; write it as lines such as "
        "`- {id: rust, category: other, domain: scenery, prompt: make it rusty}`."
    )
    assert path.read_text() == text


def test_a_broken_file_is_left_alone(concepts: Terminal, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for data, told in (
        (b"- {id: fog", "is not YAML at line"),
        (b"- \xff\n", "is not UTF-8 text"),
        (b"catalogue: []\n", "a catalogue is a list of concepts"),
        (b"- {id: fog, prompt: add fog, colour: grey}\n", "'fog': unknown key colour; "),
    ):
        path.write_bytes(data)
        assert concepts.mistake("add", "rust", "--prompt", "make it rusty", "--to", path).startswith(f"{path}: {told}")
        assert path.read_bytes() == data


def test_the_packaged_files_are_not_touched_unless_named_by_path(concepts: Terminal, tmp_path: Path) -> None:
    before = {name: path.read_bytes() for name, path in PACKAGED.items()}
    copy = tmp_path / "ffhq.yaml"
    copy.write_bytes(before["ffhq"])
    concepts.good("add", "frost-flowers", "--prompt", "cover it with frost flowers", "--to", copy, "--domain", "face")
    concepts.good("add", "frost-flowers", "--prompt", "cover it with frost flowers")
    assert copy.read_bytes().startswith(before["ffhq"]) and len(load_catalogue(copy)) == 261
    assert {name: path.read_bytes() for name, path in PACKAGED.items()} == before


texts = (
    st.text(min_size=1, max_size=40)
    .map(lambda text: " ".join(text.split()))
    .filter(lambda text: text[:1] not in ("", "-"))
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(name=texts, prompt=texts, captions=st.tuples(texts, texts))
def test_what_is_added_is_read_back(
    concepts: Terminal, tmp_path: Path, name: str, prompt: str, captions: tuple[str, str]
) -> None:
    path = tmp_path / "any.yaml"
    path.write_text(MINE)
    options = {"--name": name, "--prompt": prompt, "--before": captions[0], "--after": captions[1], "--domain": "face"}
    status, _, err = concepts.farm("add", "any", *(part for pair in options.items() for part in pair), "--to", path)
    assert status == 0, err
    assert path.read_text().startswith(MINE) and path.read_text().count("\n") == MINE.count("\n") + 1
    wanted = {"id": "any", "name": name, "prompt": prompt, "captions": list(captions), "domain": "face"}
    assert load_catalogue(path)[-1] == {**wanted, "category": "other"}


def test_help(concepts: Terminal) -> None:
    for command in ([], ["list"], ["show"], ["validate"], ["add"]):
        out = concepts.good(*command, "--help")
        assert "Usage: " in out and "--help" in out
    assert concepts.farm("show")[0] == 2 and concepts.farm("add", "x")[0] == 2
