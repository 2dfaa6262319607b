"""The benches that compare ways to make a model, on a farm that trains in seconds."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TRAIN = {"epochs": 1, "batch_size": 4, "learning_rate": 5e-3, "adversarial_weight": 0, "l1_weight": 1}
# Seven photographs: four to train on (16 crops), one to validate, two to test.
FARM: dict[str, Any] = {
    "name": "bench",
    "sources": {
        "size": 32,
        "crops_per_photo": 4,
        "crop_scale": [0.5, 1.0],
        "split": {"train": 0.6, "validation": 0.14, "test": 0.26},
    },
    "catalogue": [
        {"id": c, "prompt": f"in the style {c}", "editor": {"kind": "procedural"}}
        for c in ("charcoal", "cyanotype", "night", "sepia")
    ],
    "model": {"channels": 8},
    "base": {"concepts": ["charcoal", "cyanotype"], "train": TRAIN},
    "ranks": {"concepts": ["night"], "train": TRAIN, "tolerance": 0, "patience": 3},
    "adapters": {"train": TRAIN},
}
NUMBERS = ("2", "3", "4", "5", "6", "figure4", "figure7", "10", "11", "12", "13", "14")


def write_farm(root: Path) -> Path:
    path = root / "farm.yaml"
    path.write_text(yaml.safe_dump({**FARM, "store": str(root / "store")}))
    return path


def ablate(config: Path, *args: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "bench" / "ablate.py"), "--config", str(config), "--targets", "sepia", *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=config.parent, env=environment)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done


def here(monkeypatch: pytest.MonkeyPatch, config: Path, *args: str) -> None:
    """The same in this process, which has PyTorch loaded already."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import ablate as bench

    monkeypatch.setattr(sys, "argv", ["ablate.py", "--config", str(config), "--targets", "sepia", *args])
    bench.main()


def records(printed: str) -> dict[str, dict[str, Any]]:
    """Rows by recipe, after the line that describes the run."""
    _, *rows = map(json.loads, printed.splitlines())
    return {row["recipe"]: row for row in rows}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A farm whose store the tests of this module share."""
    return write_farm(tmp_path_factory.mktemp("bench"))


@pytest.fixture
def lab(config: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from study import Study
    from tables import Lab

    from farm.config_file import load_config

    study = Study(load_config(config), config.parent / "unused")
    study.make_edits([])
    yield Lab(study=study, targets=("sepia",), images=16, base_images=32)
    assert not study.folder.exists(), "making recipes trains nothing"


def test_rank_schemes(config: Path) -> None:
    """Table 5, its numbers of parameters counted by hand, and the second run answered from the first one's results."""
    done = ablate(config, "--table", "5", "--images", "8", "--json")
    rows = records(done.stdout)
    assert list(rows) == ["searched ranks", "upscale 1", "upscale 4", "random ranks", "the paper's ranks"]
    # At eight channels every threshold is 1 (32 * 32 / 2048 rounded up): one rank everywhere. A k x k convolution has
    # in * k * k + out parameters a rank, a linear layer in + out.
    convolutions = {"stem": (3, 8, 7), "down1": (8, 16, 3), "down2": (16, 32, 3), "down": (32, 32, 3)}
    convolutions |= {"up": (32, 32, 3), "up1": (32, 16, 3), "up2": (16, 8, 3), "head": (8, 3, 7)}
    size = {name: i * k * k + o for name, (i, o, k) in convolutions.items()}
    linear = 4 * (32 + 32) + 2 * (32 + 32) + 2 * (768 + 32) + (32 + 256) + (128 + 32)
    least = sum(size.values()) + linear
    for name in ("searched ranks", "upscale 1", "upscale 4", "random ranks"):
        assert rows[name]["trainable_parameters"] == least
    paper = {"stem": 1, "down1": 4, "down2": 8, "down": 8, "up": 8, "up1": 8, "up2": 4, "head": 1}
    assert rows["the paper's ranks"]["trainable_parameters"] == linear + sum(size[n] * r for n, r in paper.items())
    assert set(rows["searched ranks"]["ranks"].values()) == {1}
    assert rows["searched ranks"]["paper_other_data"] == {"FID": 109.37, "LoRA, M": 0.092}
    assert rows["the paper's ranks"]["paper_other_data"] is None
    # The sampled concept is the one that neither the base nor the table has.
    assert "rank search on night, round 1" in done.stderr
    for row in rows.values():
        assert row["target"] == "sepia" and row["pairs"] == 8 and row["images"] == 8
        assert row["n"] == 8 and row["frechet"]["fd_untrained"] > 0 and 0 < row["l1"] < 2

    results = config.parent / "store" / "lab" / "results.jsonl"
    kept = results.read_bytes()
    again = ablate(config, "--table", "5", "--images", "8", "--json")
    assert again.stdout.splitlines()[1:] == done.stdout.splitlines()[1:]
    assert "step" in done.stderr and "step" not in again.stderr
    assert results.read_bytes() == kept


def test_frozen_parts(config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    here(monkeypatch, config, "--table", "figure4", "--images", "8", "--base-images", "8", "--json")
    rows = records(capsys.readouterr().out)
    trained = {name: row["trainable_parameters"] for name, row in rows.items()}
    whole = trained["nothing frozen"]
    assert whole == rows["nothing frozen"]["parameters"]
    lost = {part: whole - trained[f"{part} frozen"] for part in ("sampling", "transformer", "residual")}
    assert lost["residual"] == 3 * 2 * (32 * 32 * 9 + 32)
    assert sum(lost.values()) == whole
    for a, b in (("sampling", "transformer"), ("sampling", "residual"), ("transformer", "residual")):
        assert trained[f"{a} and {b} frozen"] == whole - lost[a] - lost[b]
    assert len({row["l1"] for row in rows.values()}) == 7


def test_a_table_beside_the_papers(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = config.parent / "elsewhere"
    here(monkeypatch, config, "--table", "12", "--images", "8", "--base-images", "8", "--out", str(out))
    printed = capsys.readouterr().out
    text = " ".join(printed.split())
    assert "Table 12: An auto-encoder as the base" in text
    assert printed.count("paper") >= 2 and "other" in text and "data" in text
    line = next(line for line in printed.splitlines() if "mixed base" in line)
    assert "sepia" in line and "54.27" in line and "40.18" in line
    kept = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [row["recipe"] for row in kept] == ["auto-encoder", "one concept", "mixed base"]
    assert len({row["l1"] for row in kept}) == 3
    assert len(list((out / "bases").iterdir())) == 3
    assert sorted(p.stem for p in (out / "pictures" / "sepia").iterdir()) == sorted(row["recipe"] for row in kept)
    assert not list((out / "checkpoints").glob("*"))


def test_another_teacher_is_another_result(lab: Any) -> None:
    """A recipe's key covers all but its name."""
    from dataclasses import replace

    from study import Study

    study = lab.study
    study.make_edits(["sepia", "charcoal", "cyanotype"])
    recipe = lab.e2gan("a")
    key = study._recipe_key(recipe, "sepia")
    assert key == study._recipe_key(replace(recipe, name="b"), "sepia")
    document = copy.deepcopy(study.config.model_dump(mode="json"))
    document["catalogue"][3]["prompt"] = "another sepia"
    other = Study(type(study.config).model_validate(document), study.folder)
    other.make_edits(["sepia"])
    changed = [replace(recipe, pairs=4), replace(recipe, ranks=None), replace(recipe, base=lab.base("charcoal"))]
    keys = [study._recipe_key(r, "sepia") for r in changed] + [other._recipe_key(recipe, "sepia")]
    assert len({key, *keys}) == 5


@pytest.mark.parametrize("number", NUMBERS)
def test_recipes_of_every_table(lab: Any, number: str) -> None:
    from tables import TABLES, concepts_of, paper, rows

    from e2gan.model import Generator

    assert tuple(TABLES) == NUMBERS
    planned = rows(number, lab)
    names = [recipe.name for recipe, _ in planned]
    assert len(set(names)) == len(names) >= 2
    assert any(figures for _, figures in planned) == bool(paper(number)["rows"])
    for recipe, _ in planned:
        Generator(recipe.model)
        assert recipe.images >= lab.images and (recipe.pairs or 16) <= 16
        assert recipe.base is None or (recipe.base.concepts and recipe.base.images == lab.base_images)
        assert recipe.ranks is None or recipe.base is not None
        assert "sepia" not in concepts_of(recipe)


def test_what_the_recipes_compare(lab: Any) -> None:
    from tables import rows

    def recipes(number: str) -> dict[str, Any]:
        return {recipe.name: recipe for recipe, _ in rows(number, lab)}

    blocks = recipes("2")
    assert [r.model.transformer_blocks for r in blocks.values()] == [0, 0, 1, 1, 1, 1, 2]
    assert [blocks[f"3RB+1TB at {i}"].model.transformer_position for i in range(4)] == [0, 1, 2, 3]
    assert recipes("3")["pix2pix 9RB"].images == 4 * recipes("3")["E2GAN"].images
    bases = {name: recipe.base.concepts for name, recipe in recipes("4").items()}
    assert len(bases["representative concepts"]) == len(bases["random concepts"]) == 2
    assert bases["representative concepts"] != bases["random concepts"] and len(bases["one concept"]) == 1
    searched = recipes("5")["searched ranks"]
    assert searched.ranks.concept == "night" and searched.base.concepts == ("charcoal", "cyanotype")
    chosen = [(r.pairs, r.selection) for r in recipes("figure7").values()]
    # An eighth of 16 is less than a batch, as is a quarter: the batch's 4 stand for both.
    assert chosen == [(n, how) for n in (4, 6, 8) for how in ("cluster", "random")] + [(None, "cluster")]
    assert [r.model.transformer_sampling for r in recipes("10").values()] == ["conv", "pool"]
    assert [r.base and r.base.model.residual_blocks for r in recipes("11").values()] == [9, None, 3]
    assert [r.base.autoencoder for r in recipes("12").values()] == [True, False, False]
    assert [r.cross_attention for r in recipes("13").values()] == [False, True]
    assert [r.images for r in recipes("14").values()] == [16, 32]


def test_the_network_without_cross_attention_is_smaller(lab: Any) -> None:
    from ablate import costs
    from tables import rows

    (without, _), (whole, _) = rows("13", lab)
    # q, out and its bias, k and v of the prompt, and the norm before it.
    assert costs(whole, 32)["parameters"] - costs(without, 32)["parameters"] == 2 * 32 * 32 + 32 + 2 * 768 * 32 + 2 * 32
    assert costs(whole, 32)["multiply_adds"] > costs(without, 32)["multiply_adds"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--table", "7"], "--table: there is no table '7'; there are 2, 3, 4, 5, 6, figure4, figure7, 10, 11,"),
        ([], "--table: which one? --list prints those there are."),
        (
            ["--table", "6", "--targets", "sepai"],
            "--targets: there is no concept 'sepai' in the catalogue; did you mean",
        ),
        (["--table", "6", "--images", "0"], "--images: at least 1 image, not 0."),
        (["--table", "6", "--images", "many"], "argument --images: invalid int value: 'many'."),
        (["--table", "6", "--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--table", "12", "--targets", "charcoal,cyanotype"], "no concept is left for the base"),
        (["--table", "4", "--targets", "charcoal,cyanotype,night"], "table 4 chooses among concepts"),
    ],
)
def test_mistakes_are_one_sentence(
    config: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    from farm.errors import UserError

    with pytest.raises(UserError) as raised:
        here(monkeypatch, config, *arguments)
    assert str(raised.value).startswith(sentence)
    assert "\n" not in str(raised.value)


def test_a_mistake_is_status_1(config: Path) -> None:
    done = ablate(config, "--table", "99", status=1)
    assert done.stderr.startswith("error: --table: there is no table '99'") and done.stderr.count("\n") == 1


def test_the_list_is_complete(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here(monkeypatch, config, "--list")
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()] == list(NUMBERS)


def test_experiment(config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every row of the experiment on one left-out concept, written to a file as printed, and not trained again."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import experiment

    file = config.parent / "experiment.jsonl"
    options = ["--config", str(config), "--leave-out", "sepia", "--images", "8", "--pairs", "8", "4"]
    monkeypatch.setattr(sys, "argv", ["experiment.py", *options, "--json", str(file)])
    experiment.main()
    printed, said = capsys.readouterr()
    assert file.read_text() == printed
    rows = records(printed)
    assert {name: row["pairs"] for name, row in rows.items() if name.startswith("LoRA, ")} == {
        "LoRA, 8 pairs, cluster": 8,
        "LoRA, 8 pairs, random": 8,
        "LoRA, 4 pairs, cluster": 4,
        "LoRA, 4 pairs, random": 4,
    }
    lora, four_fold = rows["LoRA, 8 pairs, cluster"], rows["LoRA at four times the ranks, 8 pairs, cluster"]
    assert four_fold["trainable_parameters"] == 4 * lora["trainable_parameters"]
    assert rows["base as it is"]["trainable_parameters"] == 0
    assert "full fine-tune, 8 pairs, cluster on sepia: step" in said
    experiment.main()
    again, said = capsys.readouterr()
    assert again == printed
    assert "step" not in said
