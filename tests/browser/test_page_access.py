"""The page for everybody: by keyboard, with a screen reader, on a phone, in the dark."""

from __future__ import annotations

from importlib import resources

import pytest
from axe_playwright_python.sync_playwright import Axe
from driving import KEY, choose, edited, shown

pytestmark = pytest.mark.server

PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}


def violations(page):
    """What axe finds against WCAG 2.2 AA and its own good practices, now."""
    page.evaluate("() => Promise.all(document.getAnimations().map((one) => one.finished.catch(() => {})))")
    found = Axe().run(page).response["violations"]
    return [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found]


@pytest.mark.parametrize(("kind", "scheme"), [("desktop", "light"), ("phone", "dark")])
def test_axe_finds_nothing(visit, photo, tmp_path, kind, scheme):
    options = {"color_scheme": scheme, "reduced_motion": "reduce", **(PHONE if kind == "phone" else {})}
    page = visit(complaints="415", **options)
    page.locator(".face.drawn").first.wait_for()
    assert violations(page) == []
    page.set_input_files("#file", photo)
    edited(page, "Charcoal")
    page.get_by_text("Where the time went").click()
    assert violations(page) == []
    (tmp_path / "no.png").write_text("no")
    page.set_input_files("#file", tmp_path / "no.png")
    page.locator("#problem:not([hidden])").wait_for()
    assert violations(page) == []
    page.get_by_role("button", name="Camera").click()
    page.locator("#camera .problem:not([hidden])").wait_for()
    assert violations(page) == []


def test_axe_finds_nothing_in_the_question_for_the_key(visit, served):
    page = visit(served.keyed, complaints="401")
    page.get_by_role("dialog").wait_for()
    assert violations(page) == []
    page.get_by_label("API key").fill(KEY)


def test_everything_is_done_by_keyboard(visit, photo):
    page = visit()
    page.locator(".tile").first.wait_for()
    stops = []
    for _ in range(12):
        page.keyboard.press("Tab")
        stops.append(page.evaluate("(({ id, value, innerText }) => id || value || innerText)(document.activeElement)"))
        if stops[-1] == "charcoal":
            break
    assert stops == ["auto", "Choose a photo", "Use the camera", "format", "strength", "search", "category", "charcoal"]
    # Within the gallery the arrows choose: it is one stop, however many concepts there are.
    page.keyboard.press("ArrowRight")
    assert page.locator("#name").inner_text() == "Cyanotype"
    assert page.locator("#status").inner_text() == "Now it wants a photo."
    page.set_input_files("#file", photo)
    edited(page, "Cyanotype")
    page.keyboard.press("ArrowRight")
    edited(page, "Mood 000")
    outline = page.locator('.tile:has([value="mood-000"]) .face').evaluate(
        "face => getComputedStyle(face).outlineStyle"
    )
    assert outline == "solid"


def test_what_happens_is_announced(visit, photo):
    page = visit()
    page.locator(".tile").first.wait_for()
    tree = page.locator("body").aria_snapshot()
    for line in (
        'heading "Concept farm" [level=1]',
        'region "Your photo"',
        'region "Concepts"',
        'searchbox "Search concepts"',
        'slider "Strength": "100"',
        'radio "Charcoal"',
        "status: 280 concepts",
    ):
        assert line in tree, tree
    page.set_input_files("#file", photo)
    edited(page, "Charcoal")
    tree = page.locator("body").aria_snapshot()
    assert 'img "The photo as it was"' in tree and 'img "The photo edited: Charcoal"' in tree
    assert 'radio "Charcoal" [checked]' in tree
    assert page.get_by_role("status").filter(has_text="Charcoal in").count() == 1


def test_light_and_dark_follow_the_system_until_they_are_chosen(visit):
    def brightness(page):
        return shown(page, ".top").mean()

    page = visit(color_scheme="dark")
    assert brightness(page) < 60
    page.get_by_title("Light").click()
    assert brightness(page) > 200
    page.reload()
    assert brightness(page) > 200
    page.get_by_title("As the system has it").click()
    assert brightness(page) < 60
    page.emulate_media(color_scheme="light")
    assert brightness(page) > 200


def test_a_phone_shows_everything_without_scrolling_sideways(visit, photo):
    page = visit(**PHONE)
    page.locator(".face.drawn").first.wait_for()
    wide = (
        "[...document.querySelectorAll('body *')].filter(e => e.checkVisibility()"
        " && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)"
    )
    fits = "document.documentElement.scrollWidth <= innerWidth"
    assert page.evaluate(fits) and page.evaluate(wide) == []
    page.set_input_files("#file", photo)
    edited(page, "Charcoal")
    assert page.evaluate(fits) and page.evaluate(wide) == []
    # The photo stays in view while the gallery passes below it.
    page.locator('.tile:has([value="mood-030"])').scroll_into_view_if_needed()
    choose(page, "mood-030")
    edited(page, "Mood 030")
    box = page.locator("#frame").bounding_box()
    assert box["y"] >= 0 and box["y"] + box["height"] < 740 / 2
    tile = page.locator('.tile:has([value="mood-030"])').bounding_box()
    assert tile["y"] >= box["y"] + box["height"] - 1


def test_touch_targets_are_large_enough(visit):
    page = visit(**PHONE)
    page.locator(".tile").first.wait_for()
    sizes = page.evaluate(
        "[...document.querySelectorAll('button, select, input:not(#file), a, summary')]"
        ".filter(e => e.checkVisibility()).map(e => [e.outerHTML, e.offsetWidth, e.offsetHeight])"
    )
    assert len(sizes) > 60
    assert [size for size in sizes if min(size[1:]) < 24] == []


def test_the_page_is_small_and_needs_nothing_from_elsewhere():
    files = [file for file in resources.files("farm.serve").joinpath("page").iterdir() if file.is_file()]
    assert sum(len(file.read_bytes()) for file in files) < 60_000
    outside = [file.name for file in files if b"//" in file.read_bytes().replace(b"http://www.w3.org/2000/svg", b"")]
    assert all(name.endswith(".js") for name in outside)  # comments


def test_the_answers_are_the_pages_alone(visit, served):
    page = visit()
    response = page.goto(served.open)
    policy = response.headers["content-security-policy"]
    assert "'unsafe-inline'" not in policy and "'unsafe-eval'" not in policy and "frame-ancestors 'none'" in policy
    assert "camera=(self)" in response.headers["permissions-policy"]
