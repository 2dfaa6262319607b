"""The report in a real Chromium: it loads nothing, shows everything, and concepts can be found in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright import sync_api as playwright
from stage_farm import CONCEPTS, built, copied, plan_of

from farm.artifacts import find
from farm.registry import Registry
from farm.report import build_report
from farm.store import LocalStore

IMAGES = "[...document.images].map(i => i.decode().then(() => i.naturalWidth > 0))"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a farm where one concept is out of service and one failed."""
    root = tmp_path_factory.mktemp("report")
    store = copied(built(tmp_path_factory.getbasetemp()), root / "farm")
    plan = plan_of(store.root)
    Registry(store).unpublish("night")
    path = root / "report.html"
    failures = {"sepia": "adapter: the loss <b>is no longer finite</b>", "base": "out of memory"}
    path.write_bytes(build_report(store, plan, failures=failures, stage_seconds={"adapter": 12.0}))
    return path


Visit = Callable[..., playwright.Page]


@pytest.fixture
def visit(browser: playwright.Browser, report: Path) -> Iterator[Visit]:
    """Opens the report in a browser of its own; afterwards nothing was asked for and the console is empty."""
    contexts, told, sent = [], [], []

    def visit(anchor: str = "", **options: object) -> playwright.Page:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("console", lambda line: told.append(line.text))
        page.on("request", lambda request: sent.append(request.url))
        page.goto(f"{report.as_uri()}{anchor}")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not told
    assert all(url.startswith((report.as_uri(), "data:")) for url in sent)


def test_every_picture_decodes(visit: Visit) -> None:
    page = visit()
    assert page.evaluate("[...document.images].every(i => i.loading === 'lazy' && i.alt)")
    page.evaluate("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
    shown = page.evaluate(f"Promise.all({IMAGES})")
    assert len(shown) >= len(CONCEPTS) + 2 and all(shown)


def test_concepts_are_found_by_words_state_and_order(visit: Visit) -> None:
    page = visit()
    cards = page.locator("#gallery .card:visible h3")
    told = page.locator("#find output")
    assert told.inner_text() == "4 concepts" and cards.count() == 4
    page.get_by_label("find a concept").fill("style CHAR")
    assert cards.all_inner_texts() == ["charcoal"] and told.inner_text() == "1 of 4 concepts"
    page.get_by_label("find a concept").fill("")
    page.get_by_label("state").select_option("not published")
    assert cards.all_inner_texts() == ["night"]
    page.get_by_label("state").select_option("")
    best = cards.all_inner_texts()
    page.get_by_label("order").select_option("worst")
    assert cards.all_inner_texts() == best[::-1]
    page.get_by_label("order").select_option("name")
    assert cards.all_inner_texts() == sorted(best)


def test_a_link_leads_to_a_concept_that_is_filtered_away(visit: Visit) -> None:
    page = visit("#c-night")
    assert page.evaluate("document.querySelector(':target').id") == "c-night"
    page.get_by_label("find a concept").fill("charcoal")
    assert page.locator("#c-sepia").is_hidden()
    page.locator('#attention + p + div a[href="#c-sepia"]').click()
    page.locator("#c-sepia").wait_for()
    assert page.get_by_label("find a concept").input_value() == ""


def test_metrics_have_their_intervals(visit: Visit, report: Path) -> None:
    page = visit()
    cells = page.locator("#metrics + p + div tbody tr").filter(has_text="charcoal").locator("td").all_inner_texts()
    plan = plan_of(report.parent / "farm")
    adapter = find(LocalStore(report.parent / "farm"), plan.adapter("charcoal").path)
    assert adapter
    scores, (low, high) = adapter.summary["metrics"], adapter.summary["frechet_interval"]["fd_untrained"]
    assert cells[1].split() == [f"{scores['l1']:.3f}", "–".join(f"{end:.3f}" for end in scores["interval"]["l1"])]
    assert cells[5].split() == [f"{scores['frechet']['fd_untrained']:.3f}", f"{low:.3f}–{high:.3f}"]


def test_what_failed_is_told_with_the_command(visit: Visit) -> None:
    rows = visit().locator("#attention + p + div tbody tr").all_inner_texts()
    told = {row.split("\t")[0].strip(): row for row in rows}
    assert "adapter: the loss <b>is no longer finite</b>" in told["sepia"] and "farm run --config" in told["sepia"]
    assert "out of memory" in told["base"] and "farm publish night --config" in told["night"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_stands_in_anyones_way(visit: Visit, scheme: str) -> None:
    page = visit(color_scheme=scheme)
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_it_fits_a_phone_and_a_sheet_of_paper(visit: Visit) -> None:
    page = visit(viewport={"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator("#find").is_hidden() and page.locator("nav").is_hidden()
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    page.set_viewport_size({"width": 703, "height": 1000})  # of A4 less its margins
    assert page.evaluate("document.documentElement.scrollWidth") == 703
    cut = "[...document.querySelectorAll('.scroll')].filter(e => getComputedStyle(e).overflowY !== 'visible').length"
    assert page.evaluate(cut) == 0
