"""`from farm import Farm`, in a script and in the notebook of the docs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import numpy as np
import PIL.Image
import pytest
from stage_farm import CONCEPTS, Cluster, copied, one_thread, plan_of, write_config
from test_cli import photo
from test_show import close_to

from farm import Farm
from farm.errors import UserError
from farm.registry import Registry
from farm.status import farm_status
from farm.store import LocalStore

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs/farm.ipynb"
EXECUTE = """
import sys
import nbformat
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient

notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=240, km=AsyncKernelManager(kernel_name="python3", transport="ipc")).execute()
nbformat.write(notebook, sys.argv[1])
"""
"""In a process of its own: the client leaves sockets open."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def farm(root: Path, tmp_path: Path) -> Farm:
    return Farm(write_config(tmp_path / "farm.yaml", root))


def test_importing_farm_costs_nothing() -> None:
    code = "import sys, farm; print('farm.api' in sys.modules, 'pydantic' in sys.modules); farm.Farm; farm.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False False\n"
    assert done.stderr.endswith("AttributeError: module 'farm' has no attribute 'nothing'\n")


def test_status_and_show(farm: Farm, root: Path) -> None:
    status = farm.status()
    assert dict(status) == farm_status(LocalStore(root), plan_of(root))
    assert repr(status) == "stages: 4 of 4 concepts are published"
    page = status._repr_html_()
    assert all(f'<td style="text-align:left">{c}</td>' in page for c in CONCEPTS)
    shown = farm.show("sepia")
    assert shown["id"] == "sepia" and "in the style sepia" in repr(shown)
    assert shown.preview is not None and shown.preview.format == "WEBP"
    assert '<img src="data:image/webp;base64,' in shown._repr_html_()
    assert farm.concepts == list(CONCEPTS) and "4 concepts" in repr(farm)
    with pytest.raises(UserError, match="did you mean sepia"):
        farm.show("sepai")


def test_edit_and_compare(farm: Farm, tmp_path: Path) -> None:
    source = photo(tmp_path / "photo.png", 64, 48)
    edited = farm.edit(source, "sepia")
    assert isinstance(edited, PIL.Image.Image) and edited.size == (64, 48)
    close_to(np.asarray(farm.edit(np.asarray(PIL.Image.open(source)), "sepia", version=1)), np.asarray(edited))
    compared = farm.compare("sepia", "night@1", source)
    assert compared._repr_png_().startswith(b"\x89PNG") and compared.picture.width == 3 * 128 + 2 * 4
    with pytest.raises(UserError, match="never published as version 9"):
        farm.edit(source, "sepia", version=9)


def test_run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    cluster.stand_in(monkeypatch)
    copied(root, tmp_path / "store", "sources", "selections", "edits", "quality", "bases", "ranks")
    path = write_config(tmp_path / "farm.yaml", tmp_path / "unused")
    farm = Farm(path, {"store": str(tmp_path / "store"), "adapters.train.epochs": 1})
    assert farm.config.adapters.train.epochs == 1
    assert not farm.run(["adapters"], dry_run=True).seconds and not cluster.done
    outcome = farm.run(only=["night"])
    assert not outcome.failures and cluster.done == ["adapter night"] and list(Registry(farm.store).list()) == ["night"]
    with pytest.raises(UserError, match="did you mean night"):
        farm.run(only=["nihgt"])
    with pytest.raises(UserError, match=f"{path}: unknown key sources.sise; did you mean size"):
        Farm(path, ["sources.sise=3"])


def test_the_notebook_runs_as_it_stands(root: Path, tmp_path: Path) -> None:
    """On a farm that has its concepts, in the kernel a reader has."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    copied(root, tmp_path / "store")  # a run leaves a report
    config = write_config(tmp_path / "demo.yaml", tmp_path / "store")
    for cell in notebook.cells:
        cell.source = cell.source.replace('"configs/demo.yaml"', repr(str(config)))
    file = tmp_path / "farm.ipynb"
    nbformat.write(notebook, file)
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path / "ipython")}
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, str(file)], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    notebook = nbformat.read(file, as_version=4)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type in ("error", "stream")], "nothing is told twice"
    shown = [kind for output in outputs for kind in output.get("data", {})]
    assert shown.count("image/png") == 3 and shown.count("text/html") == 3, "edits, a comparison; progress and tables"


def test_the_notebook_has_its_outputs_and_is_small() -> None:
    assert NOTEBOOK.stat().st_size < 400_000
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in cells)
    text = NOTEBOOK.read_text()
    assert "/root/" not in text and "/tmp/" not in text
