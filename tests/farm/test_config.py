"""A farm's configuration: what is filled in, and that every mistake is one sentence with its place."""

from __future__ import annotations

import copy
import pickle
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from e2gan.config import AdapterConfig, GeneratorConfig, TrainConfig
from farm.config import FarmConfig, Resources
from farm.config_file import load_config
from farm.errors import UserError
from farm.sources import SourcesConfig

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {
    "name": "small",
    "store": "work/small",
    "catalogue": [
        {"id": style, "prompt": f"a {style} picture", "editor": {"kind": "procedural"}}
        for style in ("sepia", "charcoal", "fog")
    ],
    "base": {"concepts": ["sepia"]},
    "ranks": {"concepts": ["charcoal"]},
}


def put(document: Any, key: str, value: Any) -> None:
    """Set the value at a dotted key; take the key away where the value is `...`."""
    *parents, last = [int(name) if name.isdigit() else name for name in key.split(".")]
    for name in parents:
        document = document.setdefault(name, {}) if isinstance(document, dict) else document[name]
    if value is ...:
        del document[last]
    else:
        document[last] = value


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A sound configuration's file."""
    return write(tmp_path / "farm.yaml")


def write(path: Path, **changes: Any) -> Path:
    document = copy.deepcopy(SMALL)
    for key, value in changes.items():
        put(document, key, value)
    path.write_text(yaml.safe_dump(document))
    return path


def complaint(path: Path, *overrides: str) -> str:
    """What the user is told: one sentence."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    assert text[-1] in ".?"
    assert "pydantic" not in text and "Input" not in text and "Value error" not in text
    return text


def complaint_about(path: Path, key: str, value: Any) -> str:
    """What the user is told of a file with this one mistake, without the file's name, which comes first."""
    text = complaint(write(path, **{key: value}))
    assert text.startswith(f"{path}: ")
    return text.removeprefix(f"{path}: ")


def test_defaults(path: Path) -> None:
    config = load_config(path)
    assert config.seed == 0
    assert config.sources == SourcesConfig(kind="bundled", size=256, crops_per_photo=1)
    assert config.selection.clusters is None and config.selection.embedding == "thumbnail"
    assert config.selection.method == "cluster"
    assert config.text.encoder == "hashing"
    assert config.model == GeneratorConfig()
    assert config.base.train == config.adapters.train == TrainConfig()
    assert config.ranks.train == TrainConfig(epochs=10)
    assert config.adapters.lora == AdapterConfig(scale=1.0)
    assert (config.adapters.max_l1_ratio, config.adapters.max_attempts) == (0.95, 2)
    gate = config.adapters.gate
    assert gate.enabled and (gate.min_gain_over_base, gate.min_variety, gate.min_contrast) == (0.02, 0.3, 0.3)
    assert gate.max_distance_ratio is None and gate.max_latency_ms is None
    assert config.evaluation.inception is None
    assert config.cluster.address is None and config.cluster.base == Resources(cpus=1, gpus=0)
    assert (config.serve.host, config.serve.port, config.serve.max_side) == ("127.0.0.1", 8000, 512)
    assert config.concept("fog").prompt == "a fog picture"
    with pytest.raises(UserError, match=r"^concept: there is no concept 'frog' .* did you mean fog\?"):
        config.concept("frog")


@pytest.mark.parametrize("name", ["demo", "photos"])
def test_the_configurations_that_come_with_the_farm(name: str) -> None:
    config = load_config(ROOT / f"configs/{name}.yaml")
    assert config.name == name
    assert not set(config.base.concepts) & set(config.ranks.concepts)
    assert len(config.catalogue) > len(config.base.concepts) + len(config.ranks.concepts)
    assert config.base.train.learning_rate == 1e-3


@pytest.mark.parametrize(("name", "concepts", "base"), [("ffhq", 260, 23), ("scenery", 20, 10)])
def test_the_papers_farms(name: str, concepts: int, base: int) -> None:
    """The base's concepts come from the catalogue's marks, and none of them is kept for evaluation."""
    config = load_config(ROOT / f"configs/{name}.yaml")
    assert len(config.catalogue) == concepts and len(config.base.concepts) == base
    assert not any(config.concept(concept_id).reserved for concept_id in config.base.concepts)
    assert all(len(config.candidates(concept.id)) == len(config.teachers) for concept in config.catalogue)


FILTERS = {"ink": {"kind": "procedural", "style": "charcoal"}, "blue": {"kind": "procedural", "style": "cyanotype"}}


def test_candidates_are_a_concepts_own_teacher_or_those_it_names_or_all(tmp_path: Path) -> None:
    one, two, three = (dict(concept) for concept in SMALL["catalogue"])
    del two["editor"], three["editor"]
    document = {"catalogue": [one, {**two, "teachers": ["blue"]}, three], "teachers": FILTERS}
    config = load_config(write(tmp_path / "farm.yaml", **document))
    assert list(config.candidates(one["id"])) == ["procedural"]
    assert config.candidates(two["id"]) == {"blue": config.teachers["blue"]}
    assert sorted(config.candidates(three["id"])) == ["blue", "ink"]

    unknown = complaint(
        write(tmp_path / "farm.yaml", **{**document, "catalogue": [one, two, {**three, "teachers": ["inks"]}]})
    )
    assert unknown.endswith(f"catalogue: {three['id']}: teachers: there is no teacher 'inks'; did you mean ink?")
    none = complaint(write(tmp_path / "farm.yaml", **{**document, "teachers": {}, "catalogue": [one, two, three]}))
    assert f"catalogue: {two['id']} has no teacher; " in none
    wrong = complaint(write(tmp_path / "farm.yaml", teachers={"ink": {"kind": "procedural", "stile": "fog"}}))
    assert wrong.endswith("unknown key teachers.ink.stile; did you mean style?")


def test_some_concepts_of_a_packaged_catalogue(tmp_path: Path) -> None:
    chosen = ["pink-hair", "zombie", "op-art"]
    document = {"catalogue": {"from": "ffhq", "only": chosen}, "teachers": FILTERS, "ranks": {"concepts": ["op-art"]}}
    path = write(tmp_path / "farm.yaml", **document, base={"train": {"epochs": 1}})
    config = load_config(path)
    assert [concept.id for concept in config.catalogue] == chosen
    assert config.base.concepts == ("pink-hair",)  # the only one the paper's base learns
    assert config.eligible == ["pink-hair"]  # zombie is kept for evaluation, op-art for the search
    told = complaint(path, "catalogue.only=[pink-hare]")
    assert told.startswith(f"{path}: catalogue.only: ffhq has no concept 'pink-hare'; did you mean pink-hair")


def test_representatives_instead_of_listed_concepts(tmp_path: Path) -> None:
    path = write(tmp_path / "farm.yaml", base={"representatives": 2})
    assert load_config(path).base.concepts == () and load_config(path).eligible == ["sepia", "fog"]
    assert complaint(path, "base.representatives=3").startswith(
        f"{path}: base.representatives: 3 concepts cannot be chosen among the 2 that "
    )


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("sede", "seed"),
        ("sources.crop_per_photo", "crops_per_photo"),
        ("sources.split.tests", "test"),
        ("selection.cluster", "clusters"),
        ("selection.methods", "method"),
        ("catalogue.1.promt", "prompt"),
        ("catalogue.1.editor.stile", "style"),
        ("text.enkoder", "encoder"),
        ("model.chanels", "channels"),
        ("base.worker", "workers"),
        ("base.train.epoch", "epochs"),
        ("ranks.tolerence", "tolerance"),
        ("ranks.train.batchsize", "batch_size"),
        ("adapters.lora.scal", "scale"),
        ("adapters.train.learning-rate", "learning_rate"),
        ("evaluation.inceptoin", "inception"),
        ("cluster.cpu", "cpus"),
        ("cluster.base.gpu", "gpus"),
        ("serve.ports", "port"),
    ],
)
def test_an_unknown_key_is_told_with_its_place_and_a_near_name(tmp_path: Path, key: str, near: str) -> None:
    told = complaint_about(tmp_path / "farm.yaml", key, 1)
    assert told == f"unknown key {key}; did you mean {near}?"


def test_an_unknown_key_that_resembles_none_should_go(tmp_path: Path) -> None:
    told = complaint_about(tmp_path / "farm.yaml", "base.zzzqqq", 1)
    assert told == "unknown key base.zzzqqq; remove it, see configs/demo.yaml."


@pytest.mark.parametrize(
    "key",
    [
        *("name", "store", "catalogue", "base", "ranks", "ranks.concepts", "catalogue.2.id", "catalogue.2.prompt"),
        "catalogue.2.editor.kind",
    ],
)
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    assert complaint_about(tmp_path / "farm.yaml", key, ...) == f"the key {key} is missing."


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("seed", "x", "seed: should be a valid integer"),
        ("seed", -1, "seed: should be greater than or equal to 0, not -1"),
        ("seed", 2**31, f"seed: should be less than {2**31}, not {2**31}"),
        ("store", 5, "store: should be a valid string, not 5"),
        ("store", "", "store: String should have at least 1 character, not ''"),
        ("name", "My Farm", "name: an id is lower-case words and digits joined by single hyphens, not 'My Farm'"),
        ("catalogue", [], "catalogue: "),
        ("catalogue", 3, "catalogue: should be a valid tuple, not 3"),
        ("catalogue.0.id", "Sepia!", "catalogue.0.id: an id is lower-case words and digits"),
        ("catalogue.0.prompt", "", "catalogue.0.prompt: String should have at least 1 character"),
        ("catalogue.0.domain", "pets", "catalogue.0.domain: should be 'face' or 'scenery', not 'pets'"),
        ("catalogue.0.editor", "procedural", "catalogue.0.editor: "),
        ("catalogue.0.editor.kind", "magic", "catalogue.0.editor.kind: should be 'procedural' or 'onnx' or "),
        ("catalogue.0.editor", {"kind": "onnx"}, "the key catalogue.0.editor.path is missing"),
        ("base", None, "base: "),
        ("base.concepts", [], "base: give either concepts, the ids the base learns, or representatives, how many"),
        (
            "base.representatives",
            2,
            "base: give either concepts, the ids the base learns, or representatives, how many",
        ),
        ("base.concepts", "sepia", "base.concepts: should be a valid tuple, not 'sepia'"),
        ("base.train.epochs", 0, "base.train: epochs must be above 0, not 0"),
        ("base.train.epochs", "many", "base.train.epochs: should be a valid number"),
        ("base.train.schedule", "step", "base.train.schedule: should be 'constant', 'linear' or 'cosine', not 'step'"),
        ("base.train.betas", [0.5], "the key base.train.betas.1 is missing"),
        ("base.workers", 0, "base.workers: should be greater than or equal to 1, not 0"),
        ("base.min_workers", 0, "base.min_workers: should be greater than or equal to 1, not 0"),
        ("base.min_workers", 3, "base: min_workers (3) must be at most workers (1)"),
        ("model.heads", 7, "model: heads (7) must divide four times channels (64)"),
        ("sources.size", 250, "sources.size: should be a multiple of 16, not 250"),
        ("sources.kind", "folder", "sources: path is needed with kind: folder"),
        ("sources.split", {"train": 0.9}, "sources.split: train, validation and test must add up to 1, not 1.1"),
        ("sources.crop_scale", [0.9, 0.5], "sources: crop_scale must be a range within 0..1"),
        ("selection.clusters", 0, "selection.clusters: should be greater than or equal to 1, not 0"),
        ("selection.method", "best", "selection.method: should be 'cluster' or 'random', not 'best'"),
        ("selection.method", "random", "selection: clusters, how many images to keep, is needed with method: random."),
        ("selection.embedding", "clip", "selection: path is needed with embedding: clip."),
        ("selection.embedding", "onnx", "selection: path is needed with embedding: onnx."),
        ("adapters.lora.scale", 0, "adapters.lora: scale must be above 0, not 0"),
        ("adapters.max_l1_ratio", 0, "adapters.max_l1_ratio: should be greater than 0, not 0"),
        ("adapters.gate.min_gain_over_base", 1, "adapters.gate.min_gain_over_base: should be less than 1, not 1"),
        ("adapters.gate.min_variety", 2, "adapters.gate.min_variety: should be less than or equal to 1, not 2"),
        ("adapters.gate.max_latency_ms", 0, "adapters.gate.max_latency_ms: should be greater than 0, not 0"),
        ("cluster.edit.gpus", 0.18, "cluster.edit: gpus must be a whole number or 1/N, not 0.18"),
        ("cluster.edit.memory_gb", 0, "cluster.edit.memory_gb: should be greater than 0, not 0"),
        ("cluster.edit.workers", 0, "cluster.edit.workers: should be greater than or equal to 1, not 0"),
        ("cluster.edit.labels", {"farm": 1}, "cluster.edit.labels.farm: should be a valid string"),
        ("cluster.edit.labels", {"-": "x"}, "cluster.edit: labels: a label cannot be called '-'"),
        (
            "cluster.edit.labels",
            {"farm": "in(edit, train)"},
            "cluster.edit: labels.farm must be value, !value, in(one,other) or !in(one,other), not 'in(edit, train)'",
        ),
        ("cluster.base.workers", 2, "cluster: base.workers is no key here; "),
        ("serve.port", 99999, "serve.port: should be less than or equal to 65535, not 99999"),
        ("5", 1, ""),
    ],
)
def test_a_wrong_value_is_told_with_its_key(tmp_path: Path, key: str, value: Any, says: str) -> None:
    assert complaint_about(tmp_path / "farm.yaml", key, value).startswith(says)


def test_concepts_that_do_not_fit_together(tmp_path: Path) -> None:
    path = tmp_path / "farm.yaml"
    twice = complaint_about(path, "catalogue", [*SMALL["catalogue"], SMALL["catalogue"][1]])
    assert twice == "catalogue: the id 'charcoal' occurs twice; ids must be unique."
    for key in ("base.concepts", "ranks.concepts"):
        told = complaint_about(path, key, ["sepiaa"])
        assert told == f"{key}: there is no concept 'sepiaa' in the catalogue; did you mean sepia?"
    both = complaint_about(path, "ranks.concepts", ["fog", "sepia"])
    assert both == "ranks.concepts: 'sepia' is also in base.concepts; search ranks on others."


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: x\nstore: [a, b\nseed: 1\n", "is not YAML at line 3: "),
        ("name: x\n\tstore: y\n", "is not YAML at line 2: "),
        ("name: 'x", "is not YAML at line 1: "),
        ("name: a\x07b\n", "is not YAML: unacceptable character"),
        ("name: 2024-13-45\n", "is not YAML: "),
        ("", "a farm's configuration is a mapping of keys, see configs/demo.yaml."),
        ("- a\n- b\n", "a farm's configuration is a mapping of keys"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "farm.yaml"
    path.write_text(text)
    assert complaint(path).startswith(f"{path}: {says}")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "none.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        told = complaint(path)
        assert told == f"{path}: cannot be read ({why}); give the path of a YAML file such as configs/demo.yaml."
    (tmp_path / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    assert complaint(tmp_path / "latin.yaml").startswith(f"{tmp_path / 'latin.yaml'}: is not YAML: ")


def test_the_catalogue_in_a_file_of_its_own(tmp_path: Path) -> None:
    concepts = tmp_path / "concepts.yaml"
    path = write(tmp_path / "farm.yaml", catalogue=str(concepts))
    assert complaint(path).startswith(f"{concepts}: cannot be read (No such file or directory); ")
    concepts.write_text("- {id: [")
    assert complaint(path).startswith(f"{concepts}: is not YAML at line 1: ")
    concepts.write_text(yaml.safe_dump([{**SMALL["catalogue"][0], "promt": 1}]))
    assert complaint(path).startswith(f"{path}: unknown key catalogue.0.promt; did you mean prompt")
    concepts.write_text(yaml.safe_dump(SMALL["catalogue"]))
    assert load_config(path) == load_config(write(tmp_path / "whole.yaml"))


@given(parts=st.integers(1, 1000), whole=st.integers(0, 16))
def test_gpus_are_whole_or_one_of_n(parts: int, whole: int) -> None:
    assert Resources(gpus=1 / parts).gpus == 1 / parts
    assert Resources(gpus=whole).gpus == whole


@given(gpus=st.floats(0.01, 20))
def test_other_shares_of_gpus_are_refused(gpus: float) -> None:
    """A worker that wants 0.18 of a GPU would share it with four others and leave a tenth of it idle."""
    fits = min(abs(gpus - round(gpus)), *(abs(gpus - 1 / n) for n in range(1, 101)))
    if fits > 1e-3:
        with pytest.raises(ValidationError, match=r"gpus must be a whole number or 1/N"):
            Resources(gpus=gpus)


def test_overrides(path: Path) -> None:
    config = load_config(
        path,
        [
            "adapters.train.epochs=5",
            "adapters.train.learning_rate=1e-3",
            "catalogue.1.prompt='a=b: c'",
            "ranks.concepts=[charcoal, fog]",
            "base.concepts.0=sepia",
            "cluster.cpus=2",
            "cluster.address=null",
            "store=first",
            "store=second",
        ],
    )
    assert config.adapters.train == TrainConfig(epochs=5, learning_rate=1e-3)
    assert config.catalogue[1].prompt == "a=b: c"
    assert config.ranks.concepts == ("charcoal", "fog")
    assert config.base.concepts == ("sepia",)
    assert config.cluster.cpus == 2 and config.cluster.address is None
    assert config.store == "second"
    assert config.catalogue[0] == load_config(path).catalogue[0]


def test_an_override_can_replace_the_catalogues_file(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump([{**concept, "prompt": "other"} for concept in SMALL["catalogue"]]))
    assert {concept.prompt for concept in load_config(path, [f"catalogue={other}"]).catalogue} == {"other"}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed", "write key=value, for example --set adapters.train.epochs=5."),
        ("=5", "write key=value"),
        ("seed={", "'{' is not a YAML value."),
        ("name=2024-13-45", "'2024-13-45' is not a YAML value."),
        ("name.first=x", "the configuration has no place name.first."),
        ("catalogue.9.prompt=x", "the configuration has no place catalogue.9.prompt."),
        ("catalogue.first.prompt=x", "the configuration has no place catalogue.first.prompt."),
        ("base.concepts.7=x", "the configuration has no place base.concepts.7."),
    ],
)
def test_an_override_without_a_place_or_a_value(path: Path, override: str, says: str) -> None:
    assert complaint(path, override).startswith(f"--set {override}: {says}")


def test_an_override_is_checked_like_the_file(path: Path) -> None:
    assert complaint(path, "base.train.epoch=5") == f"{path}: unknown key base.train.epoch; did you mean epochs?"
    assert complaint(path, "base.train.epochs=0").startswith(f"{path}: base.train: epochs must be above 0")


def test_configurations_cannot_be_changed(path: Path) -> None:
    config = load_config(path)
    with pytest.raises(ValidationError):
        config.seed = 1  # type: ignore[misc]
    assert FarmConfig.model_validate(config.model_dump()) == config


def test_a_configuration_says_how_it_was_given(path: Path) -> None:
    config = load_config(path, ["seed=3", "store=a folder"])
    given = ["--config", str(path), "--set", "seed=3", "--set", "store=a folder"]
    for same in (config, pickle.loads(pickle.dumps(config)), config.model_copy(update={"seed": 4})):
        assert shlex.split(same.options) == given
    assert FarmConfig.model_validate(config.model_dump()) == config
