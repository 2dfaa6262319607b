from __future__ import annotations

import io
from zipfile import ZipFile

import pytest
from in_process import service_of
from packed import WEIGHTS, add_pack
from tiny_farm import TinyFarm

from farm.serve import packs as offered


@pytest.fixture
def farm(tmp_path):
    farm = TinyFarm(tmp_path / "store")
    for seed, concept in enumerate(("charcoal", "ink")):
        farm.publish(concept, seed=seed)
    return farm


@pytest.fixture
def service(farm, monkeypatch):
    monkeypatch.setattr(offered, "LOOK_SECONDS", -1.0)  # it looks every time
    service = service_of(farm)
    yield service
    service.close()


def add(farm, *concepts):
    return add_pack(farm.store, [farm.registry.get(concept) for concept in concepts])


def listed(service):
    response = service.request("GET", "/v1/packs")
    assert response.status_code == 200, response.text
    return response.json()["packs"]


def test_nothing_is_offered_where_no_pack_is(service):
    assert listed(service) == []


def test_a_pack_is_listed_and_downloaded(farm, service):
    pack = add(farm, "charcoal", "ink")
    (row,) = listed(service)
    assert (row["digest"], row["concepts"], row["older"]) == (pack.digest, ["charcoal", "ink"], [])
    assert (row["format"], row["side"], row["precision"], row["bytes"]) == ("onnx", 64, "int8", len(WEIGHTS))
    response = service.request("GET", row["download"])
    assert response.headers["content-type"] == "application/zip"
    folder = f"onnx-{pack.digest[:12]}"
    assert response.headers["content-disposition"] == f'attachment; filename="{folder}.zip"'
    with ZipFile(io.BytesIO(response.content)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"{folder}/base.bin", f"{folder}/deep/in/it.json"]
        assert archive.read(f"{folder}/base.bin") == WEIGHTS


def test_a_pack_tells_what_is_older_in_it_and_goes_with_its_concepts(farm, service):
    pack = add(farm, "charcoal", "ink")
    farm.publish("ink", seed=7)
    service.editor.published.refresh()
    assert listed(service)[0]["older"] == ["ink"]
    farm.registry.unpublish("charcoal")
    service.editor.published.refresh()
    assert listed(service) == []
    refused = service.request("GET", f"/v1/packs/{pack.digest}.zip")
    assert refused.status_code == 404
    assert refused.json()["detail"] == f"no pack {pack.digest} is offered"


def test_what_changed_on_the_way_is_not_handed_out(farm, service):
    pack = add(farm, "ink")
    farm.store.put(f"{pack.path}/base.bin", b"x" * len(WEIGHTS))
    assert service.request("GET", f"/v1/packs/{pack.digest}.zip").status_code >= 500
    farm.store.put(f"{pack.path}/base.bin", WEIGHTS)
    for _ in range(offered.AT_ONCE + 1):  # every place is free again
        assert service.request("GET", f"/v1/packs/{pack.digest}.zip").status_code == 200


def test_so_many_are_downloaded_at_once(farm, monkeypatch):
    pack = add(farm, "ink")
    monkeypatch.setattr(offered, "AT_ONCE", 0)
    service = service_of(farm)
    refused = service.request("GET", f"/v1/packs/{pack.digest}.zip")
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "10"
    service.close()


def test_packs_may_be_kept_from_everybody(farm):
    pack = add(farm, "ink")
    service = service_of(farm, packs=False)
    assert listed(service) == []
    assert service.request("GET", f"/v1/packs/{pack.digest}.zip").status_code == 404
    service.close()


@pytest.mark.parametrize("name", ["x.zip", "..%2f..%2fregistry.zip", f"{'0' * 32}.tar", f"{'G' * 32}.zip"])
def test_other_names_are_no_packs(service, name):
    assert service.request("GET", f"/v1/packs/{name}").status_code in (404, 422)
