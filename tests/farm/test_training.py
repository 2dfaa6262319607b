"""What a user is told of what Ray Train and Ray Tune raise."""

from __future__ import annotations

from pathlib import Path

from ray.train import ControllerError

from farm.cluster.scratch import scratch
from farm.cluster.training import meaning
from farm.errors import StoreError, UserError
from farm.s3 import S3Store
from farm.store import LocalStore

SLOW = (
    "When initiating multiple part upload for key 'scratch/base/checkpoint_manager_snapshot.json' in bucket 'demo': "
    "AWS Error NETWORK_CONNECTION during CreateMultipartUpload operation: curlCode: 28, Timeout was reached; Details: "
    "Operation too slow. Less than 1 bytes/sec transferred the last 3 seconds"
)


def test_a_server_that_does_not_take_checkpoints_is_the_stores_fault(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    told = meaning(ControllerError(OSError(SLOW)), store)
    assert isinstance(told, StoreError)
    assert str(told) == (
        f"The store {store.url} did not take Ray's checkpoints (NETWORK_CONNECTION during CreateMultipartUpload "
        "operation: curlCode: 28, Timeout was reached): run again to go on."
    )


def test_a_mistake_is_told_and_a_bug_stays_one(tmp_path: Path) -> None:
    mistake, bug = UserError("a.png is missing."), ControllerError(OSError("no such device"))
    assert meaning(ControllerError(mistake), LocalStore(tmp_path)) is mistake
    assert meaning(bug, LocalStore(tmp_path)) is bug


def test_ray_writes_below_the_stores_prefix(tmp_path: Path) -> None:
    system, folder = scratch(S3Store("bucket", "a/farm", "http://127.0.0.1:1", "here"))
    assert (system.type_name, folder, system.region) == ("s3", "bucket/a/farm/scratch", "here")
