"""The page in a real Chromium, before a real server over a real farm of 280 concepts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from driving import KEY
from packed import add_pack
from playwright import sync_api as playwright
from stage_farm import CONCEPTS, built, copied

from farm.artifacts import MANIFEST, dump, find
from farm.registry import Registry
from farm.serve.config import ApiKey
from farm.serve.listing import Described
from farm.serve.settings import Settings

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--use-fake-device-for-media-stream",
    "--host-resolver-rules=MAP photos.test 127.0.0.1",
)
MOODS, PAINTERS = 36, 240
SERVER = Path(__file__).with_name("server.py")


@dataclass(frozen=True)
class Served:
    """Addresses of the same farm: open to all, with a key, and one that takes only small uploads."""

    open: str
    keyed: str
    small: str
    control: Path
    store: Path


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("browser")
    store = copied(built(tmp_path_factory.getbasetemp()), folder / "store", "adapters", "bases", "registry")
    registry = Registry(store)
    entries = [registry.get(concept) for concept in CONCEPTS]
    names = [f"mood-{n:03}" for n in range(MOODS)] + [f"painter-{n:03}" for n in range(PAINTERS)]
    for number, name in enumerate(names):
        entry = entries[number % len(entries)]
        assert entry is not None
        adapter = f"adapters/{name}/{entry.digest}"
        shutil.copytree(store.path(entry.adapter), store.path(adapter), copy_function=os.link)
        manifest = find(store, entry.adapter)
        assert manifest is not None
        store.put(f"{adapter}/{MANIFEST}", dump(manifest.model_copy(update={"path": adapter})))
        registry.publish(name, adapter=adapter, digest=entry.digest, base=entry.base, metrics={})
    add_pack(store, [entry for entry in entries if entry])
    concepts = [described(name) for name in (*CONCEPTS, *names)]
    key = ApiKey(name="tester", sha256=sha256(KEY.encode()).hexdigest())
    texts = [
        Settings(store=store.url, concepts=concepts, watch_seconds=0.2, **own).model_dump_json()
        for own in ({}, {"keys": (key,)}, {"max_body_mb": 0.1})
    ]
    control = folder / "control"
    control.mkdir()
    with subprocess.Popen([sys.executable, SERVER, control, *texts], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ports = process.stdout.readline().split()
        yield Served(*(f"http://127.0.0.1:{port}/" for port in ports), control, folder / "store")
        process.terminate()


def described(concept: str) -> Described:
    """What a catalogue would say; the word before the number is the category."""
    kind, _, number = concept.partition("-")
    return Described(
        id=concept, prompt=f"in the style {concept}", domain="face", category=kind if number else "classic"
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    """Of one module only: an asyncio loop runs as long as Playwright does, and other tests run their own."""
    if CHROMIUM is None:
        pytest.skip("not installed: chromium (apt-get install chromium)")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


Open = Callable[..., playwright.Page]


@pytest.fixture
def visit(browser: playwright.Browser, served: Served) -> Iterator[Open]:
    """Opens the page in a browser of its own; afterwards nothing went elsewhere and the console is empty.

    complaints: what may stand in the console, such as the browser's own line about a status of 404.
    """
    contexts, told, sent = [], [], []

    def visit(url: str = served.open, *, complaints: str | None = None, **options: object) -> playwright.Page:
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(120_000)
        page = context.new_page()
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("console", lambda line: told.append(line.text) if not complaints or complaints not in line.text else 0)
        page.on("request", lambda request: sent.append((url, request.url)))
        page.goto(url)
        return page

    yield visit
    for context in contexts:
        context.close()
    for name in ("busy", "hold"):
        (served.control / name).unlink(missing_ok=True)
    assert not told
    elsewhere = [to for url, to in sent if not to.startswith((url, f"blob:{url}"))]
    assert not elsewhere


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teal, with one corner another colour, so that it can be told which side is up."""
    pixels = np.full((96, 128, 3), (0, 128, 128), np.uint8)
    pixels[:24, :24] = 250
    path = tmp_path_factory.mktemp("photos") / "teal lake.png"
    PIL.Image.fromarray(pixels).save(path)
    return path
