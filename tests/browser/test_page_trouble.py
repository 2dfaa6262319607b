"""The page when something is wrong: it says what, in the service's words, and what to do."""

from __future__ import annotations

import time

import pytest
from driving import KEY, choose, edited

from farm.client import Client
from farm.registry import Registry
from farm.store import LocalStore

pytestmark = pytest.mark.server


def problem(page):
    page.get_by_role("alert").first.wait_for()
    return page.locator("#problem p").inner_text()


def test_what_is_no_image_is_said_in_the_services_sentence(visit, photo, tmp_path):
    page = visit(complaints="415")
    text = tmp_path / "notes.png"
    text.write_text("hello")
    page.set_input_files("#file", text)
    assert problem(page) == "The upload: not a JPEG, PNG or WebP image."
    assert page.locator("#frame").is_hidden() and page.get_by_role("button", name="Choose a photo").is_visible()
    assert page.get_by_role("button", name="Try again").count() == 0  # it would be the same again
    page.set_input_files("#file", photo)
    edited(page, "Charcoal")
    assert page.locator("#problem").is_hidden()


def test_a_concept_that_is_gone_offers_its_neighbours(visit, served, photo):
    page = visit(complaints="404")
    page.set_input_files("#file", photo)
    edited(page, "Charcoal")
    registry = Registry(LocalStore(served.store))
    registry.unpublish("mood-035")
    with Client(served.open) as client:
        while any(concept.id == "mood-035" for concept in client.concepts("mood")):
            time.sleep(0.05)
    try:
        choose(page, "mood-035")
        assert problem(page).startswith("No concept 'mood-035' is published; did you mean ")
        near = page.locator("#problem button").all_inner_texts()
        assert near and all(name.startswith("Mood 0") for name in near)
        page.locator("#problem button").first.click()
        edited(page, near[0])
    finally:
        registry.rollback("mood-035")


def test_a_busy_service_is_asked_again_when_it_says(visit, served, photo):
    page = visit(complaints="503")
    (served.control / "busy").write_text("4")
    page.set_input_files("#file", photo)
    page.get_by_text("Too many edits are waiting; try again shortly. Trying again in 1 s.").wait_for()
    (served.control / "busy").write_text("0")
    edited(page, "Charcoal")
    assert page.locator("#problem").is_hidden()


def test_a_service_that_is_away_is_said_and_tried_again(visit, photo):
    page = visit(complaints="ERR_INTERNET_DISCONNECTED")
    page.get_by_text("280 concepts").wait_for()
    page.context.set_offline(True)
    page.set_input_files("#file", photo)
    assert problem(page) == "The service does not answer; is it still running?"
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    edited(page, "Charcoal")


def test_the_key_is_asked_for_and_kept_in_the_tab(visit, served, photo):
    page = visit(served.keyed, complaints="401")
    dialog = page.get_by_role("dialog", name="This farm asks for a key")
    dialog.wait_for()
    page.keyboard.press("Escape")
    assert "key" in problem(page)
    page.get_by_role("button", name="Try again").click()
    field = page.get_by_label("API key")
    field.fill("wrong")
    page.keyboard.press("Enter")
    dialog.get_by_text("This key is not known.").wait_for()
    field.fill(KEY)
    page.keyboard.press("Enter")
    page.locator(".face.drawn").first.wait_for()  # previews are fetched with it
    page.set_input_files("#file", photo)
    edited(page, "Charcoal")
    assert KEY not in page.url
    page.reload()
    page.locator(".face.drawn").first.wait_for()
    assert dialog.is_hidden()


@pytest.mark.parametrize(
    ("missing", "said"),
    [("permission", "The camera may not be used; allow it"), ("https", "Browsers give cameras only to pages at")],
)
def test_a_camera_that_cannot_be_had_is_explained(visit, served, missing, said):
    url = served.open.replace("127.0.0.1", "photos.test") if missing == "https" else served.open
    page = visit(url, complaints="Cross-Origin-Opener-Policy header has been ignored")
    page.get_by_role("button", name="Use the camera").click()
    page.locator("#camera").get_by_text(said).wait_for()
    assert page.get_by_role("button", name="Take the photo").is_disabled()
    page.keyboard.press("Escape")
    assert page.locator("#camera").is_hidden()
