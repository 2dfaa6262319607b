from __future__ import annotations

import hashlib
import re
from types import SimpleNamespace

import pytest
import yaml
from in_process import PHOTO, encoded, service_of
from terminal import Terminal
from tiny_farm import TinyFarm

from farm.serve.access import Access, new_key
from farm.serve.config import ApiKey
from farm.serve.problems import ProblemError

USER, ROOT, SLOW = (new_key() for _ in range(3))
KEYS = [
    {"name": "user", "sha256": USER[1]},
    {"name": "root", "sha256": ROOT[1], "admin": True},
    {"name": "slow", "sha256": SLOW[1], "per_minute": 3},
]


@pytest.fixture(scope="module")
def farm(tmp_path_factory):
    farm = TinyFarm(tmp_path_factory.mktemp("farm") / "store")
    farm.publish("ink", seed=2)
    farm.publish("fog", seed=3)
    return farm


@pytest.fixture(scope="module")
def service(farm):
    service = service_of(farm, keys=KEYS, origins=["https://good.example"])
    yield service
    service.close()


def bearer(key):
    return {"Authorization": f"Bearer {key[0]}"}


def test_keys_are_long_and_kept_as_hashes():
    assert len({key for key, _ in (new_key() for _ in range(50))}) == 50
    assert re.fullmatch(r"farm_[\w-]{43}", USER[0])
    assert USER[1] == hashlib.sha256(USER[0].encode()).hexdigest()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/edit/ink"),
        ("POST", "/v1/edit?concept=ink"),
        ("GET", "/v1/concepts"),
        ("GET", "/v1/concepts/ink/preview.webp"),
    ],
)
def test_everything_below_v1_wants_a_key(service, method, path):
    body = {"content": encoded(PHOTO)} if method == "POST" else {}
    wrong = [{}, {"X-API-Key": ""}, {"X-API-Key": USER[0][:-1]}, {"X-API-Key": USER[1]}, {"Authorization": USER[0]}]
    wrong += [{"Authorization": f"Basic {USER[0]}"}, bearer(new_key()), {"X-API-Key": "é".encode("latin-1")}]
    for headers in wrong:
        answer = service.request(method, path, headers=headers, **body)
        assert (answer.status_code, answer.headers["content-type"]) == (401, "application/problem+json")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert USER[1] not in answer.text
    for headers in (bearer(USER), {"X-API-Key": USER[0]}, {"authorization": f"bearer {USER[0]}"}):
        assert service.request(method, path, headers=headers, **body).status_code in (200, 404)


def test_the_page_and_health_are_open_and_the_rest_is_described(service):
    for path in ("/", "/healthz", "/readyz", "/openapi.json"):
        assert service.request("GET", path).status_code == 200
    described = service.request("GET", "/openapi.json").json()
    assert described["components"]["securitySchemes"].keys() == {"HTTPBearer", "APIKeyHeader"}
    assert described["paths"]["/v1/concepts"]["get"]["security"]
    assert "security" not in described["paths"]["/healthz"]["get"]


def test_administrators_alone_may_pin_and_evict(service, farm):
    for call in (
        ("POST", "/v1/admin/pin/ink"),
        ("DELETE", "/v1/admin/pin/ink"),
        ("POST", "/v1/admin/evict/ink"),
        ("POST", "/v1/admin/reload"),
    ):
        assert service.request(*call).status_code == 401
        assert service.request(*call, headers=bearer(USER)).status_code == 403
        assert service.request(*call, headers=bearer(ROOT)).json() == {"replicas": 1}
    service.request("POST", "/v1/admin/pin/ink", headers=bearer(ROOT))
    assert service.editor.report()["pinned"] == 1
    farm.publish("fog", seed=4)
    assert service.editor.published.release("fog").version == 1
    service.request("POST", "/v1/admin/reload", headers=bearer(ROOT))
    assert service.editor.published.release("fog").version == 2
    assert service.request("POST", "/v1/admin/pin/nothing", headers=bearer(ROOT)).status_code == 404


def test_without_an_administrators_key_there_are_no_such_routes(farm):
    for keys in ([], KEYS[:1]):
        service = service_of(farm, keys=keys)
        assert service.request("POST", "/v1/admin/reload", headers=bearer(USER)).status_code == 404
        assert "admin" not in service.request("GET", "/openapi.json").text
        service.close()


def test_a_keys_edits_are_counted(service):
    paths = ["/v1/edit/ink", "/v1/edit?concept=ink&concept=fog", "/v1/edit/ink"]
    answers = [service.request("POST", path, content=encoded(PHOTO), headers=bearer(SLOW)) for path in paths]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert 1 <= int(answers[2].headers["retry-after"]) <= 20
    assert service.request("GET", "/v1/concepts", headers=bearer(SLOW)).status_code == 200
    assert service.request("POST", paths[0], content=encoded(PHOTO), headers=bearer(USER)).status_code == 200


def test_the_limit_comes_back_at_a_steady_pace():
    now = 0.0
    access = Access([ApiKey(name="slow", sha256=SLOW[1], per_minute=6)], clock=lambda: now)

    request = SimpleNamespace(state=SimpleNamespace(key=ApiKey(name="slow", sha256=SLOW[1])))

    def spent(edits: int = 1) -> bool:
        try:
            access.spend(request, edits)
        except ProblemError as error:
            assert error.status == 429
            return False
        return True

    assert [spent() for _ in range(7)] == [True] * 6 + [False]
    now = 9.9
    assert not spent()
    now = 10
    assert [spent(), spent()] == [True, False]
    now = 1000
    assert [spent(6), spent()] == [True, False]
    assert not spent(7)


def test_other_origins_are_shut_out_unless_they_are_named(service, farm):
    ask = {"Origin": "https://good.example", "Access-Control-Request-Method": "POST"}
    allowed = service.request("OPTIONS", "/v1/edit/ink", headers=ask)
    assert allowed.headers["access-control-allow-origin"] == "https://good.example"
    answer = service.edit("ink", encoded(PHOTO), headers={**bearer(USER), "Origin": "https://good.example"})
    assert "X-Adapter-Version" in answer.headers["access-control-expose-headers"]
    evil = service.edit("ink", encoded(PHOTO), headers={**bearer(USER), "Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in evil.headers
    closed = service_of(farm)
    assert "access-control-allow-origin" not in closed.edit("ink", encoded(PHOTO), headers=ask).headers
    closed.close()


def test_the_page_may_do_no_more_than_it_needs(service):
    headers = service.request("GET", "/").headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"


def test_nothing_of_a_photo_is_written(service, caplog, tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with caplog.at_level(0):
        for body in ({"content": encoded(PHOTO)}, {"files": {"image": ("secret-name.png", encoded(PHOTO))}}):
            assert service.request("POST", "/v1/edit/ink", headers=bearer(USER), **body).status_code == 200
    assert not list(tmp_path.iterdir())
    assert "secret-name" not in caplog.text and USER[0] not in caplog.text


def test_a_key_made_on_the_command_line_opens_the_service(monkeypatch, capsys, farm):
    terminal = Terminal(monkeypatch, capsys)
    status, out, told = terminal.farm("serve-key", "new", "alice", "--per-minute", "9")
    key, entry = out.splitlines()
    (made,) = yaml.safe_load(entry)
    assert (status, made["name"], made["per_minute"]) == (0, "alice", 9)
    assert "serve.keys" in told and key not in told
    service = service_of(farm, keys=[made])
    assert service.request("GET", "/v1/concepts", headers={"X-API-Key": key}).status_code == 200
    assert service.request("GET", "/v1/concepts").status_code == 401
    service.close()
    assert "'Alice B' is no name of a key" in terminal.mistake("serve-key", "new", "Alice B")
