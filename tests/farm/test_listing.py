from __future__ import annotations

import pytest
from tiny_farm import TinyFarm

from farm.serve.listing import Described, Listing, published


@pytest.fixture
def farm(tmp_path):
    farm = TinyFarm(tmp_path / "store")
    for seed, concept in enumerate(("charcoal", "fog", "ink"), start=1):
        farm.publish(concept, seed=seed)
    return farm


def test_the_listing_joins_registry_and_catalogue(farm, caplog):
    catalogue = [
        Described(id="ink", prompt="an ink drawing", domain="scenery"),
        Described(id="not-made", prompt="x", domain="face"),
    ]
    farm.store.put("registry/fog.json", b"{")
    rows = Listing(farm.store, catalogue)()
    assert [row["id"] for row in rows] == ["charcoal", "ink"]
    entry = farm.registry.get("ink")
    assert rows[1] == {
        "id": "ink",
        "prompt": "an ink drawing",
        "domain": "scenery",
        "version": 1,
        "digest": entry.digest,
        "metrics": {"l1": 0.03},
    }
    assert rows[0]["prompt"] is None
    assert "fog is not listed" in caplog.text


def test_unpublished_concepts_are_not_listed(farm):
    farm.registry.unpublish("fog")
    assert list(published(farm.store, ["ink", "fog", "charcoal", "Not an id", "waves"])) == ["ink", "charcoal"]
    assert [row["id"] for row in Listing(farm.store, [])()] == ["charcoal", "ink"]
    farm.registry.rollback("fog")
    assert [(row["id"], row["version"]) for row in Listing(farm.store, [])()][1] == ("fog", 3)


def test_the_listing_is_read_again_when_it_is_old(farm):
    kept, fresh = Listing(farm.store, []), Listing(farm.store, [], max_age=0)
    assert len(kept()) == len(fresh()) == 3
    farm.publish("wave", seed=4)
    assert [len(kept()), len(fresh())] == [3, 4]
