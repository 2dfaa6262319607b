"""The store in S3 against a server in Python: the contract, addresses, and what its errors become."""

import hashlib
import logging
import os
import pickle
import socket
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import boto3
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from stage_farm import document_of
from stores import SPAWN, StoreContract, fresh
from wire import wire_to

from farm import s3_client
from farm.errors import StoreError, UserError
from farm.objects import StoreUnreachableError, check_key
from farm.s3 import S3Store, open_s3
from farm.store import open_store

pytestmark = pytest.mark.server


@pytest.fixture
def store(moto_bucket):
    return fresh(moto_bucket)


@pytest.fixture
def forgetful(moto_bucket):
    """Nobody in this process has talked to the server yet, nor has anybody afterwards."""
    address = S3Store.parse(moto_bucket)
    s3_client.forget_client(address.endpoint_url, address.region)
    yield
    s3_client.forget_client(address.endpoint_url, address.region)


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(s3_client, "ATTEMPTS", 1)


def admin(store):
    return boto3.client("s3", endpoint_url=store.endpoint_url)


class TestMoto(StoreContract):
    examples = 8

    @pytest.fixture
    def new_store(self, moto_bucket):
        return lambda: fresh(moto_bucket)


@pytest.mark.parametrize(
    ("url", "store"),
    [
        ("s3://farm", S3Store("farm")),
        ("s3://farm/", S3Store("farm")),
        ("s3://farm.of-mine/a/b/", S3Store("farm.of-mine", "a/b")),
        ("s3://farm/a%20%C3%A9?region=eu-central-1", S3Store("farm", "a é", None, "eu-central-1")),
        (
            "s3://farm/a?region=x&endpoint_url=http%3A%2F%2Flocalhost%3A9000%2F",
            S3Store("farm", "a", "http://localhost:9000", "x"),
        ),
        ("s3://farm?endpoint_url=https://host/base", S3Store("farm", "", "https://host/base")),
    ],
)
def test_addresses(url, store):
    assert S3Store.parse(url) == store
    assert S3Store.parse(store.url) == store


@given(st.text(min_size=1, max_size=12), st.sampled_from([None, "http://127.0.0.1:9000", "https://s3.example.org"]))
def test_every_prefix_that_is_a_key_survives_its_address(prefix, endpoint):
    store = S3Store("farm", prefix, endpoint)
    try:
        check_key(prefix)
    except ValueError:
        return
    assert S3Store.parse(store.url) == store


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("s3://", "bucket"),
        ("s3:///farm", "bucket"),
        ("s3://a", "bucket"),
        ("s3://farm:9000/a", "bucket"),
        ("s3://farm/a//b", "prefix"),
        ("s3://farm/../b", "prefix"),
        ("s3://farm/.hidden", "prefix"),
        ("s3://farm/a?endpoint_url=", "endpoint_url"),
        ("s3://farm/a?endpoint_url=localhost:9000", "endpoint_url"),
        ("s3://farm/a?endpoint_url=ftp://localhost", "endpoint_url"),
        ("s3://farm/a?endpoint_url=http://localhost:99999", "endpoint_url"),
        ("s3://farm/a?endpoint_url=http://u:hush%40host", "endpoint_url"),
        ("s3://farm/a?region=", "region"),
        ("s3://farm/a?region=eu west", "region"),
        ("s3://farm/a#b", "end"),
    ],
)
def test_refuses_addresses(url, part):
    with pytest.raises(
        UserError, match=f"^The {part} in the address of a store in S3 is missing or not valid: write s3:/"
    ):
        open_store(url)


@pytest.mark.parametrize(
    "url",
    [
        "s3://KEY:hush@farm/a",
        "s3://KEY:hu/sh@farm/a",
        "s3://KEY:hush/farm",
        "s3://farm/a?endpoint_url=http://KEY:hush@localhost:9000",
        "s3://farm/a?endpoint_url=http%3A%2F%2FKEY:hush%40localhost:9000",
        "s3://farm/a?aws_secret_access_key=hush",
        "s3://farm/a?endpoint_url=http://localhost&secret=hush",
    ],
)
def test_secrets_in_an_address_are_refused_and_not_repeated(url):
    with pytest.raises(UserError, match=r"write s3://bucket/prefix") as caught:
        open_store(url)
    assert "hu" not in str(caught.value)


def test_a_handle_is_its_address_alone(store):
    store.put("a", b"")
    assert vars(pickle.loads(pickle.dumps(store))) == vars(store)
    assert (
        repr(store)
        == f"S3Store(bucket='farm', prefix='{store.prefix}', endpoint_url='{store.endpoint_url}', region=None)"
    )


def test_no_credentials_in_logs_or_errors(store, caplog):
    store.put("a", b"")
    with caplog.at_level(logging.INFO), pytest.raises(UserError) as caught:
        open_s3(f"s3://missing?endpoint_url={store.endpoint_url}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert os.environ[name] not in f"{caught.value} {caplog.text} {pickle.dumps(store)!r}"


def test_one_client_a_process_for_all_its_threads(store, forgetful):
    with ThreadPoolExecutor(8) as threads:
        clients = {id(client) for client in threads.map(lambda _: store._client, range(8))}
    assert len(clients) == 1
    assert replace(store, prefix="another")._client is store._client


def test_a_forked_process_has_a_client_of_its_own(store):
    store.put("a", b"from the parent")
    parents = store._client
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        try:
            same = store._client is parents
            store.put("b", store.get("a") + b" to the child")
            os.write(write_end, b"same" if same else b"another")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as answer:
        assert answer.read() == b"another"
    assert store.get("b") == b"from the parent to the child"


def test_a_spawned_process_finds_the_store(store):
    store.put("a", b"here")
    with SPAWN.Pool(1) as pool:
        assert pool.apply(store.get, ("a",)) == b"here"
        pool.close()
        pool.join()


def test_objects_of_others_are_read_and_those_that_are_no_keys_not_seen(store):
    """As a folder that a console marked, and an object that another tool copied, without our sha256."""
    for name in ("folder/", ".hidden", "copied"):
        admin(store).put_object(Bucket=store.bucket, Key=f"{store.prefix}/{name}", Body=b"abc")
    assert list(store.list()) == ["copied"]
    assert store.get("copied") == b"abc"


def test_a_key_is_no_longer_than_s3_takes_it(moto_bucket):
    store = replace(S3Store.parse(moto_bucket), prefix="p" * 200)
    with pytest.raises(ValueError, match="longer than 1024 bytes"):
        store.put("/".join(["k" * 200] * 5), b"")


def test_writes_carry_both_hashes(store, tmp_path):
    sent = []
    store._client.meta.events.register("before-send.s3", lambda request, **_: sent.append(dict(request.headers)))
    (tmp_path / "file").write_bytes(bytes(9 << 20))
    try:
        store.put("a", b"abc")
        store.upload("b", tmp_path / "file")
    finally:
        s3_client.forget_client(store.endpoint_url, store.region)
    put, create, *parts, _ = sent
    assert put["Content-MD5"] == b"kAFQmDzST7DWlj99KOF/cg=="
    assert put["x-amz-meta-sha256"] == b"ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert create["x-amz-meta-sha256"] == hashlib.sha256(bytes(9 << 20)).hexdigest().encode()
    assert len(parts) == 2
    assert all(part["Content-MD5"] for part in parts)
    assert "x-amz-checksum-crc32" not in {name.lower() for headers in sent for name in headers}


def test_an_object_that_rotted_is_never_given_out(store, monkeypatch, tmp_path):
    monkeypatch.setattr(s3_client, "FIRST_WAIT_SECONDS", 0.001)
    store.put("a", b"abc")
    admin(store).put_object(
        Bucket=store.bucket, Key=f"{store.prefix}/a", Body=b"abd", Metadata={"sha256": "ba7816bf8f01cfea"}
    )
    for call in (store.get, store.get_with_etag, lambda key: store.download(key, tmp_path / "a")):
        with pytest.raises(UserError) as caught:
            call("a")
        told = f"The object a of the store {store.url} is damaged, its sha256 is another: delete it and run again."
        assert str(caught.value) == told
    assert not list(tmp_path.iterdir())


def test_a_missing_bucket_is_no_empty_store(store, tmp_path):
    away = replace(store, bucket="missing")
    (tmp_path / "file").write_bytes(b"abc")
    calls = [
        lambda: away.get("a"),
        lambda: away.exists("a"),
        lambda: away.list(),
        lambda: away.marks(),
        lambda: away.delete("a"),
        lambda: away.put("a", b""),
        lambda: away.put_if_absent("a", b""),
        lambda: away.replace_if_match("a", b"", "x"),
        lambda: away.get_range("a", 0, 1),
        lambda: away.download("a", tmp_path / "a"),
        lambda: away.upload("a", tmp_path / "file"),
        lambda: away.presigned_url("a", 60),
        lambda: open_store(away.url),
    ]
    told = f"The store {away.url} has no bucket missing: make it, or correct the address."
    for call in calls:
        with pytest.raises(StoreError) as caught:
            call()
        assert str(caught.value) == told
    assert not admin(store).list_buckets().get("Buckets", [])[1:], "opening makes no bucket"


def test_no_credentials(store, forgetful, monkeypatch):
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(StoreError, match=r"^There are no credentials for the store s3:.*: set AWS_ACCESS_KEY_ID"):
            open_store(store.url)
        patch.setenv("AWS_PROFILE", "nobody")
        with pytest.raises(StoreError, match=r"cannot be used \(The config profile \(nobody\) could not be found\)"):
            open_store(store.url)
    assert open_store(store.url) == store, "mended settings are seen"


@contextmanager
def listening(answer):
    """What a port does that is no S3: send these bytes to whoever connects, whatever they say."""

    def serve():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                connection.recv(65536)
                connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"s3://farm/a?endpoint_url=http://127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def page(status, body, kind="text/html"):
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


NO_S3 = {
    "a page": page("200 OK", b"<!doctype html><p>Hello"),
    "a page in XML": page("200 OK", b"<html><body>Hello</body></html>"),
    "a page that is not found": page("404 Not Found", b"<html><body>Nothing here</body></html>"),
    "a page that is forbidden": page("403 Forbidden", b"Not for you"),
    "JSON": page("200 OK", b'{"hello": 1}', "application/json"),
    "nothing": page("200 OK", b""),
}


@pytest.mark.parametrize("answer", NO_S3.values(), ids=NO_S3)
def test_what_speaks_http_but_not_s3(s3_keys, hasty, answer):
    with listening(answer) as url:
        with pytest.raises(UserError) as caught:
            open_store(url)
        assert str(caught.value) == f"What answers at the store {url} does not speak S3: check endpoint_url."
        store = S3Store.parse(url)
        for call in (
            lambda: store.list(),
            lambda: store.get("a"),
            lambda: store.exists("a"),
            lambda: store.put("a", b""),
        ):
            with pytest.raises(StoreUnreachableError):
                call()


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.2\r\n", b"", b"\0" * 100])
def test_what_does_not_even_speak_http(s3_keys, hasty, answer):
    with listening(answer) as url, pytest.raises(UserError) as caught:
        open_store(url)
    assert str(caught.value).startswith(f"The store {url} does not answer (")
    assert str(caught.value).endswith("): check its address.")


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:1", "http://no-such-host.invalid", "https://127.0.0.1:1"])
def test_nothing_is_there(s3_keys, hasty, endpoint):
    url = f"s3://farm/a?endpoint_url={endpoint}"
    with pytest.raises(UserError) as caught:
        open_store(url)
    assert str(caught.value).startswith(f"The store {url} does not answer (Could not connect to the endpoint URL: ")
    with pytest.raises(StoreUnreachableError):
        S3Store.parse(url).exists("a")


def refusal(status, code, message="Because."):
    return page(status, f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode(), "application/xml")


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        ("403 Forbidden", "InvalidAccessKeyId", "refuses the credentials"),
        ("403 Forbidden", "SignatureDoesNotMatch", "refuses the credentials"),
        ("400 Bad Request", "ExpiredToken", "refuses the credentials"),
        ("403 Forbidden", "RequestTimeTooSkewed", "refuses this machine's clock"),
        ("403 Forbidden", "AccessDenied", "may not be written with these credentials"),
        ("403 Forbidden", "QuotaExceeded", "is full"),
        ("507 Insufficient Storage", "XMinioStorageFull", "is full"),
        ("501 Not Implemented", "NotImplemented", r"refuses PutObject \(NotImplemented: Because\)"),
    ],
)
def test_what_is_wrong_for_good_is_told_in_a_sentence(s3_keys, hasty, status, code, sentence):
    with listening(refusal(status, code)) as url:
        store = S3Store.parse(url)
        for call in (store.put, store.put_if_absent):
            with pytest.raises(StoreError, match=f"The store .* {sentence}.*[.]$") as caught:
                call("a", b"")
            assert str(caught.value).startswith(f"The store {url} ")


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ("500 Internal Server Error", "InternalError"),
        ("503 Slow Down", "SlowDown"),
        ("503 Service Unavailable", "ServiceUnavailable"),
        ("502 Bad Gateway", ""),
        ("504 Gateway Timeout", ""),
        ("400 Bad Request", "RequestTimeout"),
        ("429 Too Many Requests", "TooManyRequests"),
        ("409 Conflict", "ConditionalRequestConflict"),
    ],
)
def test_what_may_pass_is_waited_for(s3_keys, hasty, status, code):
    with listening(refusal(status, code)) as url:
        store = S3Store.parse(url)
        for call in (store.put, store.put_if_absent):
            with pytest.raises(StoreUnreachableError, match="does not answer"):
                call("a", b"")


@pytest.mark.parametrize("code", ["UnknownError", "ConditionalRequestConflict"])
def test_a_write_that_met_another_is_written_again(s3_keys, monkeypatch, code):
    """Also when boto3 repeats nothing any more, which it stops doing after many failures."""
    monkeypatch.setattr(s3_client, "FIRST_WAIT_SECONDS", 0.001)
    with listening(refusal("500 Internal Server Error", code)) as url:
        store, asked = S3Store.parse(url), []
        events = store._client.meta.events
        events.register("before-send.s3", lambda **_: asked.append(1))
        events.register_first("needs-retry.s3", lambda **_: False)
        with pytest.raises(StoreUnreachableError):
            store.replace_if_match("a", b"", "x")
    assert len(asked) >= s3_client.ATTEMPTS


def test_a_server_that_hangs_is_away(s3_keys, hasty, monkeypatch):
    monkeypatch.setattr(s3_client, "READ_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        store = S3Store("farm", endpoint_url=f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(StoreUnreachableError):
            store.put_if_absent("a", b"")


@pytest.fixture
def config(tmp_path, moto_bucket):
    """The configuration of a farm whose store is at an address, in a file."""

    def of(url):
        path = tmp_path / "farm.yaml"
        path.write_text(yaml.safe_dump(document_of(url)))
        return path

    return of


@pytest.mark.parametrize("command", ["status", "run", "publish", "verify"])
def test_a_server_that_is_silent_is_told_of_soon(s3_keys, monkeypatch, terminal, config, command):
    """It accepts and never answers: as often as a call is tried, not as often as the most patient one."""
    monkeypatch.setattr(s3_client, "HASTY_SECONDS", 0.2)
    monkeypatch.setattr(s3_client, "READ_SECONDS", 600)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"s3://farm/a?endpoint_url=http://127.0.0.1:{server.getsockname()[1]}"
        more = ["--all"] if command == "publish" else []
        told = terminal.mistake(command, "--config", config(url), *more)
    assert told.startswith(f"The store {url} does not answer (Read timeout on endpoint URL: ")
    assert told.endswith("): check its address.")


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """A certificate for this machine, with its key, that nobody else trusts."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path


@contextmanager
def over_tls(endpoint, certificate):
    """The server of an endpoint, spoken to with TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with wire_to(endpoint) as wire:
        wire.socket = context.wrap_socket(wire.socket, server_side=True)
        yield wire.endpoint.replace("http:", "https:")


def test_tls_that_is_not_trusted_here(store, authority, monkeypatch, terminal, config):
    with over_tls(store.endpoint_url, authority) as endpoint:
        url = f"s3://farm?endpoint_url={endpoint}"
        told = terminal.mistake("status", "--config", config(url))
        assert told == (
            f"The store {url} speaks no TLS that is trusted here (CERTIFICATE_VERIFY_FAILED): write http:// in "
            "endpoint_url if it speaks none, or name the authority of its certificate in AWS_CA_BUNDLE."
        )
        monkeypatch.setenv("AWS_CA_BUNDLE", str(authority))
        assert open_store(url).url == url


def test_tls_spoken_to_who_speaks_none_and_the_other_way_round(store, authority, terminal, config):
    url = f"s3://farm?endpoint_url={store.endpoint_url.replace('http:', 'https:')}"
    told = terminal.mistake("status", "--config", config(url))
    assert told.startswith(f"The store {url} speaks no TLS that is trusted here (")
    with over_tls(store.endpoint_url, authority) as endpoint:
        url = f"s3://farm?endpoint_url={endpoint.replace('https:', 'http:')}"
        told = terminal.mistake("status", "--config", config(url))
    assert told.startswith(f"The store {url} does not answer (") and told.endswith("): check its address.")
