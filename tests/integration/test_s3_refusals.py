"""Commands on buckets of Ceph's gateway that may not be used, or not all of them: one sentence, and nothing changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import botocore.auth
import pytest
import rgw
import yaml
from stage_farm import document_of
from stores import fresh
from terminal import Terminal

from farm import s3_client
from farm.s3 import S3Store

pytestmark = pytest.mark.server

READER = ("READERSACCESSKEY0000", "readers-secret-key-of-nobody")


@pytest.fixture
def store(rgw_bucket: str) -> S3Store:
    """With something in it."""
    store = fresh(rgw_bucket)
    store.put("adapters/sepia/half", b"")
    return store


@pytest.fixture
def config(store: S3Store, tmp_path: Path) -> Path:
    path = tmp_path / "farm.yaml"
    path.write_text(yaml.safe_dump(document_of(store.url)))  # type: ignore[arg-type]
    return path


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(monkeypatch, capsys)


@pytest.fixture
def farm(terminal: Terminal, config: Path) -> Any:
    """The command line, of a farm in that store: the sentence it ends with."""
    return lambda command, *more: terminal.mistake(command, "--config", config, *more)


@pytest.fixture
def keys(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """A call that gives this process other credentials until the test ends."""

    def change(access_key: str, secret_key: str) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", access_key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret_key)
        s3_client.forget_client(store.endpoint_url, store.region)

    yield change
    s3_client.forget_client(store.endpoint_url, store.region)


@pytest.fixture
def unchanged(store: S3Store, keys: Callable[[str, str], None]) -> Iterator[None]:
    """The bucket holds the same objects before and after the test."""
    before = store.marks()
    yield
    keys(rgw.ACCESS_KEY, rgw.SECRET_KEY)
    assert store.marks() == before


@pytest.fixture(scope="module")
def reader(ceph: rgw.Ceph) -> str:
    """Another user, to whom nothing belongs."""
    name = ["--uid", "reader", "--display-name", "reader", "--access-key", READER[0], "--secret", READER[1]]
    ceph.run("radosgw-admin", "user", "create", *name)
    return "reader"


@pytest.fixture
def policy(store: S3Store, reader: str) -> Iterator[Callable[..., None]]:
    """A call that lets the reader read the bucket, all of it or but for some keys."""
    client = boto3.client("s3", endpoint_url=store.endpoint_url)
    whole = f"arn:aws:s3:::{store.bucket}"

    def let_read(*, without: str | None = None) -> None:
        who = {"AWS": [f"arn:aws:iam:::user/{reader}"]}
        rules = [
            {"Effect": "Allow", "Principal": who, "Action": "s3:ListBucket", "Resource": whole},
            {"Effect": "Allow", "Principal": who, "Action": "s3:GetObject", "Resource": f"{whole}/*"},
        ]
        if without:
            denied = f"{whole}/{store.prefix}/{without}"
            rules.append({"Effect": "Deny", "Principal": who, "Action": "s3:GetObject", "Resource": denied})
        client.put_bucket_policy(Bucket=store.bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": rules}))

    yield let_read
    client.delete_bucket_policy(Bucket=store.bucket)
    client.close()


COMMANDS = [("status",), ("run",), ("publish", "--all"), ("verify",), ("gc", "--yes")]


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_wrong_credentials(store: S3Store, farm: Any, keys: Any, command: tuple[str, ...]) -> None:
    keys(rgw.ACCESS_KEY, "another")
    assert farm(*command) == (
        f"The store {store.url} refuses the credentials (SignatureDoesNotMatch): correct AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY, or the profile in ~/.aws/credentials."
    )


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_clock_that_is_wrong(
    store: S3Store, farm: Any, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    now: Callable[[], datetime] = botocore.auth.get_current_datetime
    with monkeypatch.context() as patch:
        patch.setattr(botocore.auth, "get_current_datetime", lambda: now() - timedelta(hours=1))
        assert farm(*command) == (
            f"The store {store.url} refuses this machine's clock (RequestTimeTooSkewed): set it right."
        )


@pytest.mark.usefixtures("unchanged")
def test_a_missing_bucket(store: S3Store, farm: Any) -> None:
    for command in COMMANDS:
        url = f"s3://missing?endpoint_url={store.endpoint_url}"
        assert farm(*command, "--set", f"store={url}") == (
            f"The store {url} has no bucket missing: make it, or correct the address."
        )


@pytest.mark.usefixtures("unchanged")
def test_a_bucket_that_may_only_be_read(
    store: S3Store, terminal: Terminal, config: Path, farm: Any, keys: Any, policy: Any
) -> None:
    """What only reads works; what would write says so, and at which key."""
    policy()
    keys(*READER)
    assert terminal.document("status", "--config", config)["store"] == store.url
    told = f"The store {store.url} may not be written with these credentials (AccessDenied for "
    assert farm("run").startswith(f"{told}farm.json)")
    assert farm("gc", "--yes").startswith(f"{told}queue/turns/collection.json)")


def test_a_key_that_may_not_be_read(store: S3Store, farm: Any, keys: Any, policy: Any) -> None:
    store.put("registry/sepia.json", b"{}")
    policy(without="registry/sepia.json")
    keys(*READER)
    for command in (("status",), ("run",), ("verify",)):
        assert farm(*command) == (
            f"The store {store.url} may not be read with these credentials (AccessDenied for registry/sepia.json): "
            "have that granted."
        )
