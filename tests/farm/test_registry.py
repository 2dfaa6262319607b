import json
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farm.errors import UserError
from farm.registry import Registry
from farm.store import LocalStore


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "store")


@pytest.fixture
def registry(store):
    return Registry(store)


def publish(registry, digest, concept="van-gogh", **metrics):
    return registry.publish(concept, adapter=f"adapters/{concept}/{digest}", digest=digest, base="b0", metrics=metrics)


def test_versions_grow_and_history_keeps_every_release(registry):
    for version, digest in enumerate(["d1", "d2", "d1"], start=1):
        entry = publish(registry, digest, fd_untrained=version / 2)
        assert registry.get("van-gogh") == entry
        assert (entry.concept, entry.version, entry.digest) == ("van-gogh", version, digest)
        assert entry.adapter == f"adapters/van-gogh/{digest}"
        assert entry.metrics == {"fd_untrained": version / 2}
    assert [(release.version, release.digest) for release in entry.history] == [(1, "d1"), (2, "d2")]
    assert [release.metrics["fd_untrained"] for release in entry.history] == [0.5, 1.0]
    assert datetime.fromisoformat(entry.published_at).utcoffset().total_seconds() == 0


def test_publishing_the_current_digest_changes_nothing(registry):
    entry = publish(registry, "d1", psnr=20.0)
    etag = registry.etag("van-gogh")
    assert publish(registry, "d1", psnr=99.0) == entry
    assert registry.etag("van-gogh") == etag
    publish(registry, "d2")
    assert registry.etag("van-gogh") != etag


def test_nothing_is_published_at_first(registry):
    assert registry.get("ink") is None
    assert registry.etag("ink") is None
    assert registry.list() == {}


def test_list_has_every_concept(registry):
    entries = {concept: publish(registry, "d1", concept) for concept in ("ink", "1970s", "van-gogh-style")}
    assert registry.list() == entries
    assert list(registry.list()) == ["1970s", "ink", "van-gogh-style"]


def test_racing_publishers_lose_nothing(store):
    def publisher(worker):
        return [publish(Registry(store), f"d-{worker}-{i}").version for i in range(10)]

    with ThreadPoolExecutor(6) as threads:
        versions = [version for result in threads.map(publisher, range(6)) for version in result]
    entry = Registry(store).get("van-gogh")
    releases = [*entry.history, entry]
    assert sorted(versions) == [release.version for release in releases] == list(range(1, 61))
    assert {release.digest for release in releases} == {f"d-{w}-{i}" for w in range(6) for i in range(10)}


def test_the_loser_of_a_race_publishes_on_top_of_the_winner(tmp_path):
    class Overtaken(LocalStore):
        def put_if_absent(self, key, data):
            publish(Registry(LocalStore(tmp_path)), "first")
            return super().put_if_absent(key, data)

        def replace_if_match(self, key, data, etag):
            if json.loads(data)["version"] == 2:
                publish(Registry(LocalStore(tmp_path)), "second")
            return super().replace_if_match(key, data, etag)

    entry = publish(Registry(Overtaken(tmp_path)), "mine")
    assert [release.digest for release in [*entry.history, entry]] == ["first", "second", "mine"]
    assert entry.version == 3


@pytest.mark.parametrize("concept", ["", "Ink", "van gogh", "van--gogh", "-ink", "ink-", "../ink", "a/b", "ínk", "a\n"])
def test_refuses_what_is_no_concept_id(registry, concept):
    for call in (registry.get, registry.etag, lambda concept: publish(registry, "d1", concept)):
        with pytest.raises(ValueError, match="is not a concept's id"):
            call(concept)


@settings(deadline=None)
@given(st.text(alphabet="ab1-", min_size=1))
def test_slugs_are_words_joined_by_single_hyphens(tmp_path_factory, concept):
    registry = Registry(LocalStore(tmp_path_factory.getbasetemp() / "slugs"))
    if all(concept.split("-")):
        assert registry.get(concept) is None
    else:
        with pytest.raises(ValueError, match="is not a concept's id"):
            registry.get(concept)


@pytest.mark.parametrize("data", [b"", b"{}", b'{"concept": "ink"}', b"\xff"])
def test_a_damaged_entry_is_one_sentence(registry, store, data):
    store.put("registry/ink.json", data)
    for call in (registry.get, registry.etag, lambda concept: publish(registry, "d1", concept)):
        with pytest.raises(UserError, match=r"registry/ink\.json is damaged .* and run again\.$"):
            call("ink")
    assert store.get("registry/ink.json") == data


def test_refuses_metrics_json_has_not(registry):
    with pytest.raises(ValueError, match="not JSON compliant"):
        publish(registry, "d1", psnr=float("nan"))
    assert registry.get("van-gogh") is None
