from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farm.editors.weights import (
    file_sha256,
    folder_sha256,
    locate,
    needed_files,
    variant_of,
    weights_fingerprint,
)
from farm.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches of the hub and of hashes."""
    from huggingface_hub import constants

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path


def put(folder: Path, files: dict[str, str], *, age: float = 60) -> Path:
    """Files that were last changed `age` seconds ago."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    return folder


PIPELINE = {
    "model_index.json": json.dumps({"_class_name": "X", "unet": ["diffusers", "U"], "extra": [None, None]}),
    "unet/config.json": "{}",
    "unet/diffusion_pytorch_model.safetensors": "weights",
}


def cached(hub: Path, files: dict[str, str], *, ref: str | None = "main", commit: str = COMMIT) -> Path:
    """A model `some/model` in the hub's cache, laid out as the hub's client does."""
    repository = hub / "models--some--model"
    if ref is not None:
        put(repository, {f"refs/{ref}": commit})
    return put(repository / "snapshots" / commit, files)


def told(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert text.startswith("editor.model: ")
    assert "\n" not in text
    assert text.endswith(".")
    return text


def test_a_folder_is_where_it_is(tmp_path: Path) -> None:
    found = locate(str(put(tmp_path / "model", PIPELINE)))
    assert (found.folder, found.commit) == (tmp_path / "model", None)


def test_a_hub_id_is_found_in_the_cache(own_caches: Path) -> None:
    folder = cached(own_caches / "hub", PIPELINE)
    for revision in (None, "main", COMMIT):
        found = locate("some/model", revision)
        assert (found.folder, found.commit) == (folder, COMMIT)
    assert weights_fingerprint("some/model") == {"id": "some/model", "commit": COMMIT}


def test_what_is_not_there_is_named_with_the_cure(own_caches: Path) -> None:
    with pytest.raises(UserError) as caught:
        locate("some/model")
    text = told(caught)
    assert f"some/model is neither a folder nor in the cache {own_caches / 'hub'}" in text
    assert "`hf download some/model`" in text
    assert "editor.download: true" in text
    cached(own_caches / "hub", PIPELINE, ref="other")
    with pytest.raises(UserError, match="`hf download some/model --revision fp16`"):
        locate("some/model", "fp16")


@pytest.mark.parametrize("model", ["/no/such/folder", "./none", "a/b/c", "~/nothing", "two words", "../up"])
def test_what_is_no_id_is_a_missing_folder(model: str) -> None:
    for call in (locate, weights_fingerprint):
        with pytest.raises(UserError, match="there is no folder") as caught:
            call(model)
        told(caught)


def test_a_single_checkpoint_is_no_folder(tmp_path: Path) -> None:
    put(tmp_path, {"v1.safetensors": "x"})
    with pytest.raises(UserError, match=r"is a file; .*from_single_file.*save_pretrained") as caught:
        locate(str(tmp_path / "v1.safetensors"))
    told(caught)


def test_offline_nothing_is_fetched_even_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # would be another sentence
    for call in (locate, weights_fingerprint):
        with pytest.raises(UserError, match="with HF_HUB_OFFLINE unset") as caught:
            call("some/model", None, True)
        told(caught)


def test_a_pinned_commit_needs_no_weights() -> None:
    assert weights_fingerprint("some/model", COMMIT) == {"id": "some/model", "commit": COMMIT}
    with pytest.raises(UserError):
        weights_fingerprint("some/model", COMMIT[:7])


# Hashes


def test_a_folders_hash_follows_names_and_contents_only(tmp_path: Path) -> None:
    first = folder_sha256(put(tmp_path / "a", PIPELINE))
    beside = {"README.md": "x", ".cache/x.json": "{}", "unet/preview.png": "x", "old.ckpt": "x"}
    assert folder_sha256(put(tmp_path / "b", {**PIPELINE, **beside})) == first
    changed = {**PIPELINE, "unet/diffusion_pytorch_model.safetensors": "Weights"}
    renamed = {name.replace("unet/", "net/"): text for name, text in PIPELINE.items()}
    more = {**PIPELINE, "tokenizer/merges.txt": "x"}
    hashes = {folder_sha256(put(tmp_path / str(i), files)) for i, files in enumerate((changed, renamed, more))}
    assert len(hashes | {first}) == 4
    assert weights_fingerprint(str(tmp_path / "a")) == {"sha256": first}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300), age=st.sampled_from([0.0, 60.0]))
def test_a_files_hash_is_sha256_and_stays_so(tmp_path: Path, content: bytes, age: float) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    os.utime(path, (0, path.stat().st_mtime - age))
    for _ in range(2):
        assert file_sha256(path) == hashlib.sha256(content).hexdigest()


def kept(cache: Path) -> list[Path]:
    return sorted((cache / "cache").rglob("*.json"))


def test_a_file_is_read_once(own_caches: Path) -> None:
    path = put(own_caches, {"file": "content"}) / "file"
    file_sha256(path)
    (entry,) = kept(own_caches)
    marked = {**json.loads(entry.read_text()), "sha256": "f" * 64}
    entry.write_text(json.dumps(marked))
    assert file_sha256(path) == "f" * 64  # so it is the kept hash that came back
    path.write_text("Content")
    os.utime(path, (0, 1e9))
    assert file_sha256(path) == hashlib.sha256(b"Content").hexdigest()


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"sha256": 3}', "cut"])
def test_a_damaged_entry_is_passed_over(own_caches: Path, damage: str) -> None:
    path = put(own_caches, {"file": "content"}) / "file"
    first = file_sha256(path)
    (entry,) = kept(own_caches)
    whole = json.loads(entry.read_text())
    entry.write_text(json.dumps({**whole, "sha256": "f" * 63}) if damage == "cut" else damage)
    assert file_sha256(path) == first
    assert json.loads(entry.read_text()) == whole


def test_a_file_that_was_just_changed_is_not_remembered(own_caches: Path) -> None:
    file_sha256(put(own_caches, {"file": "content"}, age=0) / "file")
    assert kept(own_caches) == []


def test_without_a_place_for_the_hashes_files_are_read(own_caches: Path) -> None:
    put(own_caches, {"cache": "a file where the folder should be", "file": "content"})
    assert file_sha256(own_caches / "file") == hashlib.sha256(b"content").hexdigest()


# Fetching


def test_the_files_that_are_fetched() -> None:
    """The listing of Stable Diffusion 1.5's repository, abridged."""
    unet, text = "unet/diffusion_pytorch_model", "text_encoder/model"
    small = ["model_index.json", "tokenizer/merges.txt", "tokenizer/vocab.json", "unet/config.json"]
    weights = [f"{text}.fp16.safetensors", f"{text}.safetensors", f"{unet}.non_ema.safetensors", f"{unet}.safetensors"]
    others = [".gitattributes", "README.md", "v1-5-pruned.ckpt", "v1-5-pruned.safetensors", f"{unet}.bin"]
    names = [*small, *weights, *others, f"{unet}.fp16.safetensors"]
    assert needed_files(names) == sorted([*small, f"{text}.safetensors", f"{unet}.safetensors"])
    marked = needed_files(names, "fp16")
    assert marked == sorted([*small, f"{text}.fp16.safetensors", f"{unet}.fp16.safetensors"])
    assert needed_files(["config.json", "model.safetensors"]) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("model.safetensors", None),
        ("unet/model-00001-of-00002.safetensors", None),
        ("model.fp16.safetensors", "fp16"),
        ("unet/model.fp16-00001-of-00002.safetensors", "fp16"),
        ("unet/model-00001-of-00002.fp16.safetensors", "fp16"),
        ("unet.v1/model.non_ema.safetensors", "non_ema"),
    ],
)
def test_the_variant_in_a_name(name: str, variant: str | None) -> None:
    assert variant_of(name) == variant


class Hub(ThreadingHTTPServer):
    """What of the hub's protocol its client uses for one model. asked: the paths of the files it gave."""

    daemon_threads = True

    def __init__(self, files: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.files, self.asked, self.refuses = files, [], set[str]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class HubRequest(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        files = self.server.files
        name = path.partition(f"/some/model/resolve/{COMMIT}/")[2]
        if name in files and name not in self.server.refuses:
            self.server.asked += [name] if self.command == "GET" else []
            content = files[name].encode()
            self.answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"')
        elif path.startswith("/api/models/some/model/tree/"):
            entries = [
                {"type": "file", "path": n, "size": len(t), "oid": hashlib.sha1(t.encode()).hexdigest()}
                for n, t in files.items()
            ]
            self.answer(json.dumps(entries).encode())
        elif path.startswith("/api/models/some/model"):
            siblings = [{"rfilename": name} for name in files]
            self.answer(json.dumps({"id": "some/model", "sha": COMMIT, "siblings": siblings}).encode())
        else:
            self.answer(b"{}", status=404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer(self, content: bytes, *, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        fields = {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT, **headers}
        for key, value in fields.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    server = Hub({**PIPELINE, "unet/diffusion_pytorch_model.bin": "pickle", "v1.safetensors": "big"})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.server
def test_a_download_fetches_what_is_needed_once(hub: Hub) -> None:
    found = locate("some/model", None, True)
    assert found.commit == COMMIT
    names = sorted(path.relative_to(found.folder).as_posix() for path in found.folder.rglob("*") if path.is_file())
    assert names == sorted(PIPELINE)
    assert all((found.folder / name).read_text() == text for name, text in PIPELINE.items())
    hub.refuses = set(hub.files)
    assert locate("some/model") == locate("some/model", None, True) == found


@pytest.mark.server
def test_a_download_that_was_cut_off_goes_on(hub: Hub, own_caches: Path) -> None:
    hub.refuses = {"unet/diffusion_pytorch_model.safetensors"}
    with pytest.raises(UserError, match="cannot be fetched") as caught:
        locate("some/model", None, True)
    told(caught)
    assert "unet/config.json" in hub.asked
    hub.refuses, hub.asked = set(), []
    found = locate("some/model", None, True)
    assert hub.asked == ["unet/diffusion_pytorch_model.safetensors"]
    shutil.rmtree(found.folder / "unet")
    assert (locate("some/model", None, True).folder / "unet/config.json").is_file()


@pytest.mark.server
def test_a_plan_asks_the_hub_for_the_commit_alone(hub: Hub) -> None:
    assert weights_fingerprint("some/model", None, True) == {"id": "some/model", "commit": COMMIT}
    assert hub.asked == []
    for call in (locate, weights_fingerprint):
        with pytest.raises(UserError, match="no/such cannot be fetched") as caught:
            call("no/such", None, True)
        told(caught)
