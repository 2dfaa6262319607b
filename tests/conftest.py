"""What tests share: PyTorch with one thread, and servers of S3, one in Python and a real one where its programs are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import rgw

BUCKET = "farm"

pytest.register_assert_rewrite("stores")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch with one thread, so that the same edit has the same bits on any machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def s3_keys() -> Iterator[None]:
    """The credentials of both servers, and nobody else's."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ACCESS_KEY_ID", rgw.ACCESS_KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", rgw.SECRET_KEY)
        patch.setenv("AWS_CONFIG_FILE", "/dev/null")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "100")  # a page of a listing: short ones make tests of many quick
        yield


@pytest.fixture(scope="session")
def moto_bucket(s3_keys: None) -> Iterator[str]:
    """The address of an empty bucket on a server that checks no credentials, no checksums and no expiry."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield _make_bucket(f"http://{host}:{port}")
    server.stop()


@pytest.fixture(scope="session")
def ceph(s3_keys: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[rgw.Ceph]:
    """What gateways stand on, started once; skips the test when it is not installed."""
    if missing := rgw.missing():
        pytest.skip(f"not installed: {', '.join(missing)} (apt-get install ceph-mon ceph-osd radosgw)")
    folder: Path = tmp_path_factory.mktemp("ceph")
    with rgw.ceph(folder) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def rgw_bucket(ceph: rgw.Ceph) -> str:
    """The address of a bucket on Ceph's gateway. A test that kills a gateway starts one of its own."""
    return _make_bucket(rgw.Gateway(ceph).start().endpoint)


def _make_bucket(endpoint: str) -> str:
    import boto3

    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket=BUCKET)
    client.close()
    return f"s3://{BUCKET}?endpoint_url={endpoint}"
