"""Uploads, names and headers that are meant to do harm: the answer is what the documentation says, and it goes on."""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import Any

import psutil
import pytest
import torch
from hostile_files import hostile_files
from in_process import PHOTO, Service, encoded, pixels, service_of
from tiny_farm import TinyFarm

from farm.images import ImageError
from farm.serve import replicas
from farm.serve.decoder import Decoders, SlowImageError

DOCUMENTED = {400, 413, 415, 422}
MEGAPIXELS = 4


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    threads = torch.get_num_threads()
    farm = TinyFarm(tmp_path_factory.mktemp("farm") / "store")
    farm.publish("ink", seed=2)
    service = service_of(farm, max_megapixels=MEGAPIXELS, decode_seconds=60)
    yield service
    service.close()
    torch.set_num_threads(threads)


def test_hostile_files_are_answered_and_leave_nothing_behind(service):
    files = list(hostile_files())
    assert len(files) >= 200
    service.edit("ink", encoded(PHOTO))
    gc.collect()
    before = psutil.Process().memory_info().rss
    statuses: dict[int, list[str]] = {}
    for name, data in files:
        answer = service.request("POST", "/v1/edit/ink?size=64", content=data)
        statuses.setdefault(answer.status_code, []).append(name)
        if answer.status_code == 200:
            assert max(pixels(answer).shape[:2]) == 64, name
        else:
            assert answer.headers["content-type"] == "application/problem+json", name
            assert answer.status_code in DOCUMENTED, (name, answer.text)
            assert len(answer.json()["detail"]) < 300, name
    assert {200, 400, 413, 415} <= statuses.keys()
    for name in ("a PNG above the limit", "a JPEG above the limit", "a WebP above the limit"):
        assert name in statuses[413]
    for name in (
        "a CMYK JPEG",
        "a PNG of 16-bit greys",
        "an animated WebP",
        "a huge EXIF",
        "a PNG just below the limit",
    ):
        assert name in statuses[200]
    for name in ("an SVG", "nothing", "a file of format GIF", "a RIFF that is a sound"):
        assert name in statuses[415]
    assert service.edit("ink", encoded(PHOTO)).status_code == 200
    gc.collect()
    assert psutil.Process().memory_info().rss - before < 100e6
    decoders = [p for p in psutil.Process().children() if "farm.serve.decoder" in p.cmdline()]
    assert decoders and all(p.memory_info().rss < 300e6 for p in decoders)


@pytest.mark.parametrize(
    "name",
    [
        "../ink", "..%2f..%2fetc%2fpasswd", "%2e%2e/ink", "ink%00", "ink%0d%0aSet-Cookie:%20a=b", "ink/../../x",
        "ink.json", "INK", "ｉｎｋ", "ink%20", "-ink", "%F0%9F%98%80", "ink%25", "con", "~", "*", "{concept}",
        "ink;a=b", "%ff%fe",
    ],
)  # fmt: skip
def test_names_lead_nowhere(service, name):
    for method, path in (
        ("POST", f"/v1/edit/{name}"),
        ("GET", f"/v1/concepts/{name}"),
        ("GET", f"/v1/concepts/{name}/preview.webp"),
        ("GET", f"/v1/concepts/{name}/lineage"),
        ("GET", f"/page/{name}"),
    ):
        answer = service.request(method, path, content=encoded(PHOTO) if method == "POST" else None)
        assert answer.status_code in (404, 405, 422), path
        assert "set-cookie" not in answer.headers
        assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    "headers",
    [
        {"Accept": "image/png\r\nX-Injected: yes"},
        {"Accept": "image/" + "p" * 20_000 + ", image/png"},
        {"Accept": "image/png;q=" + "1" * 5000},
        {"Accept": ",".join(["image/webp;q=0.1"] * 2000)},
        {"Content-Type": "multipart/form-data; boundary=" + "b" * 5000},
        {"Content-Type": 'multipart/form-data; boundary="x"; charset=\udcff'},
        {"Content-Type": "multipart/form-data; boundary=x; charset=idna"},
        {"Content-Type": "image/svg+xml"},
        {"Content-Encoding": "gzip"},
        {"If-None-Match": "\"" * 3000},
        {"X-Forwarded-For": "127.0.0.1", "Host": "evil.example"},
        {"Range": "bytes=0-"},
        {"X-HTTP-Method-Override": "DELETE"},
    ],
)  # fmt: skip
def test_headers_do_nothing_unexpected(service, headers):
    raw = {name: value.encode("utf-8", "surrogateescape") for name, value in headers.items()}
    answer = service.edit("ink", encoded(PHOTO), headers=raw)
    assert answer.status_code in (200, 400, 406, 415, 422)
    assert "x-injected" not in answer.headers
    assert b"evil" not in answer.content


@pytest.mark.parametrize("kind", ["fields", "parts", "nested", "cut", "unnamed", "files"])
def test_forms_are_bounded(service, kind):
    def part(name: str, data: bytes, *, file: bool = True) -> bytes:
        filename = '; filename="x.png"' if file else ""
        return (
            b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n' % (name.encode(), filename.encode())
            + data
            + b"\r\n"
        )

    body = {
        "fields": b"".join(part(f"f{n}", b"x", file=False) for n in range(5000)) + b"--b--",
        "parts": part("other", encoded(PHOTO)) + b"--b--",
        "nested": part("image", part("image", encoded(PHOTO))) + b"--b--",
        "cut": part("image", encoded(PHOTO))[:-200],
        "unnamed": b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--",
        "files": part("image", encoded(PHOTO)) * 3 + b"--b--",
    }[kind]
    answer = service.edit("ink", body, headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert answer.status_code in ((200,) if kind == "files" else (400, 415, 422))


def decode(decoders: Decoders, data: bytes) -> Any:
    return asyncio.run(decoders(data, max_side=64, size=None))


@pytest.fixture
def decoders():
    made = Decoders(seconds=60, max_pixels=1_000_000, processes=1)
    yield made
    made.close()


def process_of(decoders: Decoders) -> psutil.Process:
    return psutil.Process(decoders._threads.submit(lambda: decoders._own.process.pid).result())


def test_what_takes_too_long_is_ended_and_the_next_is_decoded(decoders):
    decoders._seconds = 0.2
    stuck = process_of(decoders)
    stuck.suspend()  # as on a file that it never gets done with
    with pytest.raises(SlowImageError, match=r"longer than 0\.2 s"):
        decode(decoders, encoded(PHOTO))
    assert not stuck.is_running()
    decoders._seconds = 60
    assert decode(decoders, encoded(PHOTO)).size == (64, 48)


def test_a_decoder_that_dies_is_replaced(decoders):
    photo = encoded(PHOTO)
    assert decode(decoders, photo).size == (64, 48)
    process = process_of(decoders)
    process.kill()
    process.wait()
    assert decode(decoders, photo).size == (64, 48)
    stopped = process_of(decoders)
    stopped.suspend()
    threading.Timer(0.3, stopped.kill).start()
    with pytest.raises(ImageError, match="its decoder gave up"):
        decode(decoders, photo)
    assert decode(decoders, photo).size == (64, 48)


def test_a_decoder_has_only_so_much_memory(decoders):
    assert process_of(decoders).rlimit(psutil.RLIMIT_AS) == (1_024_000_000, 1_024_000_000)


def test_the_interface_keeps_what_its_description_says(service: Service, monkeypatch: pytest.MonkeyPatch):
    """Requests made from the OpenAPI description by schemathesis, in this process."""
    monkeypatch.setattr(replicas, "REMEMBERED_SECONDS", 3600.0)  # it is healthy, however slow the machine
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    schema = schemathesis.openapi.from_asgi("/openapi.json", service.transport.app)
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 11
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(
            max_examples=12,
            database=None,
            derandomize=True,
            suppress_health_check=[*HealthCheck],
            phases=[Phase.explicit, Phase.generate],
        )
        def ask(case: Any) -> None:
            # That only photos are photos no schema can say.
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        ask()
    assert service.edit("ink", encoded(PHOTO)).status_code == 200
