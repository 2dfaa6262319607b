from __future__ import annotations

import pytest
from tiny_farm import three_concepts

from farm.serve.listing import Described, Listing, etag
from farm.serve.published import Published, UnknownConceptError

CATALOGUE = [
    Described(id="ink", prompt="an ink drawing", domain="scenery", category="drawing"),
    Described(id="charcoal", prompt="a charcoal drawing", domain="scenery", category="drawing"),
    Described(id="fog", prompt="thick fog at Étretat", domain="scenery", category="weather"),
    Described(id="not-made", prompt="x", domain="face"),
]


@pytest.fixture
def farm(tmp_path):
    return three_concepts(tmp_path / "store")


@pytest.fixture
def listing(farm):
    farm.publish("wave", seed=4)
    return Listing(Published(farm.store), CATALOGUE)


def ids(rows):
    return [row.id for row in rows.concepts]


def test_the_listing_joins_registry_and_catalogue(farm, listing):
    rows = listing.search()
    assert ids(rows) == ["charcoal", "fog", "ink", "wave"]
    assert rows.concepts[2].model_dump() == {
        "id": "ink",
        "prompt": "an ink drawing",
        "domain": "scenery",
        "category": "drawing",
        "version": 1,
        "digest": farm.registry.get("ink").digest,
        "metrics": {"l1": 0.03},
        "preview": "/v1/concepts/ink/preview.webp",
    }
    assert rows.concepts[3].prompt is None
    assert (rows.total, rows.page, rows.pages) == (4, 1, 1)
    assert [(kind.id, kind.count) for kind in rows.categories] == [("drawing", 2), ("weather", 1)]


@pytest.mark.parametrize(
    ("q", "category", "found"),
    [
        ("ink", None, ["ink"]),
        ("DRAWING", None, ["charcoal", "ink"]),
        ("drawing an", None, ["ink"]),
        ("etretat", None, ["fog"]),
        ("", "drawing", ["charcoal", "ink"]),
        ("a", "weather", ["fog"]),
        ("nothing", None, []),
        ("", "nothing", []),
    ],
)
def test_all_words_must_occur(listing, q, category, found):
    assert ids(listing.search(q, category)) == found


def test_categories_are_counted_whichever_is_chosen(listing):
    rows = listing.search("drawing", "weather")
    assert (rows.total, [(kind.id, kind.count) for kind in rows.categories]) == (0, [("drawing", 2)])


def test_pages_have_everything_once(listing):
    pages = [listing.search(page=page, per_page=3) for page in (1, 2, 3)]
    assert [ids(rows) for rows in pages] == [["charcoal", "fog", "ink"], ["wave"], []]
    assert {(rows.total, rows.pages) for rows in pages} == {(4, 2)}


def test_a_concepts_history_is_told(farm, listing):
    farm.publish("ink", seed=11)
    farm.registry.rollback("ink")
    listing.published.refresh()
    detail = listing.detail("ink")
    assert (detail.version, detail.base) == (3, farm.base)
    told = [(release.version, release.action, release.restores) for release in detail.history]
    assert told == [(1, "published", None), (2, "published", None), (3, "rolled-back", 1)]
    assert listing.lineage("ink")["release"]["version"] == 3
    for ask in (listing.detail, listing.lineage, listing.preview):
        with pytest.raises(UnknownConceptError):
            ask("not-made")


def test_a_change_changes_the_etag(farm, listing):
    before = etag(listing.search("ink"))
    other = etag(listing.search("fog"))
    farm.publish("ink", seed=11)
    listing.published.refresh()
    assert etag(listing.search("ink")) != before != other
    assert etag(listing.search("fog")) == other
