"""Talking to a server of S3: one client a process, what is sent again, and what an error means for a store."""

from __future__ import annotations

import base64
import hashlib
import os
import threading
from typing import Any

from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    MetadataRetrievalError,
    NoCredentialsError,
    SSLError,
)
from botocore.exceptions import ConnectionError as NoConnectionError
from botocore.parsers import ResponseParserError
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from farm.errors import StoreError
from farm.objects import DamagedError, NotFoundError, StoreUnreachableError

ATTEMPTS = 4
"""How often a request is sent that meets no answer or a busy server, and an object read whose bytes came torn."""
CONNECT_SECONDS, READ_SECONDS = 5, 30
HASTY_ATTEMPTS, HASTY_SECONDS = 2, 10
"""When a store is opened: who mistyped its address should not wait for minutes to be told."""
CONNECTIONS = 32
"""That threads share; more of them would each open another for every call."""
FIRST_WAIT_SECONDS = 0.1
"""Before an object is read again; the bound below which waits are drawn doubles from here."""

NO_ANSWER = (
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    MetadataRetrievalError,
    NoConnectionError,
    ResponseParserError,
)
"""What boto3 raises when nothing came back, or nothing that S3 says."""

_TORN = {"BadDigest", "XAmzContentSHA256Mismatch"}  # what the server got is not what was sent
# UnknownError is Ceph's, of a write that met another; boto3 repeats it too, but only until its quota is used up.
_ONCE_MORE = {"ConditionalRequestConflict", "OperationAborted", "UnknownError", *_TORN}
_AWAY = {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequests", *_ONCE_MORE}
_AWAY_STATUS = {429, 500, 502, 503, 504}
_FULL = {"InsufficientStorage", "QuotaExceeded", "XMinioStorageFull"}
_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "TokenRefreshRequired"}
_ELSEWHERE = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}
_READS = {"GetObject", "HeadObject", "ListObjectsV2"}

_NO_TLS = ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE")  # in what OpenSSL says

_clients: dict[tuple[int, str | None, str | None], tuple[Any, Any]] = {}
_making = threading.Lock()
os.register_at_fork(before=_making.acquire, after_in_parent=_making.release, after_in_child=_making.release)


def client_of(endpoint_url: str | None, region: str | None, *, hasty: bool = False) -> Any:
    """This process's boto3 client of an endpoint, for all its threads; a forked child gets connections of its own.

    hasty: one that gives up soon.
    """
    who = os.getpid(), endpoint_url, region
    with _making:
        if who not in _clients:
            session = Session()
            patient = _new_client(session, endpoint_url, region, ATTEMPTS, READ_SECONDS)
            tries, seconds = min(HASTY_ATTEMPTS, ATTEMPTS), min(HASTY_SECONDS, READ_SECONDS)
            _clients[who] = patient, _new_client(session, endpoint_url, region, tries, seconds)
        return _clients[who][hasty]


def forget_client(endpoint_url: str | None, region: str | None) -> None:
    """Look for credentials and settings again at the next call."""
    _clients.pop((os.getpid(), endpoint_url, region), None)


def _new_client(
    session: Session, endpoint_url: str | None, region: str | None, attempts: int, read_seconds: float
) -> Any:
    client = session.client(
        "s3",
        endpoint_url=endpoint_url,
        region_name=region,
        config=Config(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=read_seconds,
            retries={"mode": "standard", "total_max_attempts": attempts},
            max_pool_connections=CONNECTIONS,
            tcp_keepalive=True,
            signature_version="s3v4",
            request_checksum_calculation="when_required",  # Ceph ignores the newer ones: see _add_md5
            response_checksum_validation="when_required",
            s3={"addressing_style": "path" if endpoint_url else "auto"},
        ),
    )
    for operation in ("PutObject", "UploadPart"):
        client.meta.events.register(f"before-call.s3.{operation}", _add_md5)
    return client


def _add_md5(params: dict[str, Any], **_: Any) -> None:
    body = params["body"]
    if not isinstance(body, bytes):  # a part of a file
        start = body.tell()
        data = body.read()
        body.seek(start)
        body = data
    md5 = hashlib.md5(body, usedforsecurity=False)
    params["headers"]["Content-MD5"] = base64.b64encode(md5.digest()).decode()


def retrying() -> Retrying:
    """Repeats what boto3 does not: a read whose body came torn, and a write that met another or came torn."""

    def again(error: BaseException) -> bool:
        if isinstance(error, ClientError):
            return code_of(error) in _ONCE_MORE
        return isinstance(error, StoreUnreachableError | DamagedError)

    return Retrying(
        retry=retry_if_exception(again),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(multiplier=FIRST_WAIT_SECONDS, max=2),
        reraise=True,
    )


def code_of(error: ClientError) -> str:
    """As `NoSuchKey`; the answer to a HEAD has only a status, as `404`."""
    return str(error.response["Error"].get("Code", ""))


def spoken(error: BaseException | None) -> bool:
    """False when what answered is no S3 server: its page has no code, and boto3 puts the status there."""
    if not isinstance(error, ClientError):
        return not isinstance(error, ResponseParserError)
    code = code_of(error)
    return bool(code) and (not code.isdigit() or error.operation_name == "HeadObject")


def _why(error: SSLError) -> str:
    """What OpenSSL says, as `WRONG_VERSION_NUMBER`."""
    return next(reason for reason in _NO_TLS if reason in str(error))


def meaning(
    error: BotoCoreError | ClientError | ResponseParserError, url: str, bucket: str, key: str | None
) -> Exception:
    """NotFoundError of the key; StoreUnreachableError for what may pass; StoreError for what is wrong for good."""
    if isinstance(error, SSLError) and any(reason in str(error) for reason in _NO_TLS):
        return StoreError(
            f"The store {url} speaks no TLS that is trusted here ({_why(error)}): write http:// in endpoint_url if it "
            "speaks none, or name the authority of its certificate in AWS_CA_BUNDLE."
        )
    if isinstance(error, NO_ANSWER):
        return StoreUnreachableError(url)
    if isinstance(error, NoCredentialsError):
        return StoreError(
            f"There are no credentials for the store {url}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or write "
            "them to ~/.aws/credentials."
        )
    if not isinstance(error, ClientError):
        return StoreError(f"The store {url} cannot be used ({str(error).rstrip('.')}): check the settings in ~/.aws.")
    code, status = code_of(error), error.response["ResponseMetadata"]["HTTPStatusCode"]
    if code == "NoSuchKey" and key is not None and error.operation_name in _READS:
        return NotFoundError(key, url)
    if code in _FULL or status == 507:
        return StoreError(f"The store {url} is full ({code}): free space there or raise its limits.")
    if code in _AWAY or status in _AWAY_STATUS or not spoken(error):
        return StoreUnreachableError(url)
    if code == "NoSuchBucket":
        return StoreError(f"The store {url} has no bucket {bucket}: make it, or correct the address.")
    if code in _CREDENTIALS:
        return StoreError(
            f"The store {url} refuses the credentials ({code}): correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or the profile in ~/.aws/credentials."
        )
    if code == "RequestTimeTooSkewed":
        return StoreError(f"The store {url} refuses this machine's clock ({code}): set it right.")
    if code in _ELSEWHERE:
        return StoreError(f"The store {url} is in another region ({code}): name it as region in the address.")
    if status == 403:
        done = "read" if error.operation_name in _READS else "written"
        what = f"{code} for {key}" if key else code
        return StoreError(f"The store {url} may not be {done} with these credentials ({what}): have that granted.")
    message = str(error.response["Error"].get("Message") or status).rstrip(".")
    return StoreError(f"The store {url} refuses {error.operation_name} ({code}: {message}): check its settings.")
