"""The documentation as it is built, opened as files in a real Chromium."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright import sync_api as playwright

ROOT = Path(__file__).parents[2]
PAGES = [page.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for page in (ROOT / "docs").rglob("*.md")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its address. The build is strict: a link that leads nowhere ends it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", folder]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return folder.as_uri()


@pytest.fixture
def page(browser: playwright.Browser, site: str) -> Iterator[playwright.Page]:
    """Afterwards nothing was asked of any host, and nobody complained."""
    told: list[str] = []
    page = browser.new_page(viewport={"width": 360, "height": 800}, color_scheme="dark")
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("console", lambda line: told.append(line.text))
    page.on("request", lambda asked: None if asked.url.startswith(("data:", site)) else told.append(asked.url))
    yield page
    page.close()
    assert not told


def test_every_page_fits_a_phone_and_asks_nothing_of_anybody(page: playwright.Page, site: str) -> None:
    wide = []
    for name in PAGES:
        page.goto(f"{site}/{name}")
        if page.evaluate("document.documentElement.scrollWidth") > 360:
            wide.append(name)
        assert page.locator("article h1").count() == 1, name
        assert page.evaluate("[...document.images].filter((image) => !image.naturalWidth).length") == 0, name
    assert not wide


@pytest.mark.parametrize(
    ("pasted", "room", "said"),
    [
        (
            "error: my farm.yaml: sources.path: there is no folder /home/me/Pictures; name a folder of photographs.",
            "Photos",
            "sources.path: there is no folder {folder}; name a folder of photographs.",
        ),
        (
            "The store s3://bucket/x is full (507): free space there\n  or raise its limits.",
            "A store that cannot be used",
            "The store {url} is full ({code}): free space there or raise its limits.",
        ),
        ('{"status": 401, "detail": "this key is not known"}', "Serving", "this key is not known"),
        ("unknown key base.train.epoch did you mean", "The farm's file", "{path}: unknown key {place}; did you mean"),
    ],
)
def test_a_pasted_error_finds_its_sentence(page: playwright.Page, site: str, pasted: str, room: str, said: str) -> None:
    page.goto(f"{site}/troubleshooting.html")
    page.get_by_label("An error to look for").fill(pasted)
    first = page.locator("#find li").first
    assert first.locator("code").first.inner_text().startswith(said)
    first.get_by_role("link", name=room).last.click()
    assert page.locator(":target").inner_text().startswith(room)


def test_what_no_sentence_says_is_told(page: playwright.Page, site: str) -> None:
    page.goto(f"{site}/troubleshooting.html")
    box = page.get_by_label("An error to look for")
    box.fill("xyzzy plugh")
    assert page.locator("#find").inner_text() == "No sentence is like this one."
    box.fill("")
    assert page.locator("#find").inner_text() == ""


def test_the_search_needs_no_server(page: playwright.Page, site: str) -> None:
    page.goto(f"{site}/index.html")
    page.locator("label[for=__search]").first.click()
    page.get_by_text("Type to start searching").wait_for()
    page.locator(".md-search__input").press_sequentially("rollback")
    first = page.locator(".md-search-result__item").first
    first.wait_for(timeout=60_000)
    assert "rollback" in first.inner_text()
