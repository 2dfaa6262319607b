"""`farm doctor` without Ray: each check of a machine on something good and on something bad."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from stage_farm import write_config
from terminal import Terminal

from farm import doctor
from farm.config_file import load_config

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(monkeypatch, capsys, "doctor")


def installed() -> dict[str, str]:
    return {name: metadata.version(name) for name in _required("")}


def _required(extra: str) -> dict[str, Requirement]:
    """What the metadata asks for, read another way than the doctor does."""
    found = {}
    for text in metadata.requires("e2gan-farm") or ():
        requirement = Requirement(text)
        if f"extra == '{extra}'" in str(requirement.marker).replace('"', "'") or (not extra and not requirement.marker):
            found[requirement.name.lower().replace("_", "-")] = requirement
    return found


def test_a_machine_and_a_farm(tmp_path: Path, terminal: Terminal) -> None:
    config = write_config(tmp_path / "farm.yaml", tmp_path / "store")
    document = terminal.document("--quick", "--config", config, "--working-dir", tmp_path)
    what = [check["what"] for check in document["checks"]]
    assert document["ok"] and what[:5] == ["Python", "packages", "extra diffusion", "extra export", "scratch disk"]
    assert {"configuration", "photos and models", "store", "disk", "job upload", "token", "cluster"} < set(what)
    assert all(check["state"] in ("ok", "warning") for check in document["checks"])
    alone = terminal.document("--quick", "--working-dir", tmp_path)
    assert [check["what"] for check in alone["checks"]][5:] == ["token", "job upload"]


def test_a_mistake_in_the_farm_does_not_hide_the_machine(tmp_path: Path, terminal: Terminal) -> None:
    config = write_config(tmp_path / "farm.yaml", tmp_path / "store", stroe="x")
    status, out, err = terminal.farm("--quick", "--config", config, "--working-dir", tmp_path, "--json")
    document = json.loads(out)
    wrong = [check for check in document["checks"] if check["state"] == "error"]
    assert (status, err) == (1, "") and [check["what"] for check in wrong] == ["configuration"]
    assert "did you mean store?" in wrong[0]["found"] and document["checks"][0]["what"] == "Python"


@pytest.mark.parametrize(("version", "state"), [((3, 10, 12), "error"), ((3, 11, 0), "ok"), ((3, 13, 1), "ok")])
def test_python(version: tuple[int, ...], state: str) -> None:
    check = doctor.check_python(version)
    assert check.state == state and check.found.startswith(".".join(map(str, version)))


def test_packages_as_they_should_be() -> None:
    [packages, diffusion, export] = doctor.check_packages()
    assert packages.state in ("ok", "warning") and diffusion.state == export.state == "ok"


def test_packages_missing_and_too_old() -> None:
    without = installed()
    del without["numpy"]
    [packages, *_] = doctor.check_packages(without | {"pillow": "1.0"})
    assert packages.state == "error"
    assert "numpy is missing" in packages.found and "pillow is 1.0, not >=11" in packages.found
    assert packages.found.endswith(doctor.INSTALL)


def test_packages_other_than_tested() -> None:
    [packages, *_] = doctor.check_packages(installed() | {"rich": "99.0"})
    assert packages.state == "warning" and "rich 99.0 (15.0.0 was)" in packages.found
    assert "torch" not in packages.found, "a local version such as 2.14.1+cpu is that version"


def test_an_extra_is_an_error_only_where_a_teacher_needs_it(tmp_path: Path) -> None:
    assert {"diffusers", "transformers"} <= _required("diffusion").keys()
    plain = load_config(write_config(tmp_path / "plain.yaml", tmp_path / "store"))
    [_, diffusion, export] = doctor.check_packages(installed(), plain)
    assert diffusion.state == export.state == "ok" and "not installed" in diffusion.found
    concept = {"id": "charcoal", "prompt": "x", "editor": {"kind": "flux-kontext", "model": "a/b"}}
    config = load_config(write_config(tmp_path / "farm.yaml", tmp_path / "store", catalogue__0=concept))
    [_, diffusion, _] = doctor.check_packages(installed(), config)
    assert diffusion.state == "error" and "diffusers is missing" in diffusion.found
    assert "flux-kontext cannot work without: pip install 'e2gan-farm[diffusion]'" in diffusion.found


def test_a_farm_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", lost)
    [check] = doctor.check_packages({})
    assert check.state == "error" and "is not installed" in check.found


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.check_gpu().state == "ok"
    concept = {"id": "charcoal", "prompt": "x", "editor": {"kind": "flux-kontext", "model": "a/b"}}
    config = load_config(write_config(tmp_path / "farm.yaml", tmp_path / "store", catalogue__0=concept))
    assert doctor.check_gpu(config).state == "warning"
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)'\n")
    program.chmod(0o755)
    found = doctor.check_gpu()
    assert found.state == "warning" and found.found.startswith("the driver has NVIDIA H100 80GB HBM3 and PyTorch")


@pytest.mark.parametrize(("used", "state"), [(94, "ok"), (96, "warning")])
def test_the_disk_of_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used: int, state: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100, used, 100 - used))
    assert doctor.check_scratch(tmp_path).state == state
