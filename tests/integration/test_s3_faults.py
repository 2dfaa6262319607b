"""Small farms in a bucket whose wire fails at one call in ten: nothing is lost, and nothing half visible.

`bench/faults.py` does the same with as many seeds as it is told.
"""

from __future__ import annotations

from collections.abc import Iterator

import faults
import pytest
import rgw
from stores import fresh
from wire import Wire, wire_to

from farm.s3 import S3Store

pytestmark = pytest.mark.server

SEEDS = 4


@pytest.fixture(scope="module")
def bucket(request: pytest.FixtureRequest) -> str:
    """Of Ceph's gateway where it is installed; the other server does not settle races."""
    return str(request.getfixturevalue("rgw_bucket" if not rgw.missing() else "moto_bucket"))


@pytest.fixture(scope="module")
def wire(bucket: str) -> Iterator[Wire]:
    endpoint = S3Store.parse(bucket).endpoint_url
    assert endpoint is not None
    with faults.hasty(), wire_to(endpoint) as wire:
        yield wire


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_farm_over_a_wire_that_fails(bucket: str, wire: Wire, seed: int) -> None:
    note = faults.farm(fresh(bucket), wire, seed)
    assert note["problems"] == [] and note["faults"] > 10


@pytest.mark.parametrize("seed", range(SEEDS))
def test_publishers_that_race_over_a_wire_that_fails(bucket: str, wire: Wire, seed: int) -> None:
    """Each publishes three adapters of one concept in turn: every publication is one version, and none is lost."""
    if rgw.missing():
        pytest.skip("the server in Python does not settle races")
    note = faults.race(fresh(bucket), wire, seed)
    assert note["problems"] == [] and note["faults"] > 5
