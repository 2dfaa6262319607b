"""Commands and Python of the pages, as they stand there, in a folder like a checkout after `make demo`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import yaml
from blocks import PAGES, ROOT, blocks
from programs import shims
from stage_farm import built, copied, document_of, one_thread, plan_of

from farm.config import FarmConfig
from farm.progress import Screen
from farm.run import run
from farm.serve.settings import Settings
from farm.stages.adapt import adapt, publish

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]

RUN = [block for page in PAGES for block in blocks(page) if block.check == "run" and block.language in ("python", "sh")]
SERVICE = "http://127.0.0.1:8000"
# What the text around a page's Python says is there.
GIVEN = {
    "README.md": """
import functools
import numpy as np
import torch
import e2gan.config
from e2gan.model import build_generator
from e2gan.pairs import Pairs, to_tensor

e2gan.config.TrainConfig = functools.partial(e2gan.config.TrainConfig, epochs=1, batch_size=2, adversarial_weight=0)
config = e2gan.config.GeneratorConfig(channels=8)
weights = build_generator(config, seed=0).state_dict()
text, digest = torch.zeros(77, 768), "0" * 32
noise = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
images = dict(zip("abcd", noise))
pairs = Pairs.from_images(images, {name: 255 - image for name, image in images.items()}, [*images])
""",
    "docs/serving.md": """
import PIL.ImageShow

PIL.ImageShow._viewers.clear()  # no window
""",
}


@dataclass(frozen=True)
class Checkout:
    """A folder with a finished farm at `work/demo`; `service` serves it."""

    folder: Path
    environment: Mapping[str, str]
    service: str

    def run(self, *command: str) -> None:
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Of a shell whose `farm` and `python` answer at once, with a home of its own."""
    folder = tmp_path_factory.mktemp("programs")
    address = folder / "socket"
    shims(folder / "bin", address)
    found = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
        "KEY": "farm_of_nobody",
    }
    server = [sys.executable, ROOT / "tests/docs/programs.py", address]
    with subprocess.Popen(server, stdout=subprocess.PIPE, text=True, env=found) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield found
        process.terminate()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished farm, one of whose concepts has had another adapter before."""
    root = tmp_path_factory.mktemp("pages") / "demo"
    store = copied(built(tmp_path_factory.getbasetemp()), root)
    shutil.rmtree(root / "registry")
    longer = plan_of(root, adapters__train__epochs=4)
    with one_thread():
        adapt(store, longer, "night")
    for plan in (plan_of(root), longer):
        publish(store, plan, "night")
    config = FarmConfig.model_validate(document_of(root) | {"name": "demo"})
    outcome = run(config, screen=Screen())  # the third version, and a report
    assert outcome.report
    assert not outcome.failures
    return root


@pytest.fixture(scope="module")
def service(finished: Path, environment: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    control = tmp_path_factory.mktemp("control")
    settings = Settings.model_validate({"store": str(finished), "max_side": 64, "concepts": []})
    command = ["python", ROOT / "tests/browser/server.py", control, settings.model_dump_json()]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.terminate()


@pytest.fixture
def checkout(tmp_path: Path, environment: Mapping[str, str], finished: Path, service: str) -> Checkout:
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "configs", folder / "configs")
    document = document_of(folder / "work/demo") | {"name": "demo", "store": "work/demo"}
    lines = [f"{key}: {json.dumps(value)}" for key, value in document.items() if key not in ("catalogue", "model")]
    entries = [f"  - {json.dumps(entry)}" for entry in document["catalogue"]]
    # As the real one is laid out, for those who change a line of it.
    text = "\n".join([*lines, "catalogue:", *entries, "", "text: {encoder: hashing}", "model: {channels: 8}"])
    assert yaml.safe_load(text) == document | {"text": {"encoder": "hashing"}}
    (folder / "configs/demo.yaml").write_text(text + "\n")
    copied(finished, folder / "work/demo")
    (folder / ".venv").mkdir()
    (folder / ".venv/bin").symlink_to(Path(environment["PATH"].partition(":")[0]))
    home = tmp_path / "home"
    (home / "Pictures").mkdir(parents=True)
    noise = np.random.default_rng(0)
    for number in range(12):
        pixels = noise.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        picture = PIL.Image.fromarray(pixels).resize((120, 90), PIL.Image.Resampling.BICUBIC)
        picture.save(home / "Pictures" / f"{number}.jpg")
    picture.save(folder / "photo.jpg")
    return Checkout(folder, {**environment, "HOME": str(home)}, service)


@pytest.mark.parametrize("page", dict.fromkeys(block.page for block in RUN))
def test_the_blocks_of_a_page_run_one_after_another(page: str, checkout: Checkout) -> None:
    blocks_of_it = [block for block in RUN if block.page == page]
    if any("curl" in block.text for block in blocks_of_it) and not shutil.which("curl"):
        pytest.skip("not installed: curl (apt-get install curl)")
    for number, block in enumerate(blocks_of_it):
        text = block.text.replace(SERVICE, checkout.service)
        if block.language == "sh":
            checkout.run("bash", "-eu", "-o", "pipefail", "-c", text)
        else:
            script = checkout.folder / f"block{number}.py"
            script.write_text(GIVEN.get(page, "") + text)
            checkout.run("python", str(script))
