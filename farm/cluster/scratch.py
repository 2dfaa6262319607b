"""Where Ray Train and Ray Tune keep what lets them go on: `scratch/` in the store, which they write themselves."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from farm.store import Store


def scratch(store: Store) -> tuple[Any, str]:
    """What Ray calls `storage_filesystem` and `storage_path`: pyarrow's file system, and the folder in it.

    pyarrow finds S3's keys as boto3 does, but for profiles that run a program.
    """
    from pyarrow import fs

    if not store.url.startswith("s3://"):
        system, path = fs.FileSystem.from_uri(f"{store.url}/scratch")
        return system, path
    from farm.s3 import S3Store

    place = S3Store.parse(store.url)
    # pyarrow's own three seconds and three tries are over before a busy server has answered.
    options: dict[str, Any] = {"connect_timeout": 10, "request_timeout": 60}
    options["retry_strategy"] = fs.AwsStandardS3RetryStrategy(max_attempts=6)
    if place.region:
        options["region"] = place.region
    if place.endpoint_url:
        endpoint = urlsplit(place.endpoint_url)
        options |= {"endpoint_override": endpoint.netloc + endpoint.path, "scheme": endpoint.scheme}
    return fs.S3FileSystem(**options), "/".join(part for part in (place.bucket, place.prefix, "scratch") if part)
