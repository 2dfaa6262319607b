"""`farm push-hub` against a hub in this process, which speaks as much of the protocol as a push needs."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from stage_farm import contents, copied, plan_of, write_config
from terminal import Terminal

from farm.errors import IntegrityError, UserError
from farm.hub import push
from farm.registry import Registry
from farm.store import LocalStore

pytestmark = [
    pytest.mark.server,
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # the hub's client, to its network library
]

REPO = "someone/sepia"
INVALID = 'Invalid metadata in README.md. - "license" must be one of those there are'


class Hub:
    """Repositories by name and branch: files by path. What is not allowed to `tokens` is refused.

    Weights go up as the hub's large files do, everything else within the commit.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.commits: list[tuple[str, str]] = []  # branch and summary
        self.cards: list[str] = []
        self.tokens = {"good"}
        self.readers = {"reader"}
        self.invalid_card = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                hub.answer(self)

            do_PUT = do_GET = do_POST  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = self._body(request)
        status, document = self._route(request, body)
        data = json.dumps(document).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def _body(self, request: BaseHTTPRequestHandler) -> bytes:
        if request.headers.get("Transfer-Encoding") != "chunked":
            return request.rfile.read(int(request.headers.get("Content-Length") or 0))
        body = b""
        while size := int(request.rfile.readline(), 16):
            body += request.rfile.read(size)
            request.rfile.readline()
        request.rfile.readline()
        return body

    def _route(self, request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, Any]:
        path = request.path.partition("?")[0]
        if path.startswith("/objects/"):  # the storage, which asks for no token
            oid = path.rpartition("/")[2]
            assert hashlib.sha256(body).hexdigest() == oid
            self.objects[oid] = body
            return 200, {}
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in self.tokens | self.readers:
            return 401, {"error": "Invalid username or password."}
        if token in self.readers:
            return 403, {"error": "You don't have the rights to write there"}
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            if name in self.repos:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            self.repos[name] = {"main": {}}
            self.private[name] = wanted.get("visibility") == "private"
            return 200, {"url": f"{self.url}/{name}"}
        if path == "/api/validate-yaml":
            self.cards.append(json.loads(body)["content"])
            bad = {"errors": [{"message": '"license" must be one of those there are'}], "warnings": []}
            return (400, bad) if self.invalid_card else (200, {"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return 200, {"transfer": "basic", "objects": [self._upload(one) for one in objects]}
        prefix, _, rest = path.removeprefix("/api/models/").partition(f"{REPO}/")
        assert prefix == "", path
        action, _, branch = rest.partition("/")
        branches = self.repos[REPO]
        if action == "branch":
            if branch in branches:
                return 409, {"error": "Reference already exists"}
            branches[branch] = dict(branches["main"])
            return 200, {}
        if branch not in branches:
            return 404, {"error": f"Invalid rev id: {branch}"}
        if action == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [self._preupload(name, branches[branch]) for name in files]}
        if action == "revision":
            return 200, {"id": REPO, "sha": "f" * 40, "siblings": []}
        assert action == "commit", path
        return 200, self._commit(branch, [json.loads(line) for line in body.splitlines()])

    def _preupload(self, name: str, there: dict[str, bytes]) -> dict[str, Any]:
        mode = "lfs" if name.endswith(".safetensors") else "regular"
        told: dict[str, Any] = {"path": name, "uploadMode": mode, "shouldIgnore": False}
        if name in there:
            data = there[name]
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data)
            told["oid"] = (hashlib.sha256(data) if mode == "lfs" else blob).hexdigest()
        return told

    def _upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        action = {"upload": {"href": f"{self.url}/objects/{wanted['oid']}"}}
        return wanted if wanted["oid"] in self.objects else {**wanted, "actions": action}

    def _commit(self, branch: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append((branch, value["summary"]))
            elif line["key"] == "file":
                self.repos[REPO][branch][value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile" and len(self.objects[value["oid"]]) == value["size"]
                self.repos[REPO][branch][value["path"]] = self.objects[value["oid"]]
        oid = f"{len(self.commits):040x}"
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{REPO}/commit/{oid}", "hookOutput": ""}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants

    made = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", made.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # whose storage speaks a protocol of its own
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", "good")
    yield made
    made.close()


def folder(root: Path) -> dict[str, bytes]:
    """The files of the published adapter, as they lie in the store."""
    entry = Registry(LocalStore(root)).get("sepia")
    assert entry is not None
    found = {
        key.rpartition("/")[2]: data for key, data in contents(root).items() if key.startswith(f"{entry.adapter}/")
    }
    del found["manifest.json"]
    return found


def pushed(root: Path, **options: Any) -> Any:
    entry = Registry(LocalStore(root)).get("sepia")
    assert entry is not None
    return push(LocalStore(root), entry, REPO, **options)


def test_the_hub_gets_the_same_bytes(root: Path, hub: Hub) -> None:
    done = pushed(root)
    files = folder(root)
    assert hub.repos[REPO] == {"main": files} and "README.md" in files and "adapter_model.safetensors" in files
    assert hub.cards == [files["README.md"].decode()]
    assert hub.commits == [("main", "sepia version 1")] and not hub.private[REPO]
    assert (done.files, done.size) == (6, sum(map(len, files.values())))
    assert done.url == f"{hub.url}/{REPO}/commit/{1:040x}"
    # The same again leaves no commit: nothing has changed.
    pushed(root)
    assert len(hub.commits) == 1 and hub.repos[REPO] == {"main": files}


def test_a_private_repository_and_a_branch(root: Path, hub: Hub) -> None:
    for _ in range(2):
        pushed(root, private=True, revision="v1")
    assert hub.private[REPO] and hub.repos[REPO] == {"main": {}, "v1": folder(root)}
    assert hub.commits == [("v1", "sepia version 1")]


def test_a_damaged_file_is_not_uploaded(root: Path, tmp_path: Path, hub: Hub) -> None:
    store, spec = copied(root, tmp_path / "farm", "adapters", "registry"), plan_of(root).adapter("sepia")
    data = bytearray(store.get(f"{spec.path}/text.safetensors"))
    data[-1] ^= 1
    store.put(f"{spec.path}/text.safetensors", bytes(data))
    with pytest.raises(IntegrityError, match=r"text\.safetensors is not the file that was put there"):
        pushed(tmp_path / "farm")
    assert not hub.repos


@pytest.mark.parametrize(
    ("token", "says"),
    [
        ("none", "does not accept the token; make a new one and run `hf auth login`."),
        ("reader", f": this token may not write to {REPO}; use one that may, or another --repo."),
        ("", "farm push-hub: there is no token of the hub; run `hf auth login` or set HF_TOKEN."),
    ],
)
def test_tokens_that_will_not_do(root: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str, says: str) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    told = complaint(root)
    assert told.endswith(says) and not hub.repos
    assert told.startswith(hub.url) or not token


def test_a_hub_that_is_away_or_refuses_the_card(root: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.invalid_card = True
    told = f"nothing was put into {REPO} ({{}}); check the network, HF_ENDPOINT and --repo, and run again."
    assert complaint(root) == f"{hub.url}: {told.format(INVALID)}"
    away = "http://127.0.0.1:9"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", away)
    assert complaint(root) == f"{away}: {told.format('[Errno 111] Connection refused')}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "offline mode is enabled" in complaint(root)


@pytest.mark.parametrize("repo", ["sepia", "a/b/c", "", "a/b c", "https://huggingface.co/a/b"])
def test_a_repository_of_no_name(root: Path, repo: str) -> None:
    entry = Registry(LocalStore(root)).get("sepia")
    assert entry is not None
    with pytest.raises(UserError, match=r"^--repo: .* is no repository's name; give it as user/name\.$"):
        push(LocalStore(root), entry, repo)


def complaint(root: Path) -> str:
    with pytest.raises(UserError) as caught:
        pushed(root)
    return str(caught.value)


def test_the_client_finds_hub_and_token_by_itself(root: Path, tmp_path: Path, hub: Hub) -> None:
    """In a process of its own, as a user runs it."""
    config = write_config(tmp_path / "farm.yaml", root)
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "good", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
    arguments = ["farm", "push-hub", "sepia", "--config", str(config), "--repo", REPO]
    code = f"import sys; sys.argv = {arguments!r}; from farm.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    size = sum(map(len, folder(root).values()))
    url = f"{hub.url}/{REPO}/commit/{1:040x}"
    assert (done.returncode, done.stdout) == (0, f"sepia: version 1, 6 files of {size:,} bytes, is at {url}\n"), done
    assert hub.repos[REPO] == {"main": folder(root)}


def test_what_is_not_published_is_told(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal(monkeypatch, capsys, "push-hub", "--config", str(write_config(tmp_path / "farm.yaml", root)))
    told = terminal.mistake("sepja", "--repo", REPO)
    assert told == f"'sepja' is not published in {root.as_uri()}; did you mean sepia?"
