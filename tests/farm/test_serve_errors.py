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
from farm.serve import web
from farm.serve.web import BusyError, Edited, ProblemError, choose_format, create_app


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


def failing(error: Exception) -> Service:
    async def edit(concept: str, photo: Image) -> Edited:
        raise error

    def concepts() -> list[dict[str, Any]]:
        raise error

    return Service(create_app(edit, concepts, max_side=SIDE, max_body_mb=0.001))


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
    [b"", b"hello", b"<svg/>", encoded(PHOTO)[:-400], encoded(PHOTO, "JPEG")[:700], b"\xff\xd8\xff" + bytes(500)],
)
def test_what_is_no_image_is_400(service, body):
    assert "the upload" in problem(service.edit("ink", body, headers={"Content-Type": "image/png"}), 400)["detail"]


def test_a_decompression_bomb_is_400(service):
    bomb = encoded(PIL.Image.new("L", (9000, 9000)))
    assert len(bomb) < 200_000
    assert "50 million pixels" in problem(service.edit("ink", bomb), 400)["detail"]


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
    problem(service.edit("ink", bytes(10_000_000)), 400)
    problem(service.edit("ink", bytes(10_000_001)), 413)


def test_a_slow_upload_is_408(service, monkeypatch):
    monkeypatch.setattr(web, "UPLOAD_SECONDS", 0.05)

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


def test_a_fault_of_ours_is_500_without_its_secrets():
    broken = failing(RuntimeError("the password is 1234"))
    for response in (broken.edit("ink", encoded(PHOTO[:8, :8])), broken.request("GET", "/v1/concepts")):
        problem(response, 500)
        assert "1234" not in response.text


def test_too_many_waiting_is_503():
    response = failing(BusyError()).edit("ink", encoded(PHOTO[:8, :8]))
    problem(response, 503)
    assert response.headers["retry-after"] == "1"


def test_the_limit_is_the_one_given():
    assert "0.001 MB" in problem(failing(BusyError()).edit("ink", bytes(1001)), 413)["detail"]
