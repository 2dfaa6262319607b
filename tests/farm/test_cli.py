"""The command line and the job scripts, in this process: what they print, return and leave behind."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from stage_farm import CONCEPTS, Cluster, contents, copied, one_thread, plan_of, write_config
from terminal import Terminal

from farm import cli
from farm.config_file import load_config
from farm.errors import UserError
from farm.events import events_of
from farm.serve.bank import Bank
from farm.serve.engines import Merging
from farm.serve.published import Published
from farm.serve.settings import Settings, arguments
from farm.store import LocalStore

JOBS = {
    "build_concepts": ["concepts"],
    "pretrain_base": ["base"],
    "search_ranks": ["ranks"],
    "train_adapters": ["adapters"],
    "run_farm": None,
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def photo(path: Path, width: int = 96, height: int = 64) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(path)
    return path


def test_a_run_from_nothing_then_again(tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    cluster.stand_in(monkeypatch)
    config = write_config(tmp_path / "farm.yaml", tmp_path / "store")
    status, out, err = terminal.farm("run", "--config", config)
    assert (status, out) == (0, "")
    [report] = [line for line in err.splitlines() if line.startswith("report: ")]
    assert Path(report.removeprefix("report: file://")).is_file()
    assert re.search(r"^sources \d+ s, selection \d+ s, edits \d+ s, base ", err, re.MULTILINE)
    status, out, err = terminal.farm("run", "--config", config, "--json")
    assert status == 0
    assert err.splitlines() == ["everything is in the store already: nothing to do", report]
    outcome = json.loads(out)
    assert outcome["failures"] == {} and report.endswith(outcome["report"])
    assert len(cluster.done) == 10


def test_a_log_of_json_has_nothing_between_its_lines(
    root: Path, tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Warnings, mistakes and an interruption are such lines too; standard output has the result."""
    cluster = Cluster("sepia")
    cluster.stand_in(monkeypatch)
    monkeypatch.setattr("farm.report.build_report", lambda *_, **__: logging.getLogger("farm").warning("odd") or b"")
    copied(root, tmp_path / "store", "sources", "selections", "edits", "quality", "bases", "ranks")
    config = write_config(tmp_path / "farm.yaml", tmp_path / "store")
    status, out, err = terminal.farm("run", "-c", config, "--json", "--log", "json")
    rows = [json.loads(line) for line in err.splitlines()]
    assert status == 1 and json.loads(out)["failures"] == {"sepia": "adapter: training diverged"}
    told = [event.facts for event in events_of(LocalStore(tmp_path / "store"), json.loads(out)["run_id"])]
    assert [row for row in rows if row in told] == told
    assert {row["text"] for row in rows if row not in told} >= {"odd", "failed: 1 of 4 concepts"}

    status, out, err = terminal.farm("run", "-c", config, "--log", "json", "--set", "base.train.epoch=3")
    assert (status, out) == (2, "")
    assert json.loads(err)["text"] == f"error: {config}: unknown key base.train.epoch; did you mean epochs?"
    monkeypatch.setattr("farm.run.run", interrupt)
    status, out, err = terminal.farm("run", "-c", config, "--log", "json")
    assert (status, json.loads(err)["text"]) == (130, "interrupted; the same command goes on from here")


def test_a_failed_concept_is_status_1(
    root: Path, tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    Cluster("sepia").stand_in(monkeypatch)
    copied(root, tmp_path / "store", "sources", "selections", "edits", "quality", "bases", "ranks")
    config = write_config(tmp_path / "farm.yaml", tmp_path / "store", adapters__max_l1_ratio=0.01)
    status, out, err = terminal.farm("run", "-c", config, "--json")
    assert status == 1
    assert json.loads(out)["failures"] == {"sepia": "adapter: training diverged"}
    title = err.splitlines().index("failed: 1 of 4 concepts")
    assert err.splitlines()[title + 1] == "  sepia  adapter: training diverged"
    title = err.splitlines().index("not published: 3 of 4 concepts")
    assert [line.split()[0] for line in err.splitlines()[title + 1 : title + 4]] == [*CONCEPTS[:3]]


def test_a_dry_run(tmp_path: Path, terminal: Terminal) -> None:
    config = write_config(tmp_path / "farm.yaml", tmp_path / "store")
    status, out, err = terminal.farm("run", "--config", config, "--dry-run", "--set", "seed=3")
    assert (status, out) == (0, "")
    assert err.splitlines()[0] == "would ingest the photographs" and "report:" not in err
    assert contents(tmp_path / "store") == {}


def test_mistakes_are_one_sentence_and_status_2(config: Path, tmp_path: Path, terminal: Terminal) -> None:
    none = tmp_path / "none.yaml"
    assert terminal.mistake("run", "--config", none).startswith(f"{none}: cannot be read")
    assert terminal.mistake("status", "--config", none).startswith(f"{none}: cannot be read")
    told = terminal.mistake("run", "--config", config, "--set", "base.train.epoch=3")
    assert told == f"{config}: unknown key base.train.epoch; did you mean epochs?"
    told = terminal.mistake("run", "--config", config, "--stage", "edits")
    assert told == "--stage edits: the stages are concepts, base, ranks, adapters."
    elsewhere = f"store={tmp_path / 'store'}"
    told = terminal.mistake("run", "--config", config, "--stage", "ranks", "--set", elsewhere)
    assert "run jobs/pretrain_base.py or `farm run` first" in told


@pytest.mark.parametrize("command", [["run"], ["run", "--dry-run"], ["status"], ["concepts", "list"]])
def test_a_store_that_cannot_be_written(tmp_path: Path, terminal: Terminal, command: list[str]) -> None:
    (tmp_path / "file").write_text("a regular file")
    for inside in ("file", "file/store"):
        config = write_config(tmp_path / "farm.yaml", tmp_path / inside)
        told = terminal.mistake(*command, "--config", config)
        assert told.startswith(f"The store {tmp_path / inside} cannot be used (")
    assert (tmp_path / "file").read_text() == "a regular file"


def test_usage_errors_and_help(config: Path, terminal: Terminal) -> None:
    assert terminal.farm("run")[0] == 2
    assert terminal.farm("fly")[0] == 2
    assert terminal.farm("edit", "--config", config, "a.png", "b.png", "--concept", "sepia", "--side", "8")[0] == 2
    for command in ([], ["run"], ["status"], ["concepts"], ["concepts", "list"], ["edit"], ["serve"]):
        status, out, _ = terminal.farm(*command, "--help")
        assert status == 0 and "Usage: " in out and "--help" in out


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_an_interrupt_is_status_130(config: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farm.run.run", interrupt)
    status, out, err = terminal.farm("run", "--config", config)
    assert (status, out) == (130, "") and err == "interrupted; the same command goes on from here\n"


def test_status(config: Path, root: Path, terminal: Terminal) -> None:
    status, out, err = terminal.farm("status", "--config", config, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["stages"] == dict.fromkeys(("sources", "selection", "base", "ranks"), "done")
    status, out, _ = terminal.farm("status", "--config", config)
    assert status == 0
    rows = {words[1]: words for line in out.splitlines() if (words := line.split())[1:2] and words[1] in CONCEPTS}
    assert list(rows) == list(CONCEPTS)
    assert rows["sepia"][3:10:2] == ["adapter", "done", "done", "v1"]
    assert "sources done, selection done, base done, ranks done" in out


def test_a_failures_text_is_shown_as_it_is(root: Path, tmp_path: Path, terminal: Terminal) -> None:
    from farm.queue import Queue, owner_name

    store, plan = copied(root, tmp_path / "store", "edits", "quality"), plan_of(root)
    queue = Queue(store, "adapters")
    queue.enqueue(plan.adapter_key("sepia"), {"concept": "sepia"})
    lease = queue.lease(owner_name(), 60)
    assert lease is not None
    queue.fail(lease, "ValueError: [/oops] shape [3, 4]", 1)
    status, out, _ = terminal.farm("status", "--config", write_config(tmp_path / "farm.yaml", tmp_path / "store"))
    assert status == 0 and "failed (ValueError: [/oops] shape [3, 4])" in out


def test_concepts_list(config: Path, terminal: Terminal) -> None:
    status, out, err = terminal.farm("concepts", "list", "--config", config, "--json")
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert list(document) == ["concepts"]
    assert [row["id"] for row in document["concepts"]] == list(CONCEPTS)
    for row in document["concepts"]:
        assert {"id", "domain", "stages", "published"} <= row.keys()
        assert row["stages"] == {"edits": "done", "adapter": "done", "published": "done"} and row["published"] == 1
    lines = terminal.farm("concepts", "list", "--config", config)[1].splitlines()
    assert [line.split(None, 3) for line in lines] == [[c, "v1", "procedural", f"in the style {c}"] for c in CONCEPTS]


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG", "webp"])
def test_edit(config: Path, root: Path, tmp_path: Path, terminal: Terminal, suffix: str) -> None:
    source, target = photo(tmp_path / "photo.png"), tmp_path / f"edited.{suffix}"
    status, out, err = terminal.farm("edit", "-c", config, source, target, "--concept", "sepia")
    digest = plan_of(root).adapter("sepia").digest
    assert (status, out, err) == (0, f"{target}  96x64  sepia v1 {digest}\n", "")
    edited = PIL.Image.open(io.BytesIO(target.read_bytes()))
    assert edited.size == (96, 64)
    assert edited.format == {"png": "PNG", "webp": "WEBP"}.get(suffix, "JPEG")
    if suffix == "png":
        adapter = Bank(Published(LocalStore(root)), Merging, byte_budget=1).get("sepia")
        wanted = adapter.edit(np.asarray(PIL.Image.open(io.BytesIO(source.read_bytes()))))
        np.testing.assert_array_equal(np.asarray(edited), wanted)
    assert not list(tmp_path.glob(".*"))


def test_the_longest_side(config: Path, tmp_path: Path, terminal: Terminal) -> None:
    source, target = photo(tmp_path / "photo.png", 960, 480), tmp_path / "edited.png"
    sizes = []
    for options in ([], ["--side", "128"], ["--set", "serve.max_side=256"]):
        assert terminal.farm("edit", "-c", config, source, target, "--concept", "night", *options)[0] == 0
        sizes.append(PIL.Image.open(io.BytesIO(target.read_bytes())).size)
    assert sizes == [(512, 256), (128, 64), (256, 128)]


def test_edits_that_cannot_be_made(config: Path, root: Path, tmp_path: Path, terminal: Terminal) -> None:
    source, target = photo(tmp_path / "photo.png"), tmp_path / "edited.png"
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(source.read_bytes()[:500])
    before = sorted(tmp_path.rglob("*"))

    def told(source: Path, target: Path, concept: str = "sepia", *options: object) -> str:
        return terminal.mistake("edit", "--config", config, source, target, "--concept", concept, *options)

    assert told(tmp_path / "none.png", target) == (
        f"{tmp_path / 'none.png'}: cannot be read (No such file or directory); give the path of a photo."
    )
    assert told(tmp_path, target).startswith(f"{tmp_path}: cannot be read (Is a directory)")
    assert told(text, target) == f"{text}: not a JPEG, PNG, WebP, BMP, TIFF or GIF image."
    assert told(damaged, target).startswith(f"{damaged}: the image file is damaged")
    assert told(source, target, "sepai").startswith("concept: there is no concept 'sepai' in the catalogue; did you")
    gif = tmp_path / "edited.gif"
    assert told(source, gif) == f"{gif}: the edited photo's name must end in .png, .jpg, .jpeg, .webp."
    for unwritable in (text / "edited.png", tmp_path / "none/edited.png"):
        assert told(source, unwritable).startswith(f"{unwritable}: cannot be written (")
    assert sorted(tmp_path.rglob("*")) == before

    (tmp_path / "folder.png").mkdir()
    assert told(source, tmp_path / "folder.png").startswith(f"{tmp_path / 'folder.png'}: cannot be written (Is a dir")
    assert not list(tmp_path.glob(".*"))


def test_a_concept_not_published(root: Path, tmp_path: Path, terminal: Terminal) -> None:
    copied(root, tmp_path / "store", "bases", "adapters")
    config = write_config(tmp_path / "farm.yaml", tmp_path / "store")
    source, target = photo(tmp_path / "photo.png"), tmp_path / "edited.png"
    told = terminal.mistake("edit", "--config", config, source, target, "--concept", "sepia")
    assert told == "no concept 'sepia' is published."
    assert not target.exists()


def test_what_the_endpoint_is_built_from(config: Path, root: Path) -> None:
    settings = Settings.of(arguments(load_config(config, ["serve.max_side=256"])))
    assert settings.store == root.as_uri()
    described = [(concept.id, concept.prompt, concept.domain, concept.category) for concept in settings.concepts]
    assert described == [(c, f"in the style {c}", "scenery", "other") for c in CONCEPTS]
    assert (settings.max_side, settings.cache_mb) == (256, 512)


@pytest.mark.parametrize("name", JOBS)
def test_a_job_runs_its_stage(name: str, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, _ = terminal.job(name, "--help")
    assert status == 0 and "--config" in out and "--set" in out and "--dry-run" in out
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(cli, "run_stages", lambda *arguments, **options: calls.append((*arguments, options)))
    assert terminal.job(name, "--config", "farm.yaml", "--set", "seed=1", "--set", "name=x", "--dry-run")[0] == 0
    assert calls == [(Path("farm.yaml"), ["seed=1", "name=x"], JOBS[name], {"dry_run": True, "as_json": False})]

    def refuse(*arguments: Any, **options: Any) -> None:
        raise UserError("the one sentence.")

    monkeypatch.setattr(cli, "run_stages", refuse)
    assert terminal.job(name, "--config", "farm.yaml") == (2, "", "error: the one sentence.\n")


def test_the_program_itself_on_a_finished_farm(config: Path, root: Path, tmp_path: Path) -> None:
    """In a process of its own, which must not load Ray."""
    copied(root, tmp_path / "store")
    config = write_config(tmp_path / "farm.yaml", tmp_path / "store")
    code = "import atexit, sys; atexit.register(lambda: print('ray' in sys.modules)); from farm.cli import main; main()"
    command = [sys.executable, "-c", code, "run", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "False\n"
    said = done.stderr.splitlines()
    assert said[0] == "everything is in the store already: nothing to do" and said[1].startswith("report: ")
