"""Credentials and keys are in nothing that a farm writes: not its store, its terminal, its log or its errors."""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from stage_farm import Cluster, write_config
from stores import fresh
from terminal import Terminal

from farm.s3_client import forget_client
from farm.signing import new_key, public_text
from farm.store import open_store

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAHUSHHUSHHUSHHUSH",
    "AWS_SECRET_ACCESS_KEY": "hush/Secret+of+Amazon0123456789abcdefghij",
    "AWS_SESSION_TOKEN": "hushSessionTokenOfAmazon0123456789",
    "HF_TOKEN": "hf_hushTokenOfTheHub0123456789abcdef",
}
ERRORS = {
    "InvalidAccessKeyId": 403,
    "SignatureDoesNotMatch": 403,
    "ExpiredToken": 400,
    "AccessDenied": 403,
    "RequestTimeTooSkewed": 403,
    "AuthorizationHeaderMalformed": 400,
}


class _Telltale(BaseHTTPRequestHandler):
    """A server that refuses everything, and like Amazon's says back what it was sent. Its bucket is the error."""

    def do_GET(self) -> None:
        code = self.path.strip("/").partition("?")[0].partition("/")[0].replace("-", "")
        code = next(name for name in ERRORS if name.lower() == code)
        sent = f"<AWSAccessKeyId>{SECRETS['AWS_ACCESS_KEY_ID']}</AWSAccessKeyId><Token>{dict(self.headers)}</Token>"
        body = f"<Error><Code>{code}</Code><Message>No.</Message>{sent}</Error>".encode()
        self.send_response(ERRORS[code])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def telltale() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Telltale) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def secrets(moto_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    new_key(tmp_path / "key.pem")
    pem = (tmp_path / "key.pem").read_text()
    raw = load_pem_private_key(pem.encode(), None).private_bytes_raw()
    endpoint = moto_bucket.partition("endpoint_url=")[2]
    forget_client(endpoint, None)
    yield [*SECRETS.values(), pem.splitlines()[1], raw.hex(), base64.b64encode(raw).decode()]
    forget_client(endpoint, None)


def test_no_secret_is_written_anywhere(
    secrets: list[str],
    moto_bucket: str,
    telltale: str,
    tmp_path: Path,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for logger in ("farm", "botocore", "boto3", "huggingface_hub"):  # not the server's own
        caplog.set_level(logging.INFO, logger)
    Cluster().stand_in(monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    terminal, bucket = Terminal(monkeypatch, capsys), fresh(moto_bucket)
    key = tmp_path / "key.pem"
    public = terminal.good("keys", "show", key).strip()
    config = write_config(tmp_path / "farm.yaml", root, signing={"private_key": str(key), "public_keys": [public]})
    there = ("-c", config, "--set", f"store={bucket.url}")
    told = []

    def run(*arguments: object, ends: tuple[int, ...] = (0,)) -> None:
        status, out, err = terminal.farm(*arguments)
        assert status in ends, (arguments, out, err)
        told.append(out + err)

    run("sync", root, bucket.url)
    run("verify", *there, ends=(1,))  # not signed yet
    run("keys", "sign", *there)
    run("unpublish", *there, "sepia")
    run("publish", *there, "--all")
    run("publish", *there, "sepia")
    run("run", *there)
    run("status", *there)
    run("history", *there, "sepia", "--json")
    run("lineage", *there, "sepia", "--json")
    run("verify", *there)
    run("gc", *there, "--dry-run")
    run("push-hub", *there, "sepia", "--repo", "you/sepia", ends=(2,))
    # What is wrong is told in a sentence, without what it was told.
    for code in ERRORS:
        wrong = f"store=s3://{code.lower()}?endpoint_url={telltale}"
        run("history", "-c", config, "--set", wrong, "sepia", ends=(2,))
    user, hush = SECRETS["AWS_ACCESS_KEY_ID"], SECRETS["AWS_SECRET_ACCESS_KEY"]
    for address in (
        f"s3://{user}:{hush}@farm",
        f"s3://farm?endpoint_url=http://{user}:{hush}@127.0.0.1",
        f"https://{user}:{hush}@farm/x",
        f"file://{user}:{hush}@farm/x",
        f"s3://farm?secret={hush}",
    ):
        run("history", "-c", config, "--set", f"store={address}", "sepia", ends=(2,))
        run("sync", address, tmp_path / "copy", ends=(2,))
    pem = key.read_text()
    for place in ("signing.private_key", "signing.public_keys", "signing.public_keys.0", "signing"):
        wrong_key = str(pem).replace("\n", "\\n")
        run("history", "-c", config, "--set", f'{place}="{wrong_key}"', "sepia", ends=(2,))
    run("history", "-c", config, "--set", f"signing={{private_key: {key}, secret: x}}", "sepia", ends=(2,))

    written = {name: bucket.get(name) for name in bucket.list()}
    assert len(written) > 60 and any(name.endswith(".sig") for name in written)
    for secret in secrets:
        assert not [name for name, data in written.items() if secret in name or secret.encode() in data]
        assert not [text for text in told if secret in text]
        assert secret not in caplog.text
    files = [file for file in (*tmp_path.rglob("*"), *root.rglob("*")) if file.is_file() and file != key]
    assert not [file for file in files for secret in secrets if secret.encode() in file.read_bytes()]
    assert open_store(bucket.url).url == bucket.url and public_text(b"") == ""
