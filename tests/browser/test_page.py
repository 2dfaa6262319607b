"""What the page is for: a photo goes in, an edit comes out."""

from __future__ import annotations

import re
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import PIL.Image
import pytest
from driving import choose, edited, shown
from packed import WEIGHTS
from stage_farm import CONCEPTS

from farm.client import Client

pytestmark = pytest.mark.server


def test_a_photo_is_edited_with_the_first_concept_then_with_the_chosen_one(visit, served, photo):
    page = visit()
    page.get_by_text("280 concepts").wait_for()
    page.set_input_files("#file", photo)
    edited(page, "Charcoal")
    assert page.locator("#name").inner_text() == "Charcoal"
    choose(page, "night")
    edited(page, "Night")
    assert page.locator("#prompt").inner_text() == "In the style night"
    status = page.locator("#status").inner_text()
    assert re.fullmatch(r"Night in [\d.]+ m?s, [\d.]+ m?s of it in the model", status)
    page.get_by_text("Where the time went").click()
    steps = page.locator("#times li").all_inner_texts()
    assert {"receive the photo", "load the adapter", "edit"} <= {step.split("\n")[0] for step in steps}
    with Client(served.open) as client:
        digest = client.concept("night").digest
    assert page.locator("#made-by").inner_text().startswith(f"Version 1, adapter {digest[:12]}, base ")


def test_the_download_is_what_the_service_answers(visit, served, photo):
    page = visit()
    page.set_input_files("#file", photo)
    edited(page, "Charcoal")
    choose(page, "cyanotype")
    edited(page, "Cyanotype")
    with Client(served.open) as client:
        for format, name in (("jpeg", "teal lake-cyanotype.jpg"), ("png", "teal lake-cyanotype.png")):
            if format != "jpeg":
                with page.expect_response("**/v1/edit/**"):
                    page.select_option("#format", f"image/{format}")
                page.locator(f'#download[download="{name}"]').wait_for()
            with page.expect_download() as download:
                page.click("#download")
            assert download.value.suggested_filename == name
            assert Path(download.value.path()).read_bytes() == client.edit(photo, "cyanotype", format=format).data


def test_a_pack_for_phones_is_downloaded(visit, served, tmp_path):
    page = visit()
    page.get_by_text("For phones").click()
    row = page.locator("#packs li")
    assert row.locator("strong").inner_text() == f"ONNX, Android, {len(CONCEPTS)} concepts"
    with page.expect_download() as download:
        row.get_by_role("button", name="Download the pack").click()
    with ZipFile(download.value.path()) as archive:
        assert download.value.suggested_filename == f"{archive.namelist()[0].partition('/')[0]}.zip"
        assert archive.read(archive.namelist()[0]) == WEIGHTS


def test_the_comparison_follows_mouse_and_keys(visit, served, photo):
    page = visit(reduced_motion="reduce", viewport={"width": 1200, "height": 800})
    page.select_option("#format", "image/png")
    page.set_input_files("#file", photo)
    edited(page, "Charcoal")
    with Client(served.open) as client:
        after = np.asarray(client.edit(photo, "charcoal").image)
    height, width = shown(page).shape[:2]

    def colour_at(part):
        at = shown(page)[height // 3, int(width * part)]
        candidates = {"before": np.array([0, 128, 128]), "after": after[32, int(128 * part)].astype(int)}
        return min(candidates, key=lambda name: np.abs(candidates[name] - at).sum())

    slider = page.get_by_role("slider", name="Compare")
    assert slider.get_attribute("aria-valuetext") == "50 % before, 50 % after"
    assert [colour_at(part) for part in (0.3, 0.45, 0.55, 0.7)] == ["before", "before", "after", "after"]

    box = slider.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + 50, steps=4)
    page.mouse.up()
    assert abs(int(slider.input_value()) - 20) <= 1
    assert [colour_at(part) for part in (0.1, 0.3)] == ["before", "after"]

    slider.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert abs(int(slider.input_value()) - 23) <= 1
    page.keyboard.press("End")
    assert slider.get_attribute("aria-valuetext") == "100 % before, 0 % after"
    assert colour_at(0.9) == "before"
    page.keyboard.press("Home")
    assert colour_at(0.1) == "after"


def test_the_strength_is_asked_for(visit, photo):
    page = visit()
    page.set_input_files("#file", photo)
    edited(page, "Charcoal")
    slider = page.get_by_role("slider", name="Strength")
    slider.focus()
    with page.expect_request(lambda request: "/v1/edit/" in request.url) as asked:
        for _ in range(6):
            page.keyboard.press("ArrowLeft")
    assert asked.value.url.endswith("/v1/edit/charcoal?strength=0.7")
    assert page.locator("#strength-told").inner_text() == "70\u2009%"
    with page.expect_request(lambda request: "/v1/edit/" in request.url) as asked:
        page.keyboard.press("End")
    assert asked.value.url.endswith("/v1/edit/charcoal")


def test_another_concept_cancels_the_edit_under_way(visit, served, photo):
    page = visit()
    page.set_input_files("#file", photo)
    edited(page, "Charcoal")
    (served.control / "hold").write_text("night")
    with page.expect_request("**/v1/edit/night"):
        choose(page, "night")
    assert "busy" in page.locator("#frame").get_attribute("class")
    assert page.locator("#status").inner_text() == "Editing…"
    with page.expect_event("requestfailed", lambda request: request.url.endswith("night")) as cancelled:
        choose(page, "cyanotype")
    assert cancelled.value.failure == "net::ERR_ABORTED"
    edited(page, "Cyanotype")
    (served.control / "hold").unlink()
    assert page.locator("#problem").is_hidden()


def test_280_concepts_are_searched_filtered_and_loaded_as_they_are_seen(visit):
    page = visit(viewport={"width": 1200, "height": 700})
    fetched = []
    page.on("request", lambda request: fetched.append(request.url) if "preview.webp" in request.url else None)
    page.locator(".face.drawn").first.wait_for()
    tiles = page.locator(".tile")
    assert tiles.count() == 60 and len(fetched) < 60
    while (seen := tiles.count()) < 280:
        page.locator(".tile").last.scroll_into_view_if_needed()
        tiles.nth(seen).wait_for()
    assert seen == 280
    assert page.locator("#further").is_hidden()
    tiles.last.scroll_into_view_if_needed()
    tiles.last.locator(".face.drawn").wait_for()
    assert len(fetched) < 280  # what was passed by quickly was not fetched

    page.get_by_role("searchbox", name="Search concepts").fill("mood-03")
    page.get_by_text("6 concepts", exact=True).wait_for()
    assert page.locator(".tile .label").all_inner_texts() == [f"Mood 03{n}" for n in range(6)]
    page.get_by_role("searchbox").fill("nothing such")
    page.get_by_text("Nothing here is like that.").wait_for()
    page.get_by_role("searchbox").fill("")
    page.get_by_role("combobox", name="Category").select_option(label="Painter (240)")
    page.get_by_text("240 concepts").wait_for()
    assert page.locator(".tile .label").first.inner_text() == "Painter 000"


def test_a_tile_shows_what_the_adapter_made_and_the_photo_it_made_it_of(visit, served):
    page = visit()
    tile = page.locator('.tile:has([value="cyanotype"])')
    tile.locator(".face.drawn").wait_for()
    with Client(served.open) as client:
        sheet = np.asarray(client.preview("cyanotype").convert("RGB")).astype(int)
    for kind, top in (("edited", 260), ("original", 0)):
        data = tile.locator(f".{kind}").evaluate(
            "canvas => [...canvas.getContext('2d').getImageData(0, 0, 128, 128).data]"
        )
        pixels = np.array(data, np.uint8).reshape(128, 128, 4)
        assert np.abs(pixels[..., :3] - sheet[top : top + 128, 390:518]).mean() < 5  # the fourth of six photos


def test_photos_are_dropped_and_pasted(visit, photo):
    page = visit()
    page.evaluate(
        """async (bytes) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "dropped.png", { type: "image/png" }));
            document.dispatchEvent(new DragEvent("dragenter", { dataTransfer: data, bubbles: true }));
            window.dimmed = document.body.classList.contains("dropping");
            document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
        }""",
        list(photo.read_bytes()),
    )
    edited(page, "Charcoal")
    assert page.evaluate("dimmed") and not page.locator("body.dropping").count()
    assert page.locator("#download").get_attribute("download") == "dropped-charcoal.jpg"
    page.evaluate(
        """async (bytes) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "pasted.png", { type: "image/png" }));
            document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true }));
        }""",
        list(photo.read_bytes()),
    )
    page.locator('#download[download="pasted-charcoal.jpg"]').wait_for()


def test_a_photo_is_taken_with_the_camera(visit):
    page = visit(permissions=["camera"])
    page.get_by_role("button", name="Use the camera").click()
    page.get_by_role("button", name="Take the photo").click()
    edited(page, "Charcoal")
    assert page.locator("#camera").is_hidden()
    assert page.evaluate("document.querySelector('#camera video').srcObject") is None
    assert page.locator("#download").get_attribute("download") == "camera-charcoal.jpg"


def test_what_is_too_large_is_reduced_before_it_is_sent(visit, served, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (400, 600, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / "noise.png")
    page = visit(served.small, complaints="413")
    page.set_input_files("#file", tmp_path / "noise.png")
    edited(page, "Charcoal")
    width = page.locator("#after").evaluate("image => image.naturalWidth")
    assert 200 < width < 600

    PIL.Image.new("RGB", (5000, 20), "teal").save(tmp_path / "long.png")
    page = visit()
    page.set_input_files("#file", tmp_path / "long.png")
    edited(page, "Charcoal")
    assert page.locator("#after").evaluate("image => image.naturalWidth") == 4096
    PIL.Image.new("RGB", (90, 60), "teal").save(tmp_path / "moving.gif")  # the service does not take GIF
    page.set_input_files("#file", tmp_path / "moving.gif")
    page.locator('#download[download="moving-charcoal.jpg"]').wait_for()
    assert page.locator("#after").evaluate("image => image.naturalWidth") == 90
