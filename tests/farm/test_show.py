"""`farm show`, `compare`, `edit` and `add`: one concept from its prompt to its pictures."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import yaml
from stage_farm import Cluster, copied, one_thread, plan_of, write_config
from terminal import Terminal
from test_cli import photo
from tiny_farm import TinyFarm, three_concepts

from farm.catalogue_file import inserted
from farm.comparing import labelled
from farm.config_file import load_config
from farm.editing import PhotoEditor, open_photo
from farm.errors import UserError
from farm.images import encode
from farm.queue import Queue
from farm.registry import Registry
from farm.showing import concept_facts
from farm.store import LocalStore, open_store


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Terminal:
    monkeypatch.chdir(tmp_path)
    return Terminal(monkeypatch, capsys)


# Showing


def test_what_is_shown_of_a_finished_concept(config: Path, root: Path, tmp_path: Path, terminal: Terminal) -> None:
    store, plan = LocalStore(root), plan_of(root)
    facts = terminal.document("show", "sepia", "-c", config)
    entry = Registry(store).get("sepia")
    assert entry is not None
    assert (facts["id"], facts["prompt"], facts["role"]) == ("sepia", "in the style sepia", "adapter")
    assert facts["stages"] == {"edits": "done", "adapter": "done", "published": "done"} and facts["error"] is None
    assert facts["metrics"] == json.loads(store.get(f"{entry.adapter}/metrics.json")) == entry.metrics
    assert (facts["published"]["version"], facts["published"]["digest"]) == (1, entry.digest)
    assert facts["adapter"]["bytes"] == sum(
        len(store.get(key)) for key in store.list(f"{entry.adapter}/") if not key.endswith("manifest.json")
    )
    assert facts["teacher"]["name"] == "procedural" and facts["teacher"]["style"] == "sepia"
    folders = [plan.adapter("sepia"), plan.quality("sepia"), plan.edits("sepia"), plan.ranks, plan.base]
    assert list(facts["lineage"].values())[:5] == [spec.path for spec in folders]
    preview = Path(facts["pictures"]["preview"])
    assert preview.read_bytes() == store.get(f"{entry.adapter}/preview.webp")
    said = terminal.good("show", "sepia", "-c", config)
    for told in ("in the style sepia", f"1, served; published {entry.published_at}", str(preview), plan.base.path):
        assert told in said
    written = terminal.document("show", "sepia", "-c", config, "--pictures", tmp_path / "pictures")["written"]
    assert {name: Path(file).name for name, file in written.items()} == {
        "preview": "sepia-preview.webp",
        "small": "sepia-small.webp",
    }
    assert Path(written["preview"]).read_bytes() == preview.read_bytes()
    with PIL.Image.open(written["small"]) as small, PIL.Image.open(preview) as sheet:
        assert small.height == sheet.height and small.width < sheet.width


def test_a_concept_that_is_not_there_yet(tmp_path: Path, terminal: Terminal) -> None:
    config = write_config(tmp_path / "farm.yaml", tmp_path / "store")
    facts = terminal.document("show", "night", "-c", config)
    assert facts["stages"] == dict.fromkeys(("edits", "adapter", "published"), "missing")
    assert facts["adapter"] is facts["published"] is facts["metrics"] is None and facts["pictures"] == {}
    assert set(facts["lineage"].values()) == {None}
    assert "base, which is not there" in terminal.good("show", "night", "-c", config)
    assert terminal.document("show", "night", "-c", config, "--pictures", tmp_path / "none")["written"] == {}
    told = terminal.mistake("show", "nihgt", "-c", config)
    assert told == "concept: there is no concept 'nihgt' in the catalogue; did you mean night?"


def test_the_published_adapter_is_shown_while_another_is_due(root: Path, terminal: Terminal, tmp_path: Path) -> None:
    config = write_config(tmp_path / "farm.yaml", root, adapters__train__epochs=4)
    facts = terminal.document("show", "sepia", "-c", config)
    assert facts["stages"]["adapter"] == "missing" and not facts["published"]["current"]
    assert facts["adapter"]["digest"] == facts["published"]["digest"] == plan_of(root).adapter("sepia").digest
    assert "not what the configuration makes now" in terminal.good("show", "sepia", "-c", config)


def test_pictures_in_a_bucket_have_addresses_that_need_no_credentials(moto_bucket: str, root: Path) -> None:
    import httpx

    there = open_store(moto_bucket.replace("?", "/shown?"))
    store = LocalStore(root)
    for prefix in ("registry/sepia.json", f"{plan_of(root).adapter('sepia').path}/"):
        for key in store.list(prefix):
            there.put(key, store.get(key))
    facts = concept_facts(there, plan_of(root), "sepia")
    address = facts["pictures"]["preview"]
    assert "Signature" in address
    assert httpx.get(address).content == store.get(f"{plan_of(root).adapter('sepia').path}/preview.webp")


# Editing and comparing


def farm_of(tiny: TinyFarm, path: Path) -> Path:
    catalogue = [{"id": c, "prompt": c, "editor": {"kind": "procedural", "style": "fog"}} for c in ("fog", "ink")]
    document = {"name": "tiny", "store": str(tiny.store.root), "catalogue": catalogue}
    path.write_text(yaml.safe_dump({**document, "base": {"concepts": ["fog"]}, "ranks": {"concepts": ["ink"]}}))
    return path


def close_to(edited: np.ndarray, wanted: np.ndarray) -> None:
    """Adapters in memory are fp16, and the random ones here are strong."""
    apart = np.abs(edited.astype(int) - wanted.astype(int))
    assert edited.shape == wanted.shape and apart.max() <= 8 and apart.mean() < 1


@pytest.fixture
def tiny(tmp_path: Path) -> TinyFarm:
    """Fog in two versions, and ink."""
    tiny = three_concepts(tmp_path / "store")
    tiny.publish("fog", seed=9)
    return tiny


def test_versions_strengths_and_sizes(tiny: TinyFarm, tmp_path: Path, terminal: Terminal) -> None:
    config, source = farm_of(tiny, tmp_path / "farm.yaml"), photo(tmp_path / "photo.png", 64, 48)

    def edited(*options: object) -> np.ndarray:
        facts = terminal.document("edit", "-c", config, source, "edited.png", "--concept", "fog", *options)
        image = np.asarray(PIL.Image.open("edited.png"))
        assert (facts["height"], facts["width"]) == image.shape[:2]
        return image

    pixels = np.asarray(PIL.Image.open(source))
    close_to(edited(), tiny.edit("fog", pixels))
    np.testing.assert_array_equal(edited("--version", 2), edited())
    assert np.abs(edited("--version", 1).astype(int) - edited()).max() > 20
    close_to(edited("--version", 1, "--strength", 0), edited("--version", 2, "--strength", 0))
    assert edited("--size", 32).shape == (24, 32, 3) and edited("--side", 32).shape == (24, 32, 3)
    assert terminal.farm("edit", "-c", config, source, "x.png", "--concept", "fog", "--strength", "2")[0] == 2
    told = terminal.mistake("edit", "-c", config, source, "x.png", "--concept", "fog", "--version", "7")
    assert told == "fog was never published as version 7."


@pytest.mark.parametrize("kind", ["path", "bytes", "picture", "array", "transparent"])
def test_a_photo_may_be_many_things(tiny: TinyFarm, tmp_path: Path, kind: str) -> None:
    editor = PhotoEditor(load_config(farm_of(tiny, tmp_path / "farm.yaml")))
    source = photo(tmp_path / "photo.png", 64, 48)
    picture = PIL.Image.open(source)
    given = {
        "path": source,
        "bytes": source.read_bytes(),
        "picture": picture,
        "array": np.asarray(picture),
        "transparent": PIL.Image.merge("RGBA", (*picture.split(), PIL.Image.new("L", picture.size, 255))),
    }[kind]
    np.testing.assert_array_equal(np.asarray(open_photo(given)), np.asarray(picture))
    edited = editor.edit(given, "ink")
    close_to(np.asarray(edited.image), tiny.edit("ink", np.asarray(picture)))
    tiny.publish("ink", seed=31)
    assert editor.edit(given, "ink").version == edited.version + 1, "what is published meanwhile is seen"


def test_two_versions_beside_each_other(tiny: TinyFarm, tmp_path: Path, terminal: Terminal) -> None:
    config, source = farm_of(tiny, tmp_path / "farm.yaml"), photo(tmp_path / "photo.png", 160, 128)
    found = terminal.document("compare", "fog@1", "fog", "-c", config, "--photo", source, "--out", "both.png")
    assert [(side["concept"], side["version"], side["metrics"]) for side in found["sides"]] == [
        ("fog", 1, {"l1": 0.02}),
        ("fog", 2, {"l1": 0.09}),
    ]
    sheet, pixels = np.asarray(PIL.Image.open("both.png")), np.asarray(PIL.Image.open(source))
    top = sheet.shape[0] - 128
    assert sheet.shape == (top + 128, 3 * 160 + 2 * 4, 3) and top > 16
    np.testing.assert_array_equal(sheet[top:, :160], pixels)
    editor = PhotoEditor(load_config(config))
    for column, version in ((1, 1), (2, 2)):
        edited = np.asarray(editor.edit(source, "fog", version=version).image)
        np.testing.assert_array_equal(sheet[top:, column * 164 : column * 164 + 160], edited)
        assert (sheet[:top, column * 164 : column * 164 + 160] < 128).any(), "a label"
    said = terminal.good("compare", "fog", "ink", "-c", config, "--photo", source)
    assert "fog@2" in said and "ink@1" in said and "0.090" in said and said.endswith("fog-ink.webp\n")


def test_test_photos_where_none_is_given(config: Path, terminal: Terminal) -> None:
    terminal.good("compare", "sepia", "night@1", "-c", config, "--out", "both.webp")
    with PIL.Image.open("both.webp") as sheet:
        assert sheet.width == 3 * 128 + 2 * 4 and sheet.height > 6 * 128, (
            "three columns of six, enlarged from 32 pixels"
        )


def test_comparisons_that_cannot_be_made(tiny: TinyFarm, tmp_path: Path, terminal: Terminal) -> None:
    config = farm_of(tiny, tmp_path / "farm.yaml")
    assert terminal.mistake("compare", "fog", "ikn", "-c", config).startswith("concept: there is no concept 'ikn'")
    assert terminal.mistake("compare", "fog", "ink@9", "-c", config) == "ink was never published as version 9."
    assert terminal.mistake("compare", "fog", "ink@x", "-c", config).startswith("ink@x: a version is a number")
    assert "give one with --photo" in terminal.mistake("compare", "fog", "ink", "-c", config)
    tiny.registry.unpublish("ink")
    assert terminal.mistake("compare", "fog", "ink", "-c", config).startswith("ink is not published; `farm show ink`")
    assert "must end in .png" in terminal.mistake("compare", "fog", "ink@1", "-c", config, "--out", "x.gif")


def test_a_label_too_long_for_its_column() -> None:
    column = [PIL.Image.new("RGB", (128, 10), "red")]
    sheet = np.asarray(labelled([("w" * 80, column), ("", column)]))
    assert (sheet[:20, 128:132] == 255).all(), "the gap stays white"


# Adding


def test_add_from_a_prompt_to_a_served_adapter(
    root: Path, tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(root, tmp_path / "store")
    config = write_config(tmp_path / "farm.yaml", tmp_path / "store")
    config.write_text("# mine\n" + config.read_text() + "# the end\n")
    before = config.read_text()
    cluster = Cluster("fog")
    cluster.stand_in(monkeypatch)
    ask = ("add", "fog", "--prompt", "the same scene  in fog", "-c", config, "--json")
    status, out, err = terminal.farm(*ask)
    assert status == 1 and json.loads(out)["error"] == "edits: the teacher gave up"
    after = config.read_text()
    line = "- {id: fog, category: other, domain: scenery, prompt: the same scene in fog, editor: {kind: procedural}}"
    assert sorted(set(after.splitlines()) - set(before.splitlines())) == [line]
    assert set(before.splitlines()) <= set(after.splitlines()) and f"{config}: added fog" in err
    cluster.broken = ()
    status, out, err = terminal.farm(*ask)
    facts = json.loads(out)
    assert status == 0 and (facts["concept"], facts["version"], facts["added"]) == ("fog", 1, False)
    assert cluster.done == ["edits fog", "adapter fog"], "nothing else is made, and the file is not written again"
    entry = Registry(LocalStore(tmp_path / "store")).get("fog")
    assert entry is not None and facts["digest"] == entry.digest and config.read_text() == after
    status, out, _ = terminal.farm("add", "fog", "--prompt", "the same scene in fog", "-c", config)
    assert status == 0 and out.startswith("fog: version 1 is published: ") and len(cluster.done) == 2
    told = terminal.mistake("add", "fog", "--prompt", "a desert", "-c", config)
    assert told == f"{config}: 'fog' is not added, for 'fog' is there with the same id."


def test_run_of_one_concept_makes_that_and_what_it_needs(
    root: Path, tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster()
    cluster.stand_in(monkeypatch)
    store = copied(root, tmp_path / "store", "sources", "selections")
    config = write_config(tmp_path / "farm.yaml", tmp_path / "store")
    dry = terminal.farm("run", "-c", config, "--concept", "sepia", "--dry-run")[2].splitlines()
    assert dry[0] == "would edit 4 concepts: charcoal, cyanotype, night, sepia", "the base's and the ranks' too"
    assert dry[-1] == "would publish 1 concept: sepia"
    for folder in ("edits", "quality", "bases", "ranks"):
        shutil.copytree(root / folder, store.root / folder)
    Queue(store, "adapters").enqueue(plan_of(store.root).adapter_key("night"), {"concept": "night"})
    assert terminal.farm("run", "-c", config, "--concept", "sepia")[0] == 0
    assert cluster.done == ["adapter sepia"]
    assert [item.payload["concept"] for item in Queue(store, "adapters").pending()] == ["night"], "others wait on"
    assert list(Registry(LocalStore(tmp_path / "store")).list()) == ["sepia"]
    assert "did you mean sepia?" in terminal.mistake("run", "-c", config, "--concept", "sepai")


def test_add_to_a_file_of_its_own(tmp_path: Path, terminal: Terminal) -> None:
    catalogue = tmp_path / "concepts.yaml"
    catalogue.write_text("# concepts\n- {id: night, prompt: night}\n- {id: fog, prompt: fog}\n")
    config = write_config(
        tmp_path / "farm.yaml",
        tmp_path / "store",
        catalogue=str(catalogue),
        teachers={"filter": {"kind": "procedural", "style": "fog"}},
        base={"concepts": ["night"]},
        ranks={"concepts": ["fog"]},
    )
    before = config.read_text()
    add = ("add", "-c", config, "--no-run")
    assert terminal.farm(*add, "rain", "--prompt", "rain: heavy")[0] == 0
    assert terminal.farm(*add, "ink", "--prompt", "ink", "--teacher", "filter")[0] == 0
    assert terminal.farm(*add, "sepia", "--prompt", "sepia", "--editor", "{kind: procedural}")[0] == 0
    assert config.read_text() == before
    loaded = load_config(config)
    assert [c.id for c in loaded.catalogue] == ["night", "fog", "rain", "ink", "sepia"]
    assert loaded.concept("rain").prompt == "rain: heavy" and loaded.concept("ink").teachers == ("filter",)
    assert "there is no teacher 'fliter'" not in terminal.mistake(*add, "x", "--prompt", "x", "--teacher", "fliter")
    assert terminal.mistake(*add, "x", "--prompt", "x", "--teacher", "filte").endswith("did you mean filter?")
    assert terminal.mistake(*add, "x", "--prompt", "x", "--editor", "night").startswith("--editor: 'night' is no YAML")
    assert "style" in terminal.mistake(*add, "x", "--prompt", "x", "--editor", "{kind: procedural}")
    assert terminal.mistake(*add, "Ink Wash", "--prompt", "x").startswith("'Ink Wash': an id is lower-case words")
    assert [c.id for c in load_config(config).catalogue] == ["night", "fog", "rain", "ink", "sepia"]


def test_add_to_a_packaged_catalogue(tmp_path: Path, terminal: Terminal) -> None:
    config = write_config(
        tmp_path / "farm.yaml",
        tmp_path / "store",
        catalogue={"from": "scenery", "only": ["sunset", "starry-sky"]},
        teachers={"filter": {"kind": "procedural", "style": "fog"}},
        base={"concepts": ["sunset"]},
        ranks={"concepts": ["starry-sky"]},
    )
    told = terminal.mistake("add", "-c", config, "--no-run", "fog", "--prompt", "fog")
    assert "comes with the package and cannot be added to" in told


def test_add_that_would_make_another_base(root: Path, tmp_path: Path, terminal: Terminal) -> None:
    store = copied(root, tmp_path / "store", "sources", "selections")
    changes = {"base": {"representatives": 2}, "ranks__concepts": ["night"]}
    config = write_config(tmp_path / "farm.yaml", tmp_path / "store", **changes)
    base = plan_of(tmp_path / "store", **changes).base
    from farm.artifacts import commit

    commit(store, base, {"x": b""}, wall_seconds=0)
    before = config.read_text()
    add = ("add", "-c", config, "--no-run", "fog", "--prompt", "fog")
    assert "--rebuild says so" in terminal.mistake(*add) and config.read_text() == before
    assert terminal.farm(*add, "--rebuild")[0] == 0 and len(load_config(config).catalogue) == 5


LISTS = [
    "catalogue:\n- {id: a}\n- {id: b}\nbase: {}\n",
    "catalogue:\n  # one\n  - id: a\n    prompt: x\n  # two\n  - id: b\n    captions:\n      - y\n\n#\nbase: {}\n",
    "base: {}\ncatalogue:\n  - {id: a}  # last",
    "catalogue:\r\n  - {id: a}\r\nbase: {}\r\n",
    "catalogue:\n  - id: a\n    prompt: |\n      two\n      lines\n\nbase: {}\n",
    "catalogue:\n  - {id: a,\n     prompt: x}\n  # not this one\nbase: {}",
    "catalogue:\n  - id: a\n    prompt: 'x\n\n      y'\nbase: {}\n",
]


@pytest.mark.parametrize("text", LISTS)
def test_an_entry_goes_to_the_end_of_the_list_and_nothing_else_changes(text: str) -> None:
    entry = {"id": "new", "prompt": "a: b, # c"}
    longer = inserted(Path("farm.yaml"), text, entry)
    document = yaml.safe_load(text)
    assert yaml.safe_load(longer) == {**document, "catalogue": [*document["catalogue"], entry]}
    [line] = [line for line in longer.splitlines() if "new" in line]
    kept = [other for other in longer.splitlines() if other != line]
    assert kept == text.splitlines()


@pytest.mark.parametrize("text", ["catalogue: [{id: a}]\n", "catalogue: []\n", "{catalogue: [{id: a}]}\n"])
def test_a_list_that_nothing_can_be_put_into(text: str) -> None:
    with pytest.raises(UserError, match=r"farm\.yaml: catalogue: nothing can be put into this list"):
        inserted(Path("farm.yaml"), text, {"id": "new"})


def test_a_files_bytes_are_a_photo_too() -> None:
    with pytest.raises(UserError, match="the photo: not a JPEG"):
        open_photo(b"text")
    image = PIL.Image.new("RGB", (16, 16), "red")
    assert open_photo(encode(image, "png")).size == PIL.Image.open(io.BytesIO(encode(image, "png"))).size
