from __future__ import annotations

import inspect
import io
import itertools
import socket
import subprocess
import sys
import threading
import typing
from collections.abc import Iterator

import numpy as np
import PIL.Image
import pytest
import uvicorn
from in_process import PHOTO, encoded, service_of
from PIL import ImageCms
from pydantic import TypeAdapter
from tiny_farm import TinyFarm

from farm.client import (
    BusyError,
    Client,
    ConceptDetail,
    ConceptPage,
    Edit,
    Format,
    KeyRefusedError,
    NotFoundError,
    RefusedError,
    ServiceError,
    UnreachableError,
)
from farm.client_errors import ERRORS

pytestmark = pytest.mark.server


class Running:
    """An application at a port of this machine. `requests` counts what came in; `broken` answers in its place."""

    def __init__(self, app) -> None:
        self.app = app
        self.broken: Iterator[tuple[int, list[tuple[bytes, bytes]], bytes]] = iter(())
        self.requests: list[str] = []
        self.headers: list[dict[bytes, bytes]] = []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = uvicorn.Server(
            uvicorn.Config(self._answer, interface="asgi3", lifespan="off", log_level="warning")
        )
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))
        self.thread.start()

    async def _answer(self, scope, receive, send):
        self.requests.append(f"{scope['method']} {scope['raw_path'].decode()}?{scope['query_string'].decode()}")
        self.headers.append(dict(scope["headers"]))
        if answer := next(self.broken, None):
            status, headers, body = answer
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})
        else:
            await self.app(scope, receive, send)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.socket.close()


def alike(edited, expected) -> bool:
    """The service may compute in bf16."""
    return np.abs(np.asarray(edited).astype(int) - expected).mean() < 3


@pytest.fixture(scope="module")
def farm(tmp_path_factory):
    farm = TinyFarm(tmp_path_factory.mktemp("farm") / "store")
    for seed, concept in enumerate(("charcoal", "ink", "pencil"), start=1):
        farm.publish(concept, seed=seed)
    return farm


@pytest.fixture(scope="module")
def app(farm):
    return service_of(farm).transport.app


@pytest.fixture(scope="module")
def running(app):
    running = Running(app)
    yield running
    running.stop()


@pytest.fixture
def client(running):
    running.requests.clear()
    with Client(running.url) as client:
        yield client


def test_an_edit_is_the_adapters_with_all_that_the_service_says_of_it(farm, client):
    edit = client.edit(PHOTO, "ink")
    assert alike(edit.image, farm.edit("ink", PHOTO)) and not alike(edit.image, farm.edit("charcoal", PHOTO))
    entry = farm.registry.get("ink")
    assert (edit.concept, edit.version, edit.digest, edit.base) == ("ink", 1, entry.digest, farm.base)
    assert {"receive", "decode", "edit", "encode"} <= edit.timing.keys()
    assert all(took >= 0 for took in edit.timing.values())
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(io.BytesIO(edit.data))), np.asarray(edit.image))


def test_a_photo_may_be_a_path_bytes_a_picture_or_an_array(farm, client, tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(PHOTO))
    wanted = farm.edit("ink", PHOTO)
    for photo in (path, str(path), path.read_bytes(), PIL.Image.fromarray(PHOTO), PHOTO):
        assert alike(client.edit(photo, "ink").image, wanted)
    with pytest.raises(ValueError, match="uint8, not float64"):
        client.edit(PHOTO / 255, "ink")
    with pytest.raises(FileNotFoundError):
        client.edit(tmp_path / "none.png", "ink")


def test_a_picture_in_memory_is_edited_as_its_file_would_be(client):
    """Turned by EXIF, with alpha, as CMYK with its profile, and grey: what `Image.open` gives loses nothing."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    files = [
        encoded(PHOTO, exif=exif),
        encoded(PIL.Image.fromarray(PHOTO).convert("RGBA")),
        encoded(PIL.Image.fromarray(PHOTO), icc_profile=profile),
        encoded(PIL.Image.fromarray(PHOTO).convert("CMYK"), "JPEG"),
        encoded(PIL.Image.fromarray(PHOTO).convert("L")),
        encoded(PIL.Image.fromarray(PHOTO).quantize()),
    ]
    for file in files:
        opened = PIL.Image.open(io.BytesIO(file))
        of_file, of_picture = client.edit(file, "ink").image, client.edit(opened, "ink").image
        assert (of_file.mode, of_file.size) == (of_picture.mode, of_picture.size)
        assert np.abs(np.asarray(of_file).astype(int) - np.asarray(of_picture)).max() <= 2, opened.mode
    grey = PHOTO[..., 0]
    assert client.edit(grey, "ink").image.size == (64, 48)


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_format_size_quality_and_strength_are_asked_for(running, client, format):
    edit = client.edit(PHOTO, "ink", size=100, quality=30, strength=0.5, format=format)
    assert (edit.image.format, max(edit.image.size)) == (format.upper(), 100)
    assert running.requests[-1] == "POST /v1/edit/ink?size=100&quality=30&strength=0.5"
    client.edit(PHOTO, "ink", version=1)
    assert running.requests[-1] == "POST /v1/edit/ink?version=1"


def test_several_concepts_of_one_photo(farm, client):
    charcoal, unknown, ink = client.edits(PHOTO, ["charcoal", "inkk", "ink"])
    for edit, concept in ((charcoal, "charcoal"), (ink, "ink")):
        assert isinstance(edit, Edit)
        assert (edit.concept, edit.digest) == (concept, farm.registry.get(concept).digest)
        assert alike(edit.image, farm.edit(concept, PHOTO))
    assert isinstance(unknown, NotFoundError)
    assert unknown.near == ("ink",)


def test_concepts_are_fetched_page_by_page_as_they_are_needed(farm, running, client):
    found = client.concepts(per_page=1)
    assert not running.requests
    assert [concept.id for concept in itertools.islice(found, 2)] == ["charcoal", "ink"]
    assert len(running.requests) == 2
    assert [concept.id for concept in found] == ["pencil"]
    assert [concept.id for concept in client.concepts("an ink")] == ["ink"]
    assert [concept.id for concept in client.concepts(category="drawing")] == ["ink"]
    assert list(client.concepts("nothing such")) == []
    assert client.page(per_page=2).total == 3


def test_one_concept_with_its_history(farm, client):
    concept = client.concept("ink")
    entry = farm.registry.get("ink")
    assert (concept.prompt, concept.domain, concept.digest) == ("an ink drawing", "scenery", entry.digest)
    assert [release.version for release in concept.history] == [1]
    with pytest.raises(NotFoundError, match="has no preview"):
        client.preview("ink")


def test_a_preview_is_a_picture(running, client):
    running.broken = iter([(200, [(b"content-type", b"image/webp")], encoded(PHOTO, "WEBP", lossless=True))])
    np.testing.assert_array_equal(np.asarray(client.preview("ink")), PHOTO)


def test_errors_carry_the_services_words(client):
    with pytest.raises(NotFoundError) as unknown:
        client.edit(PHOTO, "inkk")
    assert (unknown.value.status, unknown.value.near) == (404, ("ink",))
    assert str(unknown.value) == unknown.value.detail == "no concept 'inkk' is published; did you mean ink?"
    with pytest.raises(NotFoundError):
        client.edit(PHOTO, "../concepts")
    with pytest.raises(RefusedError, match="not a JPEG") as refused:
        client.edit(b"hello", "ink")
    assert refused.value.status == 415
    with pytest.raises(RefusedError, match="strength"):
        client.edit(PHOTO, "ink", strength=2)


@pytest.mark.parametrize("body", [b"<html>", b"", b"[1, 2]", b'"no"'])
def test_an_answer_that_is_no_problem_document_is_an_error_all_the_same(running, client, body):
    running.broken = iter([(502, [], body)])
    with pytest.raises(ServiceError, match="answered 502 Bad Gateway") as error:
        client.concept("ink")
    assert (type(error.value), error.value.status) == (ServiceError, 502)


def test_a_busy_service_is_asked_again_when_it_says(running, client, monkeypatch):
    waited = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waited.append)
    busy = b'{"detail": "too many edits are waiting; try again shortly"}'
    running.broken = iter(
        [(503, [(b"retry-after", b"7")], busy), (429, [(b"retry-after", b"2")], busy), (503, [], b"")]
    )
    assert client.edit(PHOTO, "ink").version == 1
    assert waited == [7, 2, 1]
    assert len(running.requests) == 4


def test_patience_has_an_end(running, monkeypatch):
    waited = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waited.append)
    busy = b'{"detail": "too many edits are waiting; try again shortly"}'
    with Client(running.url, tries=3) as client:
        running.broken = iter([(503, [(b"retry-after", b"1")], busy)] * 3)
        with pytest.raises(BusyError, match="too many edits") as error:
            client.concept("ink")
        assert (error.value.status, error.value.retry_after, waited) == (503, 1, [1, 1])
    with Client(running.url, patience=30) as client:
        running.broken = iter([(503, [(b"retry-after", b"3600")], busy)])
        with pytest.raises(BusyError):
            client.concept("ink")
        assert waited == [1, 1]


def test_the_key_goes_into_a_header(running):
    with Client(running.url, key="sesame") as client:
        client.concept("ink")
        assert running.headers[-1][b"authorization"] == b"Bearer sesame"
        running.broken = iter([(401, [], b'{"detail": "this key is not known"}')])
        with pytest.raises(KeyRefusedError, match="this key is not known"):
            client.concept("ink")
    with Client(running.url) as client:
        client.concept("ink")
        assert b"authorization" not in running.headers[-1]


def test_nobody_there_is_said(app):
    gone = Running(app)
    gone.stop()
    with Client(gone.url) as client, pytest.raises(UnreachableError, match=f"no answer from {gone.url}") as error:
        client.concept("ink")
    assert error.value.status is None


def test_it_is_light():
    code = "import sys, farm.client; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "ray", "numpy", "fastapi", "pyarrow", "e2gan"} & set(loaded)


# What the client knows of the service is what its OpenAPI says.


def resolved(schema, document):
    """A JSON schema without titles, examples and references."""
    if isinstance(schema, list):
        return [resolved(one, document) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if reference := schema.get("$ref"):
        *_, name = reference.split("/")
        return resolved((document.get("$defs") or document["components"]["schemas"])[name], document)
    notes = ("title", "examples", "description", "default", "$defs")
    return {name: resolved(one, document) for name, one in schema.items() if name not in notes}


def operation(app, path, method):
    return app.openapi()["paths"][path][method]


@pytest.mark.parametrize(
    ("method", "path", "verb", "apart"),
    [
        (Client.edit, "/v1/edit/{concept}", "post", {"image", "format"}),  # the format goes into Accept
        (Client.edits, "/v1/edit", "post", {"image"}),
        (Client.page, "/v1/concepts", "get", set()),
        (Client.concept, "/v1/concepts/{concept}", "get", set()),
        (Client.preview, "/v1/concepts/{concept}/preview.webp", "get", set()),
    ],
)
def test_parameters_are_those_of_the_openapi(app, method, path, verb, apart):
    def kinds(schema):
        return {one["type"] for one in schema.get("anyOf", [schema])} - {"null"}

    hints = typing.get_type_hints(method, localns={"Photo": object})
    told = {
        parameter["name"]: kinds(parameter["schema"])
        for parameter in operation(app, path, verb).get("parameters", [])
        if parameter["in"] != "header"
    }
    names = {"id": "concept", "concepts": "concept"}
    ours = {
        names.get(name, name): kinds(TypeAdapter(hints[name]).json_schema())
        for name in inspect.signature(method).parameters
        if name not in {"self", *apart}
    }
    assert ours == told


@pytest.mark.parametrize(("model", "path"), [(ConceptPage, "/v1/concepts"), (ConceptDetail, "/v1/concepts/{concept}")])
def test_models_are_those_of_the_openapi(app, model, path):
    document = app.openapi()
    told = operation(app, path, "get")["responses"]["200"]["content"]["application/json"]["schema"]
    ours = model.model_json_schema(mode="serialization")
    assert resolved(ours, ours) == resolved(told, document)


def test_headers_and_errors_are_those_of_the_openapi(app):
    responses = operation(app, "/v1/edit/{concept}", "post")["responses"]
    assert {"X-Adapter-Version", "X-Adapter-Digest", "X-Base-Digest", "Server-Timing"} <= responses["200"][
        "headers"
    ].keys()
    assert set(responses["200"]["content"]) == {f"image/{format}" for format in typing.get_args(Format)}
    named = {str(status) for status in ERRORS}
    assert {status for status in responses if status >= "400"} - named == {"406"}  # it never asks for another format
    problem = app.openapi()["components"]["schemas"]["Problem"]["properties"]
    assert {"detail", "near"} <= problem.keys()
    several = app.openapi()["components"]["schemas"]["EditOfSeveral"]["properties"]
    assert {"concept", "status", "image", "version", "digest", "base", "problem"} <= several.keys()
