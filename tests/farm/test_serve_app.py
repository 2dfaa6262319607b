from __future__ import annotations

import base64
import io
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest
import torch
from in_process import PHOTO, encoded, pixels, service_of
from tiny_farm import TinyFarm

from farm.serve.uploads import choose_format


def close(edited, expected):
    """Merged weights in bf16, and bf16 where autocast wants it, round differently."""
    return np.abs(edited.astype(int) - expected).mean() < 3


@pytest.fixture(scope="module")
def farm(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    farm = TinyFarm(tmp_path_factory.mktemp("farm") / "store")
    farm.publish("charcoal", seed=1)
    farm.publish("ink", seed=2)
    yield farm
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def service(farm):
    service = service_of(farm, max_waiting=10)
    yield service
    service.close()


@pytest.mark.parametrize("concept", ["charcoal", "ink"])
def test_an_edit_is_the_adapters(farm, service, concept):
    response = service.edit(concept, encoded(PHOTO))
    assert close(pixels(response), farm.edit(concept, PHOTO))
    entry = farm.registry.get(concept)
    assert response.headers["content-type"] == "image/png"
    assert response.headers["x-adapter-version"] == "1"
    assert response.headers["x-adapter-digest"] == entry.digest
    assert response.headers["x-base-digest"] == farm.base
    timing = response.headers["server-timing"]
    steps = dict(re.findall(r"(\w+);dur=([\d.]+)", timing))
    assert [*steps] == ["receive", "decode", "call", "encode", "load", "wait", "edit"]
    assert float(steps["call"]) >= float(steps["edit"]) > 0


def test_requests_at_once_get_their_own_concepts(farm, service):
    body = encoded(PHOTO)
    expected = {concept: pixels(service.edit(concept, body)) for concept in ("charcoal", "ink")}

    def ask(number: int) -> bool:
        concept = ("charcoal", "ink")[number % 2]
        response = service.edit(concept, body)
        digest = farm.registry.get(concept).digest
        return response.headers["x-adapter-digest"] == digest and np.array_equal(pixels(response), expected[concept])

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(ask, range(24)))


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_accept_chooses_the_format(service, format):
    response = service.edit("ink", encoded(PHOTO, "WEBP"), headers={"Accept": f"image/{format}"})
    assert response.headers["content-type"] == f"image/{format}"
    assert PIL.Image.open(io.BytesIO(response.content)).format == format.upper()


@pytest.mark.parametrize(
    ("accept", "format"),
    [
        ("*/*", "png"),
        ("image/*", "png"),
        ("IMAGE/JPEG", "jpeg"),
        ("image/avif,image/webp,image/apng,image/*,*/*;q=0.8", "png"),
        ("image/png;q=0.5, image/jpeg;q=0.7", "jpeg"),
        ("image/png;q=0, */*", "jpeg"),
        ("text/html, image/webp;q=0.1", "webp"),
        ("image/webp; q=nonsense", "webp"),
        (",;, image/*;q=0.2,image/webp;level=1;q=0.9", "webp"),
    ],
)
def test_accept_is_read_as_http_says(accept, format):
    assert choose_format(accept) == format


def test_without_accept_it_is_png(service):
    assert service.edit("ink", encoded(PHOTO)).headers["content-type"] == "image/png"


def test_odd_photos_are_edited(farm, service):
    cmyk = PIL.Image.fromarray(PHOTO).convert("CMYK")
    assert pixels(service.edit("ink", encoded(cmyk, "JPEG"))).shape == (48, 64, 3)

    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    turned = pixels(service.edit("ink", encoded(PHOTO, exif=exif)))
    assert close(turned, farm.edit("ink", np.rot90(PHOTO, -1)))


def test_alpha_is_kept_and_a_jpeg_has_white_instead(farm, service):
    alpha = np.zeros((48, 64), np.uint8)
    alpha[:, 32:] = 255
    alpha[:10] = 128
    hidden = np.where(alpha[..., None] == 0, np.random.default_rng(1).integers(0, 256, PHOTO.shape), PHOTO)
    upload = encoded(np.dstack([hidden.astype(np.uint8), alpha]))
    seen = np.where(alpha[..., None] == 0, 255, PHOTO).astype(np.uint8)
    expected = farm.edit("ink", seen)
    for format in ("png", "webp"):
        edited = pixels(service.edit("ink", upload, headers={"Accept": f"image/{format}"}))
        assert edited.shape == (48, 64, 4)
        np.testing.assert_array_equal(edited[..., 3], alpha)
        if format == "png":
            assert close(edited[..., :3], expected)
    flat = pixels(service.edit("ink", upload, headers={"Accept": "image/jpeg"}))
    assert (flat[16:, :24] > 240).all()
    opaque = encoded(np.dstack([PHOTO, np.full((48, 64), 255, np.uint8)]))
    assert pixels(service.edit("ink", opaque)).shape == (48, 64, 3)


@pytest.mark.parametrize(
    ("size", "query", "answered"),
    [
        ((1, 1), "", (1, 1)),
        ((64, 48), "", (64, 48)),
        ((2000, 1500), "", (2000, 1500)),
        ((40, 1000), "", (40, 1000)),
        ((3000, 1), "", (3000, 1)),
        ((5000, 20), "", (4096, 16)),
        ((2000, 1500), "?size=100", (100, 75)),
        ((50, 100), "?size=1000", (500, 1000)),
    ],
)
def test_photos_of_any_size_keep_their_aspect(service, size, query, answered):
    photo = PIL.Image.new("RGB", size, "teal")
    response = service.request(
        "POST", f"/v1/edit/ink{query}", content=encoded(photo, "JPEG"), headers={"Content-Type": "text/plain"}
    )
    assert pixels(response).shape == (answered[1], answered[0], 3)


def test_a_form_does_as_well(service):
    body = encoded(PHOTO)
    form = service.request("POST", "/v1/edit/ink", files={"image": ("a photo.png", body, "image/png")})
    np.testing.assert_array_equal(pixels(form), pixels(service.edit("ink", body)))


def test_quality_makes_files_larger(service):
    def size(quality: int) -> int:
        path, headers = f"/v1/edit/ink?quality={quality}", {"Accept": "image/jpeg"}
        return len(service.request("POST", path, content=encoded(PHOTO), headers=headers).content)

    assert size(5) < size(90)


def test_versions_and_strengths_are_chosen(tmp_path):
    farm = TinyFarm(tmp_path / "store")
    farm.publish("ink", seed=2)
    first = farm.edit("ink", PHOTO)
    farm.publish("ink", seed=3)
    service = service_of(farm)
    ask = lambda query: service.request("POST", f"/v1/edit/ink{query}", content=encoded(PHOTO))  # noqa: E731
    assert close(pixels(ask("?version=1")), first)
    assert ask("?version=1").headers["x-adapter-version"] == "1"
    assert close(pixels(ask("")), farm.edit("ink", PHOTO))
    untouched, half, whole = (pixels(ask(f"?strength={s}")).astype(float) for s in (0, 0.5, 1))
    assert 0 < np.abs(half - whole).mean() < np.abs(untouched - whole).mean()
    assert ask("?version=3").status_code == 404


def test_several_concepts_for_one_photo(service):
    body = encoded(PHOTO)
    answer = service.request("POST", "/v1/edit?concept=ink&concept=inkk&concept=charcoal", content=body).json()
    ink, unknown, charcoal = answer["edits"]
    assert [edit["status"] for edit in answer["edits"]] == [200, 404, 200]
    assert (unknown["concept"], unknown["problem"]["near"]) == ("inkk", ["ink"])
    for edit in (ink, charcoal):
        assert edit["type"] == "image/png"
        assert base64.b64decode(edit["image"]) == service.edit(edit["concept"], body).content
        assert edit["digest"] == service.edit(edit["concept"], body).headers["x-adapter-digest"]


def test_a_large_photo_looks_like_the_edit_of_the_whole(farm, service):
    photo = np.asarray(PIL.Image.fromarray(PHOTO).resize((2000, 1500), PIL.Image.Resampling.BICUBIC))
    for format, difference in (("PNG", 4), ("JPEG", 8)):
        answer = service.request("POST", "/v1/edit/ink?size=64", content=encoded(photo, format))
        assert np.abs(pixels(answer).astype(int) - farm.edit("ink", photo)).mean() < difference


def test_concepts_are_listed_and_not_sent_twice(farm, service):
    listed = service.request("GET", "/v1/concepts?q=drawing")
    assert [row["id"] for row in listed.json()["concepts"]] == ["ink"]
    assert listed.json()["categories"] == [{"id": "drawing", "count": 1}]
    for path in ("/v1/concepts?q=drawing", "/v1/concepts/ink"):
        tag = service.request("GET", path).headers["etag"]
        for known in (tag, f'"other", W/{tag}', "*"):
            again = service.request("GET", path, headers={"If-None-Match": known})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        assert service.request("GET", path, headers={"If-None-Match": '"other"'}).status_code == 200
    detail = service.request("GET", "/v1/concepts/ink").json()
    assert service.request("GET", detail["lineage"]).json()["release"]["digest"] == detail["digest"]


def test_health_metrics_and_page(service):
    service.edit("ink", encoded(PHOTO))
    assert service.request("GET", "/healthz").json() == service.request("GET", "/readyz").json() == {"status": "ok"}
    page = service.request("GET", "/")
    assert page.headers["content-type"].startswith("text/html")
    assert "http" not in page.text.replace("http-equiv", "")  # self-contained
    assert "v1/concepts" in service.request("GET", "/page/gallery.js").text
    metrics = service.request("GET", "/metrics").text
    assert re.search(r'farm_requests_total{method="POST",route="/v1/edit/\{concept\}",status="200"} [1-9]', metrics)
    for name in ("bytes", "hits_total", "loads_total", "evictions_total", "photos_total", "stale"):
        assert re.search(rf'farm_replica_{name}{{replica="\w+"}} \d', metrics), name
    assert re.search(r'farm_stage_seconds_count{stage="edit"} [1-9]', metrics)
