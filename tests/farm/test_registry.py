import json
import random
import shutil
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from itertools import chain, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from sound_adapters import BASE, Dying, adapter_spec, killed, put_adapter

from farm import artifacts, patient
from farm.errors import UserError
from farm.patient import PatientStore
from farm.registry import Registry
from farm.store import LocalStore, StoreUnreachableError


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "store")


@pytest.fixture
def registry(store):
    return Registry(store)


def publish(registry, name, concept="van-gogh", **metrics):
    """Publish the adapter of that name, made when it is not there."""
    return registry.publish(concept, **put_adapter(registry.store, concept, name, **metrics))


def digest(name, concept="van-gogh"):
    return adapter_spec(concept, name).digest


def told(record):
    """What happened, oldest first."""
    return [(release.version, release.action, release.digest) for release in record.releases]


def test_versions_grow_and_history_keeps_every_release(registry):
    for version, name in enumerate(["d1", "d2", "d1"], start=1):
        entry = publish(registry, name, fd_untrained=version / 2)
        assert registry.get("van-gogh") == registry.record("van-gogh") == entry
        assert (entry.concept, entry.version, entry.digest) == ("van-gogh", version, digest(name))
        assert (entry.adapter, entry.base) == (f"adapters/van-gogh/{digest(name)}", BASE.digest)
        assert entry.metrics == {"fd_untrained": version / 2}
    assert [(release.version, release.digest) for release in entry.history] == [(1, digest("d1")), (2, digest("d2"))]
    assert [release.metrics["fd_untrained"] for release in entry.history] == [0.5, 1.0]
    assert datetime.fromisoformat(entry.published_at).utcoffset().total_seconds() == 0
    assert len({release.id for release in entry.releases}) == 3
    user, at, host = entry.published_by.partition("@")
    assert user and at and host


def test_publishing_the_current_digest_changes_nothing(registry):
    entry = publish(registry, "d1", psnr=20.0)
    etag = registry.etag("van-gogh")
    assert publish(registry, "d1", psnr=99.0) == entry
    assert registry.etag("van-gogh") == etag
    publish(registry, "d2")
    assert registry.etag("van-gogh") != etag


def test_nothing_is_published_at_first(registry):
    assert registry.get("ink") is registry.record("ink") is None
    assert registry.etag("ink") is None
    assert registry.list() == registry.records() == {}


def test_list_has_every_published_concept(registry):
    entries = {concept: publish(registry, "d1", concept) for concept in ("ink", "1970s", "van-gogh-style")}
    registry.store.put("registry/README.md", b"not a record")
    assert registry.list() == registry.records() == entries
    assert list(registry.list()) == ["1970s", "ink", "van-gogh-style"]
    gone = registry.unpublish("ink")
    assert list(registry.list()) == ["1970s", "van-gogh-style"]
    assert registry.records() == entries | {"ink": gone}


def test_a_rollback_is_a_publication_of_the_older_adapter(registry):
    for name in ("d1", "d2", "d3"):
        publish(registry, name, l1=int(name[1]))
    back = registry.rollback("van-gogh")
    assert told(back)[3:] == [(4, "rolled-back", digest("d2"))]
    assert (back.restores, back.metrics, back.adapter) == (2, {"l1": 2}, f"adapters/van-gogh/{digest('d2')}")
    assert registry.get("van-gogh") == back
    further = registry.rollback("van-gogh", 1)
    assert (further.version, further.restores, further.digest) == (5, 1, digest("d1"))
    assert registry.rollback("van-gogh", 1) == further, "it is current already"
    assert registry.rollback("van-gogh").restores == 4, "the latest release of another adapter"


def test_what_is_unpublished_keeps_its_history_and_its_count(registry):
    publish(registry, "d1")
    publish(registry, "d2")
    gone = registry.unpublish("van-gogh")
    assert registry.get("van-gogh") is None and registry.list() == {}
    assert registry.record("van-gogh") == registry.unpublish("van-gogh") == gone
    assert told(gone)[2:] == [(3, "unpublished", digest("d2"))]
    back = registry.rollback("van-gogh")
    assert (back.version, back.restores, back.digest) == (4, 2, digest("d2"))
    registry.unpublish("van-gogh")
    again = publish(registry, "d2")
    assert (again.version, again.action) == (6, "published")
    assert registry.get("van-gogh") == again


def test_what_people_took_out_of_service_is_known_until_something_is_published(registry):
    def withdrawn():
        return registry.record("van-gogh").withdrawn

    for name in ("d1", "d2", "d3"):
        publish(registry, name)
        assert withdrawn() == set()
    registry.rollback("van-gogh")
    assert withdrawn() == {digest("d3")}
    registry.rollback("van-gogh", 1)
    assert withdrawn() == {digest("d3"), digest("d2")}
    registry.unpublish("van-gogh")
    assert withdrawn() == {digest(name) for name in ("d1", "d2", "d3")}
    registry.rollback("van-gogh", 2)
    assert withdrawn() == {digest("d1"), digest("d3")}
    publish(registry, "d3")
    assert withdrawn() == set()


def test_mistakes(registry):
    for call in (registry.rollback, registry.unpublish):
        with pytest.raises(UserError, match=r"^van-gogh was never published"):
            call("van-gogh")
    publish(registry, "d1")
    with pytest.raises(UserError, match=r"never had another adapter than its current one"):
        registry.rollback("van-gogh")
    registry.unpublish("van-gogh")
    publish(registry, "d2")
    for version in (0, 2, 4):
        with pytest.raises(UserError, match=rf"never published as version {version}: choose one of 1, 3\.$"):
            registry.rollback("van-gogh", version)


@pytest.mark.parametrize("what", ["adapter", "base"])
@pytest.mark.parametrize("damage", ["no artifact", "no file", "another manifest"])
def test_only_what_is_there_is_published(registry, store, what, damage):
    publish(registry, "d1")
    release = put_adapter(store, "van-gogh", "d2")
    folder = release["adapter"] if what == "adapter" else f"bases/{release['base']}"
    if damage == "no file":
        store.delete(next(key for key in store.list(f"{folder}/") if not key.endswith("manifest.json")))
    elif damage == "no artifact":
        store.delete(f"{folder}/manifest.json")
    else:
        store.put(f"{folder}/manifest.json", store.get(f"{folder}/manifest.json").replace(b'"seed": 0', b'"seed": 1'))
    before = store.get("registry/van-gogh.json")
    with pytest.raises(UserError, match=r"^van-gogh is not published: .*run"):
        registry.publish("van-gogh", **release)
    assert store.get("registry/van-gogh.json") == before


@pytest.mark.parametrize("what", ["adapter", "base"])
def test_a_rollback_reads_every_file_first(registry, store, what):
    old, new = publish(registry, "d1"), publish(registry, "d2")
    key = f"{old.adapter}/metrics.json" if what == "adapter" else f"bases/{old.base}/generator.safetensors"
    store.put(key, b"[]")
    with pytest.raises(UserError, match=rf"^van-gogh is not rolled back to version 1: .*{key} is not the file"):
        registry.rollback("van-gogh")
    assert registry.get("van-gogh") == new


def test_an_artifact_collected_while_it_is_published_is_told(store):
    class Collected(LocalStore):
        def put_if_absent(self, key, data):
            for found in self.list("adapters/"):
                self.delete(found)
            return super().put_if_absent(key, data)

    with pytest.raises(UserError, match=r"`farm gc` deleted adapters/ink/\w+ while it was published"):
        Registry(Collected(store.root)).publish("ink", **put_adapter(store, "ink", "d1"))


def test_records_of_old_are_read(registry, store):
    release = put_adapter(store, "van-gogh", "d1", l1=0.5)
    old = {"version": 1, **release, "published_at": "2026-01-01T00:00:00+00:00", "published_by": "host"}
    entry = {**old, "version": 2, "concept": "van-gogh", "history": [old]}
    store.put("registry/van-gogh.json", json.dumps(entry).encode())
    record = registry.get("van-gogh")
    assert (record.version, record.action, record.forced, record.id) == (2, "published", None, "")
    assert publish(registry, "d2").version == 3
    assert registry.rollback("van-gogh").restores == 2


class Model(RuleBasedStateMachine):
    """The registry does what a list of changes would do."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.registry = Registry(LocalStore(self.folder))
        self.changes = []  # (action, name), oldest first

    def teardown(self):
        shutil.rmtree(self.folder)

    @property
    def current(self):
        return self.changes[-1][1] if self.changes and self.changes[-1][0] != "unpublished" else None

    @rule(name=st.sampled_from("abc"))
    def publish(self, name):
        publish(self.registry, name)
        if self.current != name:
            self.changes.append(("published", name))

    @rule()
    def unpublish(self):
        if self.changes:
            self.registry.unpublish("van-gogh")
            if self.current:
                self.changes.append(("unpublished", self.current))

    @rule(to=st.none() | st.integers(1, 8))
    def roll_back(self, to):
        names = {n: name for n, (action, name) in enumerate(self.changes, 1) if action != "unpublished"}
        others = [name for name in names.values() if name != self.current]
        name = (others or [None])[-1] if to is None else names.get(to)
        if name is None:
            with pytest.raises(UserError):
                self.registry.rollback("van-gogh", to)
            return
        self.registry.rollback("van-gogh", to)
        if name != self.current:
            self.changes.append(("rolled-back", name))

    @invariant()
    def same(self):
        record = self.registry.record("van-gogh")
        expected = [(n, action, digest(name)) for n, (action, name) in enumerate(self.changes, 1)]
        assert (told(record) if record else []) == expected
        entry = self.registry.get("van-gogh")
        assert (entry.digest if entry else None) == (self.current and digest(self.current))


def test_it_does_what_a_list_of_changes_would():
    run_state_machine_as_test(Model, settings=settings(max_examples=25, stateful_step_count=12, deadline=None))


def test_racing_publishers_lose_nothing(store):
    def publisher(worker):
        return [publish(Registry(store), f"d-{worker}-{i}").version for i in range(10)]

    with ThreadPoolExecutor(6) as threads:
        versions = [version for result in threads.map(publisher, range(6)) for version in result]
    releases = Registry(store).get("van-gogh").releases
    assert sorted(versions) == [release.version for release in releases] == list(range(1, 61))
    assert {release.digest for release in releases} == {digest(f"d-{w}-{i}") for w in range(6) for i in range(10)}


def test_the_loser_of_a_race_publishes_on_top_of_the_winner(tmp_path):
    class Overtaken(LocalStore):
        def put_if_absent(self, key, data):
            if key.startswith("registry/"):
                publish(Registry(LocalStore(tmp_path)), "first")
            return super().put_if_absent(key, data)

        def replace_if_match(self, key, data, etag):
            if json.loads(data)["version"] == 2:
                publish(Registry(LocalStore(tmp_path)), "second")
            return super().replace_if_match(key, data, etag)

    entry = publish(Registry(Overtaken(tmp_path)), "mine")
    assert [release.digest for release in entry.releases] == [digest(name) for name in ("first", "second", "mine")]
    assert entry.version == 3


def changing(registry, seed, steps):
    """Publish, roll back and unpublish at random; the releases that came of it."""
    draw, made = random.Random(seed), []
    for step in range(steps):
        concept, mine = draw.choice(["ink", "fog"]), f"{seed}-{step}"
        what = draw.choice(["publish", "publish", "rollback", "unpublish"])
        if what == "publish":
            entry = registry.publish(concept, **put_adapter(registry.store, concept, draw.choice("abc")), id=mine)
        else:
            try:
                entry = getattr(registry, what)(concept, id=mine)
            except UserError:  # nothing to roll back to yet
                continue
        if entry.id == mine:
            made.append((concept, entry.releases[-1], entry.history))
    return made


def check(registry, made):
    """Every change is in the record once, at its place, and nothing else is."""
    for concept, record in registry.records().items():
        releases = record.releases
        assert [release.version for release in releases] == list(range(1, len(releases) + 1))
        mine = {release.version: (release, history) for name, release, history in made if name == concept}
        assert len(mine) == sum(name == concept for name, _, _ in made)
        assert mine.keys() == set(range(1, len(releases) + 1))
        for version, (release, history) in mine.items():
            assert releases[version - 1] == release and releases[: version - 1] == history
        for before, after in pairwise(releases):
            assert "unpublished" in (before.action, after.action) or before.digest != after.digest
        assert not any(a.action == b.action == "unpublished" for a, b in pairwise(releases))


def test_racing_publications_rollbacks_and_withdrawals_lose_nothing(store):
    with ThreadPoolExecutor(4) as threads:
        made = [*chain(*threads.map(lambda seed: changing(Registry(store), seed, 15), range(4)))]
    assert len(made) > 30
    check(Registry(store), made)


class Losing(LocalStore):
    """Loses calls, and the answers of calls that were carried out, as a network does."""

    draw = random.Random(0)

    def _lose(self, call, *arguments):
        if self.draw.random() < 0.15:
            raise StoreUnreachableError(self.url)
        answer = call(*arguments)
        if self.draw.random() < 0.3:
            raise StoreUnreachableError(self.url)
        return answer

    def put_if_absent(self, *arguments):
        return self._lose(super().put_if_absent, *arguments)

    def replace_if_match(self, *arguments):
        return self._lose(super().replace_if_match, *arguments)

    def get_with_etag(self, *arguments):
        return self._lose(super().get_with_etag, *arguments)


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(patient, "FIRST_WAIT_SECONDS", 0.0005)
    monkeypatch.setattr(patient, "LONGEST_WAIT_SECONDS", 0.002)


@pytest.mark.usefixtures("hasty")
def test_a_lost_answer_makes_no_second_version(tmp_path):
    losing = Registry(PatientStore(Losing(tmp_path), 60))
    with ThreadPoolExecutor(4) as threads:
        made = [*chain(*threads.map(lambda seed: changing(losing, seed, 12), range(4)))]
    check(Registry(LocalStore(tmp_path)), made)


def test_a_publisher_that_asks_again_finds_its_own_release(tmp_path):
    """Its answer was lost, and others have published on top since."""

    class Lost(LocalStore):
        def replace_if_match(self, *arguments):
            super().replace_if_match(*arguments)
            raise StoreUnreachableError(self.url)

    registry, lost = Registry(LocalStore(tmp_path)), Registry(Lost(tmp_path))
    publish(registry, "a")
    changes = {
        "b": lambda use: use.publish("van-gogh", **put_adapter(use.store, "van-gogh", "b"), id="mine-b"),
        "a": lambda use: use.rollback("van-gogh", id="mine-a"),
        None: lambda use: use.unpublish("van-gogh", id="mine-none"),
    }
    for call in changes.values():
        with pytest.raises(StoreUnreachableError):
            call(lost)
        written = registry.record("van-gogh")
        publish(registry, f"on top of {written.version}")
        assert call(registry) == written
    assert Counter(release.id for release in registry.record("van-gogh").releases).most_common(1)[0][1] == 1
    assert len(registry.record("van-gogh").releases) == 7


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("change", ["publish", "rollback", "unpublish"])
def test_a_killed_publisher_leaves_the_old_version_or_the_new(tmp_path, change, after):
    """Killed before and after each of its calls; what is served is whole, and the same again finishes the work."""

    def work(store):
        registry = Registry(store)
        if change == "publish":
            publish(registry, "d3")
        elif change == "rollback":
            registry.rollback("van-gogh", 1)
        else:
            registry.unpublish("van-gogh")

    seen, calls, dying = set(), 0, True
    while dying:
        store = LocalStore(tmp_path / str(calls))
        registry = Registry(store)
        publish(registry, "d1")
        old = publish(registry, "d2")
        dying = killed(lambda store=store, calls=calls: work(Dying(store, calls, after=after)))
        entry = registry.get("van-gogh")
        seen.add(entry.version if entry else None)
        if entry is None:
            assert change == "unpublish"
        elif entry.version == old.version:
            assert entry == old and dying
        for path in (entry.adapter, f"bases/{entry.base}") if entry else ():
            assert artifacts.verify(store, path) == []
        work(store)
        record = registry.record("van-gogh")
        assert [release.version for release in record.releases] == [1, 2, 3]
        assert record.history[-1].digest == old.digest
        calls += 1
    assert calls > 2 and seen == ({2, None} if change == "unpublish" else {2, 3})


@pytest.mark.parametrize("concept", ["", "Ink", "van gogh", "van--gogh", "-ink", "ink-", "../ink", "a/b", "ínk", "a\n"])
def test_refuses_what_is_no_concept_id(registry, concept):
    release = put_adapter(registry.store, "ink", "d1")
    for call in (
        registry.get,
        registry.record,
        registry.etag,
        registry.rollback,
        registry.unpublish,
        lambda concept: registry.publish(concept, **release),
    ):
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
    release = put_adapter(store, "ink", "d1")
    store.put("registry/ink.json", data)
    for call in (
        registry.get,
        registry.etag,
        registry.rollback,
        registry.unpublish,
        lambda concept: registry.publish(concept, **release),
    ):
        with pytest.raises(UserError, match=r"registry/ink\.json is damaged .* and run again\.$"):
            call("ink")
    assert store.get("registry/ink.json") == data


def test_refuses_metrics_json_has_not(registry):
    with pytest.raises(ValueError, match="not JSON compliant"):
        publish(registry, "d1", psnr=float("nan"))
    assert registry.get("van-gogh") is None
