from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import PIL.Image
import pytest
import torch
from in_process import PHOTO, Service, encoded, service_of
from tiny_farm import SIDE, TinyFarm

from e2gan.pairs import Image
from farm.serve import uploads
from farm.serve.config import ServiceConfig
from farm.serve.editing import Edited, Wanted
from farm.serve.listing import Listing
from farm.serve.problems import BusyError, ProblemError
from farm.serve.published import Published
from farm.serve.replicas import Replicas
from farm.serve.uploads import choose_format
from farm.serve.web import create_app


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
    service = service_of(farm)
    yield service
    service.close()


def failing(farm: TinyFarm, error: Exception) -> Service:
    """A service that cannot edit."""

    async def edit(wanted: Wanted, photo: Image) -> Edited:
        raise error

    settings = ServiceConfig(max_side=SIDE, max_body_mb=0.001)
    return Service(create_app(edit, Listing(Published(farm.store), []), settings, Replicas(max_waiting=1)))


def problem(response: httpx.Response, status: int) -> dict[str, Any]:
    """The problem document, checked for its form (RFC 9457, section 3.1)."""
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
    document = response.json()
    assert {"type", "title", "status", "detail"} <= document.keys()
    assert (document["type"], document["status"]) == ("about:blank", status)
    assert document["title"] and document["detail"]
    assert "Traceback" not in response.text
    return document


def test_an_unknown_concept_is_404_with_near_names(service):
    document = problem(service.edit("charcaol", encoded(PHOTO)), 404)
    assert document["near"] == ["charcoal"]
    assert "'charcaol'" in document["detail"] and "did you mean charcoal?" in document["detail"]
    assert problem(service.edit("Not a slug!", encoded(PHOTO)), 404)["near"] == []


@pytest.mark.parametrize(
    "body",
    [encoded(PHOTO)[:-400], encoded(PHOTO)[:20], encoded(PHOTO, "JPEG")[:700], b"\xff\xd8\xff" + bytes(500)],
)
def test_a_damaged_image_is_400(service, body):
    assert "the upload" in problem(service.edit("ink", body, headers={"Content-Type": "image/png"}), 400)["detail"]


@pytest.mark.parametrize(
    "body", [b"", b"hello", b"<svg/>", encoded(PHOTO, "GIF"), encoded(PHOTO, "BMP"), b"RIFF" + bytes(40), b"%PDF-1.7"]
)
def test_what_is_no_image_of_the_right_kind_is_415(service, body):
    detail = problem(service.edit("ink", body, headers={"Content-Type": "image/png"}), 415)["detail"]
    assert detail == "the upload: not a JPEG, PNG or WebP image."


def test_a_decompression_bomb_is_413(service):
    bomb = encoded(PIL.Image.new("L", (9000, 9000)))
    assert len(bomb) < 200_000
    assert "50 million pixels" in problem(service.edit("ink", bomb), 413)["detail"]


def test_a_form_without_the_photo_is_422_or_400(service):
    for files, status in (({"photo": encoded(PHOTO)}, 422), ({"image": (None, "text")}, 422)):
        assert "image" in problem(service.request("POST", "/v1/edit/ink", files=files), status)["detail"]
    for kind in ("multipart/form-data", "multipart/form-data; boundary=x", "Multipart/Form-Data; boundary=é"):
        problem(service.edit("ink", encoded(PHOTO), headers={"Content-Type": kind.encode("latin-1")}), 400)


@pytest.mark.parametrize(
    "query", ["size=0", "size=4097", "size=x", "quality=0", "quality=101", "version=0", "strength=1.1", "strength=nan"]
)
def test_parameters_out_of_range_are_422(service, query):
    response = service.request("POST", f"/v1/edit/ink?{query}", content=encoded(PHOTO))
    assert query.partition("=")[0] in problem(response, 422)["detail"]


def test_several_concepts_are_sixteen_at_most(service):
    for count in (0, 17):
        query = "&".join(["concept=ink"] * count)
        problem(service.request("POST", f"/v1/edit?{query}", content=encoded(PHOTO)), 422)


@pytest.mark.parametrize("headers", [{}, {"Content-Length": "10"}, {"Content-Length": "²"}])
def test_an_upload_is_cut_at_the_limit_whatever_its_length_claims(service, headers):
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield bytes(1_000_000)

    response = service.edit("ink", endless(), headers={k: v.encode("latin-1") for k, v in headers.items()})
    assert "10 MB" in problem(response, 413)["detail"]
    assert sent == 11


@pytest.mark.parametrize("length", ["10000001", "9" * 5000])
def test_an_upload_that_announces_too_much_is_not_read(service, length):
    async def unread() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    problem(service.edit("ink", unread(), headers={"Content-Length": length}), 413)


def test_an_upload_of_just_the_limit_is_read(service):
    problem(service.edit("ink", bytes(10_000_000)), 415)
    problem(service.edit("ink", bytes(10_000_001)), 413)


def test_a_slow_upload_is_408(service, monkeypatch):
    monkeypatch.setattr(uploads, "UPLOAD_SECONDS", 0.05)

    async def slow() -> AsyncIterator[bytes]:
        yield b"\x89PNG"
        await asyncio.sleep(20)

    problem(service.edit("ink", slow()), 408)


def test_a_client_that_hangs_up_is_no_error_of_ours(service):
    sent = []

    async def hang_up() -> None:
        scope = {"type": "http", "method": "POST", "path": "/v1/edit/ink", "headers": [], "query_string": b""}

        async def receive() -> dict[str, Any]:
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await service.transport.app(scope, receive, send)

    asyncio.run(hang_up())
    assert sent[0]["status"] == 400


@pytest.mark.parametrize("accept", ["text/html", "image/avif", "image/png;q=0", ""])
def test_formats_that_nobody_makes_are_refused(service, accept):
    with pytest.raises(ProblemError):
        choose_format(accept)
    if accept:
        assert "image/webp" in problem(service.edit("ink", b"", headers={"Accept": accept}), 406)["detail"]


def test_what_is_not_there_is_404_and_what_cannot_be_done_405(service):
    assert "/v2" in problem(service.request("GET", "/v2"), 404)["detail"]
    problem(service.request("GET", "/docs"), 404)
    problem(service.edit("a%2Fb", b""), 404)
    response = service.request("GET", "/v1/edit/ink")
    assert "GET" in problem(response, 405)["detail"]
    assert response.headers["allow"] == "POST"
    problem(service.request("DELETE", "/v1/concepts"), 405)


def test_an_absurd_name_is_422(service):
    assert "concept" in problem(service.edit("x" * 101, b""), 422)["detail"]


def test_a_fault_of_ours_is_500_without_its_secrets(farm):
    broken = failing(farm, RuntimeError("the password is 1234"))
    for path in ("/v1/edit/ink", "/v1/edit?concept=ink"):
        response = broken.request("POST", path, content=encoded(PHOTO[:8, :8]))
        problem(response, 500)
        assert "1234" not in response.text


def test_too_many_waiting_is_503(farm):
    busy = failing(farm, BusyError())
    response = busy.edit("ink", encoded(PHOTO[:8, :8]))
    problem(response, 503)
    assert response.headers["retry-after"] == "1"
    several = busy.request("POST", "/v1/edit?concept=ink", content=encoded(PHOTO[:8, :8])).json()
    assert several["edits"][0]["status"] == 503


def test_nobody_edits_is_unhealthy(farm):
    for path in ("/healthz", "/readyz"):
        assert "no edit" in problem(failing(farm, BusyError()).request("GET", path), 503)["detail"]


def test_a_concept_that_cannot_be_loaded_is_503_and_the_others_go_on(tmp_path):
    farm = TinyFarm(tmp_path / "store")
    entry = farm.publish("ink", seed=1)
    farm.publish("fog", seed=2)
    farm.store.put(f"{entry.adapter}/adapter_model.safetensors", b"")
    service = service_of(farm)
    answer = service.edit("ink", encoded(PHOTO))
    assert "ink cannot be loaded now" in problem(answer, 503)["detail"]
    assert answer.headers["retry-after"] == "5"
    assert service.edit("fog", encoded(PHOTO)).status_code == 200


def test_the_limit_is_the_one_given(farm):
    assert "0.001 MB" in problem(failing(farm, BusyError()).edit("ink", bytes(1001)), 413)["detail"]
