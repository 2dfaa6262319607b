"""The store that is a bucket of S3, or of what speaks as S3 does: Ceph, MinIO, R2; `farm.objects` says what a store is.

Its address is `s3://bucket/prefix?endpoint_url=http://host:port&region=name`; only the bucket is needed, and no
endpoint_url means Amazon's. Who may use it is found as boto3 finds it (the environment, `~/.aws`, the machine's
role), and is never part of the address.

The service has to honour `If-None-Match: *` and `If-Match` on a put, and list what was just written.
"""

from __future__ import annotations

import hashlib
import io
import re
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from boto3.s3.transfer import TransferConfig
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError

from farm.errors import StoreError, UserError
from farm.objects import (
    DamagedError,
    NotFoundError,
    StoreUnreachableError,
    TooLargeError,
    check_key,
    check_range,
    check_seconds,
    is_key,
    whole_file,
)
from farm.s3_client import CONNECTIONS, NO_ANSWER, client_of, code_of, forget_client, meaning, retrying, spoken

_PIECE_BYTES = 1 << 20  # of an object that is read
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_REGION = re.compile(r"[a-z0-9-]+")
_PREFIX = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*(/[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*)*")
_LONGEST_NAME = 1024  # in bytes, prefix included: S3's own limit
_LOST = {"PreconditionFailed", "NoSuchKey"}  # a conditional write's: Amazon says NoSuchKey for If-Match on nothing
_SHAPE = "write s3://bucket/prefix?endpoint_url=http://host:port&region=name, where only the bucket is needed."


def open_s3(url: str) -> S3Store:
    """The store at an `s3://` address, when its bucket is there and can be listed; UserError otherwise."""
    store = S3Store.parse(url)
    try:
        store.check()
    except StoreUnreachableError as error:
        if not spoken(error.__cause__):
            raise UserError(f"What answers at the store {store.url} does not speak S3: check endpoint_url.") from error
        reason = str(error.__cause__).rstrip(".")
        raise UserError(f"The store {store.url} does not answer ({reason}): check its address.") from error
    return store


@dataclass(frozen=True)
class S3Store:
    """A bucket, or what lies under a prefix of it, as a store.

    Every object carries its sha256, which reading it whole checks, and every write its MD5, which the server checks.
    A conditional write also carries a word drawn at random: when it is refused after its first answer was lost, that
    word says whether the object there is its own.

    A handle is only the address. What talks to the server is made at the first call in each process, and shared by
    its threads. Parts of a large upload that was killed stay in the bucket, unseen: give it a lifecycle rule that
    aborts incomplete uploads.
    """

    bucket: str
    prefix: str = ""
    endpoint_url: str | None = None
    region: str | None = None

    @classmethod
    def parse(cls, url: str) -> S3Store:
        """The handle of an address; UserError, which repeats nothing that may be secret, when it is not one."""
        address = urlsplit(url)
        if "@" in url:
            raise UserError(
                "The address of a store in S3 holds no user and no password: write s3://bucket/prefix, and give the "
                "keys in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or in ~/.aws/credentials."
            )
        options = dict(parse_qsl(address.query, keep_blank_values=True))
        if unknown := options.keys() - {"endpoint_url", "region"}:
            raise UserError(f"The address of a store in S3 has no option {min(unknown)}: {_SHAPE}")
        prefix = unquote(address.path).strip("/")
        endpoint, region = options.get("endpoint_url"), options.get("region")
        valid = {
            "bucket": _BUCKET.fullmatch(address.netloc),
            "prefix": not prefix or _PREFIX.fullmatch(prefix),
            "endpoint_url": endpoint is None or _is_endpoint(endpoint),
            "region": region is None or _REGION.fullmatch(region),
            "end": not address.fragment,
        }
        if wrong := [part for part, passes in valid.items() if not passes]:
            raise UserError(f"The {wrong[0]} in the address of a store in S3 is missing or not valid: {_SHAPE}")
        return cls(address.netloc, prefix, endpoint and endpoint.rstrip("/"), region)

    @property
    def url(self) -> str:
        path = f"/{quote(self.prefix)}" if self.prefix else ""
        options = {"endpoint_url": self.endpoint_url, "region": self.region}
        query = urlencode({name: value for name, value in options.items() if value}, safe="/:")
        return f"s3://{self.bucket}{path}" + (f"?{query}" if query else "")

    @property
    def at_once(self) -> int:
        return CONNECTIONS

    def check(self) -> None:
        """StoreError when the bucket is not there, or may not be listed. A server that is silent is not waited for."""
        with self._answering():
            client = client_of(self.endpoint_url, self.region, hasty=True)
            self._listed(client.list_objects_v2(Bucket=self.bucket, Prefix=self._below, MaxKeys=1))

    def get(self, key: str, at_most: int | None = None) -> bytes:
        return self.get_with_etag(key, at_most)[0]

    def get_with_etag(self, key: str, at_most: int | None = None) -> tuple[bytes, str]:
        data = io.BytesIO()
        etag = self._read(key, data, at_most)
        return data.getvalue(), etag

    def exists(self, key: str) -> bool:
        try:
            self.get_range(key, 0, 0)  # not a HEAD, to which a missing object and a missing bucket answer alike
        except NotFoundError:
            return False
        return True

    def put(self, key: str, data: bytes) -> None:
        self._write(key, data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self._write(key, data, IfNoneMatch="*")

    def replace_if_match(self, key: str, data: bytes, etag: str) -> bool:
        return self._write(key, data, IfMatch=etag or "-")  # an empty header is not sent

    def list(self, prefix: str = "") -> Iterator[str]:
        return iter(self.marks(prefix))

    def marks(self, prefix: str = "") -> dict[str, str]:
        if prefix:
            check_key(prefix.removesuffix("/"))
        with self._answering():
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self._below + prefix
            )
            found = [listed for page in pages for listed in self._listed(page)]
        return dict(sorted(found))

    def delete(self, key: str) -> None:
        name = self._name(key)
        with self._answering(key):
            self._client.delete_object(Bucket=self.bucket, Key=name)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        check_range(start, length)
        name, last = self._name(key), start + max(length, 1) - 1

        def read() -> bytes:
            found = self._client.get_object(Bucket=self.bucket, Key=name, Range=f"bytes={start}-{last}")
            data = io.BytesIO()
            self._copy(found, data)
            return data.getvalue()[:length]

        with self._answering(key):
            try:
                return retrying()(read)
            except ClientError as error:
                if code_of(error) != "InvalidRange":
                    raise
                return b""  # it ends before

    def download(self, key: str, path: Path) -> None:
        with whole_file(path) as file:
            self._read(key, file)

    def upload(self, key: str, path: Path) -> None:
        name = self._name(key)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()

        def write() -> None:
            with path.open("rb") as file:
                self._client.upload_fileobj(
                    file,
                    self.bucket,
                    name,
                    ExtraArgs={"Metadata": {"sha256": sha256}},
                    Config=TransferConfig(preferred_transfer_client="classic"),
                )

        with self._answering(key):
            retrying()(write)

    def presigned_url(self, key: str, seconds: int) -> str:
        check_seconds(seconds)
        if not self.exists(key):
            raise NotFoundError(key, self.url)
        with self._answering():
            url: str = self._client.generate_presigned_url(
                "get_object", Params={"Bucket": self.bucket, "Key": self._name(key)}, ExpiresIn=seconds
            )
        return url

    @property
    def _below(self) -> str:
        return f"{self.prefix}/" if self.prefix else ""

    def _name(self, key: str) -> str:
        check_key(key)
        name = self._below + key
        if len(name.encode()) > _LONGEST_NAME:
            raise ValueError(f"{key!r} is not a key in S3: with its prefix it is longer than {_LONGEST_NAME} bytes")
        return name

    @property
    def _client(self) -> Any:
        return client_of(self.endpoint_url, self.region)

    def _listed(self, page: dict[str, Any]) -> tuple[tuple[str, str], ...]:
        """Keys and etags of a page of a listing. Consoles mark folders by objects that no store can name: not these."""
        if page.get("Name") != self.bucket:
            raise ResponseParserError("the answer is no listing of the bucket")
        found = ((one["Key"].removeprefix(self._below), one["ETag"]) for one in page.get("Contents", ()))
        return tuple((key, etag) for key, etag in found if is_key(key))

    def _read(self, key: str, file: IO[bytes], at_most: int | None = None) -> str:
        """Write the object into the file, whole and checked; its etag."""
        name = self._name(key)

        def read() -> str:
            file.seek(0)
            file.truncate()
            found = self._client.get_object(Bucket=self.bucket, Key=name)
            if at_most is not None and found.get("ContentLength", 0) > at_most:
                found["Body"].close()
                raise TooLargeError.of(key, self.url, at_most)
            sha256 = self._copy(found, file)
            if found["Metadata"].get("sha256", sha256) != sha256:
                raise DamagedError.of(key, self.url)
            return self._etag(found)

        with self._answering(key):
            return retrying()(read)

    def _copy(self, found: dict[str, Any], file: IO[bytes]) -> str:
        """The sha256 of what was copied; StoreUnreachableError when it was cut short, or is no object."""
        sha256 = hashlib.sha256()
        try:
            with closing(found["Body"]) as body:
                self._etag(found)
                for piece in body.iter_chunks(_PIECE_BYTES):
                    sha256.update(piece)
                    file.write(piece)
        except NO_ANSWER as error:
            raise StoreUnreachableError(self.url) from error
        return sha256.hexdigest()

    def _write(self, key: str, data: bytes, **condition: str) -> bool:
        """Whether the condition held."""
        name = self._name(key)
        metadata = {"sha256": hashlib.sha256(data).hexdigest()}
        if condition:
            metadata["writer"] = uuid.uuid4().hex
        request = {"Bucket": self.bucket, "Key": name, "Body": data, "Metadata": metadata, **condition}
        with self._answering(key):
            try:
                self._etag(retrying()(self._client.put_object, **request))
            except ClientError as error:
                if not condition or code_of(error) not in _LOST:
                    raise
                return self._writer(name) == metadata["writer"]
        return True

    def _writer(self, name: str) -> str | None:
        """The word of the conditional write that made the object, if one did."""
        try:
            writer: str | None = self._client.head_object(Bucket=self.bucket, Key=name)["Metadata"].get("writer")
        except ClientError as error:
            if code_of(error) != "404":
                raise
            return None
        return writer

    def _etag(self, answer: dict[str, Any]) -> str:
        if "ETag" not in answer:
            raise StoreUnreachableError(self.url) from ResponseParserError("the answer is no object")
        return str(answer["ETag"]).strip('"')

    @contextmanager
    def _answering(self, key: str | None = None) -> Iterator[None]:
        """Say what an error means: that there is no such object, that the store is away, or not to be used."""
        try:
            yield
        except (BotoCoreError, ClientError, ResponseParserError) as error:
            raised = meaning(error, self.url, self.bucket, key)
            if isinstance(raised, StoreError):
                forget_client(self.endpoint_url, self.region)
            raise raised from error


def _is_endpoint(url: str) -> bool:
    try:
        address = urlsplit(url)
        named = address.hostname and address.port != 0
    except ValueError:
        return False
    return bool(named) and address.scheme in ("http", "https") and not (address.query or address.fragment or "@" in url)
