from __future__ import annotations

import io
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest
import torch
from in_process import PHOTO, encoded, pixels, service_of
from tiny_farm import TinyFarm

from farm.serve.web import choose_format


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
    return service_of(farm)


@pytest.mark.parametrize("concept", ["charcoal", "ink"])
def test_an_edit_is_the_adapters(farm, service, concept):
    response = service.edit(concept, encoded(PHOTO))
    np.testing.assert_array_equal(pixels(response), farm.edit(concept, PHOTO))
    entry = farm.registry.get(concept)
    assert response.headers["content-type"] == "image/png"
    assert response.headers["x-adapter-version"] == "1"
    assert response.headers["x-adapter-digest"] == entry.digest
    assert response.headers["x-base-digest"] == farm.base
    timing = response.headers["server-timing"]
    assert re.findall(r"(\w+);dur=[\d.]+", timing) == ["receive", "decode", "call", "encode", "edit"]
    assert "edit;dur=1.2" in timing


def test_requests_at_once_get_their_own_concepts(farm, service):
    expected = {concept: farm.edit(concept, PHOTO) for concept in ("charcoal", "ink")}
    body = encoded(PHOTO)

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

    alpha = np.dstack([PHOTO, np.zeros((48, 64), np.uint8)])
    white = farm.edit("ink", np.full_like(PHOTO, 255))
    np.testing.assert_array_equal(pixels(service.edit("ink", encoded(alpha))), white)

    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    turned = pixels(service.edit("ink", encoded(PHOTO, exif=exif)))
    np.testing.assert_array_equal(turned, farm.edit("ink", np.rot90(PHOTO, -1)))


@pytest.mark.parametrize(
    ("size", "edited"),
    [((1, 1), (16, 16)), ((64, 48), (64, 48)), ((2000, 1500), (64, 48)), ((40, 1000), (16, 64)), ((3000, 1), (64, 16))],
)
def test_photos_of_any_size_keep_their_aspect(service, size, edited):
    photo = PIL.Image.new("RGB", size, "teal")
    response = service.edit("ink", encoded(photo, "JPEG"), headers={"Content-Type": "text/plain"})
    assert pixels(response).shape == (edited[1], edited[0], 3)


def test_a_large_photo_looks_like_the_edit_of_the_whole(farm, service):
    photo = np.asarray(PIL.Image.fromarray(PHOTO).resize((2000, 1500), PIL.Image.Resampling.BICUBIC))
    difference = pixels(service.edit("ink", encoded(photo))).astype(int) - farm.edit("ink", photo)
    assert np.abs(difference).mean() < 3


def test_the_list_of_concepts(farm, service):
    charcoal, ink = service.request("GET", "/v1/concepts").json()["concepts"]
    assert charcoal["id"] == "charcoal"
    assert ink == {
        "id": "ink",
        "prompt": "an ink drawing",
        "domain": "scenery",
        "version": 1,
        "digest": farm.registry.get("ink").digest,
        "metrics": {"l1": 0.02},
    }


def test_health_and_page(service):
    assert service.request("GET", "/healthz").json() == {"status": "ok"}
    page = service.request("GET", "/")
    assert page.headers["content-type"].startswith("text/html")
    assert "http" not in page.text.replace("http-equiv", "")  # self-contained
    assert "v1/concepts" in page.text
