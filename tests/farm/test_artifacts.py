import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farm.artifacts import (
    FileEntry,
    Spec,
    canonical_json,
    commit,
    find,
    open_artifact,
    verify,
)
from farm.errors import IntegrityError, UserError
from farm.store import LocalStore, NotFoundError

FILES = {"part-0000.parquet": b"PAR1" + bytes(range(200)), "part-0001.parquet": b"", "preview.webp": b"RIFF"}


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "store")


def spec(**changes):
    fields = {
        "stage": "edits",
        "version": 1,
        "folder": "edits/charcoal",
        "config": {"strength": 0.5, "prompt": "a charcoal drawing, très noir", "steps": [1, 2], "seed": None},
        "inputs": {"sources": "0f3a"},
        "seed": 7,
    }
    return Spec(**(fields | changes))


def test_the_digest_is_the_hash_of_a_text_anyone_can_write():
    text = (
        '{"config":{"prompt":"a charcoal drawing, très noir","seed":null,"steps":[1,2],"strength":0.5},'
        '"inputs":{"sources":"0f3a"},"seed":7,"stage":"edits","version":1}'
    )
    assert spec().digest == hashlib.sha256(text.encode()).hexdigest()[:32]
    assert spec().digest == "49d7dd15f73ef3d3a350d0e5db25fa06"
    assert spec().path == f"edits/charcoal/{spec().digest}"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
CONFIGS = st.dictionaries(st.text(), JSON, max_size=3)


@settings(deadline=None)
@given(CONFIGS, CONFIGS)
def test_digests_agree_exactly_when_configurations_do(one, other):
    same = repr(_sorted(one)) == repr(_sorted(other))  # repr tells 1, 1.0 and True apart, == does not
    assert (spec(config=one).digest == spec(config=other).digest) == same


@settings(deadline=None)
@given(CONFIGS)
def test_the_digest_survives_the_manifest_and_the_order_of_keys(config):
    first = spec(config=config)
    backwards = dict(reversed(config.items()))
    assert spec(config=backwards).digest == first.digest
    assert spec(config=json.loads(json.dumps(config))).digest == first.digest


def _sorted(value):
    if isinstance(value, dict):
        return [(key, _sorted(value[key])) for key in sorted(value)]
    return [_sorted(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "adapt"},
        {"version": 2},
        {"config": {}},
        {"inputs": {"sources": "0f3b"}},
        {"seed": 8},
        {"inputs": {"source": "0f3a"}},
        {"inputs": {}},
    ],
)
def test_everything_that_decides_the_content_changes_the_digest(change):
    assert spec(**change).digest != spec().digest


def test_the_folder_changes_the_path_only():
    assert spec(folder="edits/ink").digest == spec().digest
    assert spec(folder="edits/ink").path == f"edits/ink/{spec().digest}"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_numbers_json_has_not(value, store):
    with pytest.raises(ValueError, match="not JSON compliant"):
        _ = spec(config={"rate": value}).digest
    with pytest.raises(ValueError, match="not JSON compliant"):
        commit(store, spec(), {}, wall_seconds=1, summary={"loss": value})
    assert find(store, spec().path) is None


def test_canonical_json_sorts_keys_as_the_strings_they_become():
    assert canonical_json({10: (1, 1.0), 9: "é"}) == '{"10":[1,1.0],"9":"é"}'


def test_a_committed_artifact_reads_back(store):
    manifest = commit(
        store, spec(), FILES, wall_seconds=1.5, device_seconds=0.25, summary={"pairs": 3, "failed": ["a"]}
    )
    assert find(store, spec().path) == manifest
    assert manifest.files.keys() == FILES.keys()
    assert manifest.summary == {"pairs": 3, "failed": ["a"]}
    assert (manifest.wall_seconds, manifest.device_seconds) == (1.5, 0.25)
    assert {"torch", "numpy", "ray"} <= manifest.packages.keys()
    assert datetime.fromisoformat(manifest.created_at).utcoffset().total_seconds() == 0
    assert manifest.spec == spec()
    artifact = open_artifact(store, spec().path)
    assert {name: artifact.read(name) for name in FILES} == FILES
    assert verify(store, spec().path) == []
    with pytest.raises(KeyError):
        artifact.read("nothing")


def test_the_manifest_is_plain_json(store):
    commit(store, spec(), FILES, wall_seconds=1)
    manifest = json.loads(store.path(f"{spec().path}/manifest.json").read_text())
    assert manifest["config"] == spec().config
    for name, data in FILES.items():
        assert manifest["files"][name] == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_the_same_spec_gives_the_same_bytes_but_for_the_times(tmp_path):
    manifests = []
    for name in "ab":
        store = LocalStore(tmp_path / name)
        commit(store, spec(), FILES, wall_seconds=ord(name))
        manifests.append(json.loads(store.get(f"{spec().path}/manifest.json")))
        for volatile in ("wall_seconds", "created_at"):
            del manifests[-1][volatile]
    assert json.dumps(manifests[0]) == json.dumps(manifests[1])


class Unread(LocalStore):
    """Gives out manifests only."""

    def get(self, key, at_most=None):
        assert key.endswith("/manifest.json")
        return super().get(key, at_most)


def test_a_file_a_worker_put_and_hashed_is_not_read_again(store):
    files = {"images/part-0000.parquet": FileEntry.of(b"by a worker"), "extra": b"x"}
    with pytest.raises(NotFoundError, match=r"holds no .*/images/part-0000\.parquet"):
        commit(store, spec(), files, wall_seconds=1)
    assert list(store.list()) == []
    store.put(f"{spec().path}/images/part-0000.parquet", b"by a worker")
    manifest = commit(Unread(store.root), spec(), files, wall_seconds=1)
    assert manifest.files["images/part-0000.parquet"].sha256 == hashlib.sha256(b"by a worker").hexdigest()
    assert manifest.files["extra"] == FileEntry.of(b"x")
    assert verify(store, spec().path) == []


def test_whoever_loses_a_race_reads_nothing_when_the_winner_made_the_same(tmp_path):
    class Overtaken(Unread):
        def put_if_absent(self, key, data):
            commit(LocalStore(tmp_path), spec(), FILES, wall_seconds=2)
            return super().put_if_absent(key, data)

    assert commit(Overtaken(tmp_path), spec(), FILES, wall_seconds=1).wall_seconds == 2


def test_commit_writes_the_manifest_itself(store):
    with pytest.raises(ValueError, match=r"manifest\.json"):
        commit(store, spec(), {"manifest.json": b"{}"}, wall_seconds=1)


@pytest.mark.parametrize("survived", range(4))
def test_a_commit_that_dies_before_the_manifest_made_nothing(tmp_path, survived):
    class Dying(LocalStore):
        def put(self, key, data):
            self.count()
            super().put(key, data)

        def put_if_absent(self, key, data):
            self.count()
            return super().put_if_absent(key, data)

        def count(self):
            calls.append(1)
            if len(calls) > survived:
                raise KeyboardInterrupt

    calls = []
    with pytest.raises(KeyboardInterrupt):
        commit(Dying(tmp_path), spec(), FILES, wall_seconds=1)
    store = LocalStore(tmp_path)
    assert len(list(store.list())) == min(survived, len(FILES))
    assert find(store, spec().path) is None
    assert verify(store, spec().path) != []
    with pytest.raises(NotFoundError):
        open_artifact(store, spec().path)
    commit(store, spec(), FILES, wall_seconds=1)
    assert verify(store, spec().path) == []


def test_a_second_commit_changes_nothing(store):
    first = commit(store, spec(), FILES, wall_seconds=1)
    assert commit(store, spec(), {"other": b"bytes"}, wall_seconds=2) == first
    assert not store.exists(f"{spec().path}/other")


def test_racing_commits_agree_on_one_manifest(store):
    def attempt(worker):
        return commit(store, spec(), FILES, wall_seconds=worker)

    with ThreadPoolExecutor(8) as threads:
        manifests = list(threads.map(attempt, range(8)))
    assert all(manifest == manifests[0] for manifest in manifests)
    assert find(store, spec().path) == manifests[0]
    assert verify(store, spec().path) == []


def test_a_late_committer_of_other_bytes_does_not_vouch_for_the_mixture(tmp_path):
    class Overtaken(LocalStore):
        def put_if_absent(self, key, data):
            winner = json.loads(data)
            winner["files"]["weights"]["sha256"] = hashlib.sha256(b"the winner's").hexdigest()
            LocalStore.put_if_absent(self, key, json.dumps(winner).encode())
            return LocalStore.put_if_absent(self, key, data)

    with pytest.raises(IntegrityError, match="weights is not the file"):
        commit(Overtaken(tmp_path), spec(), {"weights": b"the loser's"}, wall_seconds=1)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_one_changed_byte_is_noticed(tmp_path_factory, data):
    store = LocalStore(tmp_path_factory.mktemp("store"))
    content = data.draw(st.binary(min_size=1, max_size=50))
    position = data.draw(st.integers(0, len(content) - 1))
    change = data.draw(st.integers(1, 255))
    commit(store, spec(), {"weights": content, "other": b"x"}, wall_seconds=1)
    tampered = bytearray(content)
    tampered[position] ^= change
    store.path(f"{spec().path}/weights").write_bytes(tampered)
    artifact = open_artifact(store, spec().path)
    with pytest.raises(IntegrityError) as caught:
        artifact.read("weights")
    assert verify(store, spec().path) == [str(caught.value)]
    assert artifact.read("other") == b"x"


def test_damage_is_one_sentence_with_the_place_and_the_fix(store):
    commit(store, spec(), FILES, wall_seconds=1)
    artifact = open_artifact(store, spec().path)
    store.put(f"{spec().path}/preview.webp", b"RIFF and more")
    store.delete(f"{spec().path}/part-0000.parquet")
    fix = f": delete the folder {spec().path} and run again."
    changed = "is not the file that was put there (more than the 4 bytes expected)"
    assert verify(store, spec().path) == [
        f"{store.url}/{spec().path}/part-0000.parquet is missing{fix}",
        f"{store.url}/{spec().path}/preview.webp {changed}{fix}",
    ]
    with pytest.raises(UserError, match=r"preview\.webp"):
        artifact.read("preview.webp")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": 8}, "does not describe its folder"),
        ({"config": {"strength": 0.6}}, "does not describe its folder"),
        ({"digest": "0" * 32}, "does not describe its folder"),
        ({"path": "edits/ink/0"}, "does not describe its folder"),
        ({"surprise": 1}, "is damaged (surprise"),
        ({"seed": "many"}, "is damaged (seed"),
    ],
)
def test_an_edited_manifest_is_refused(store, change, sentence):
    commit(store, spec(), FILES, wall_seconds=1)
    key = f"{spec().path}/manifest.json"
    store.put(key, json.dumps(json.loads(store.get(key)) | change).encode())
    with pytest.raises(IntegrityError) as caught:
        find(store, spec().path)
    assert sentence in str(caught.value)
    assert f"{store.url}/{key}" in str(caught.value)
    assert f"delete the folder {spec().path} and run again." in str(caught.value)
    assert verify(store, spec().path) == [str(caught.value)]


def test_a_truncated_manifest_is_refused(store):
    commit(store, spec(), FILES, wall_seconds=1)
    store.put(f"{spec().path}/manifest.json", b'{"stage": "ed')
    with pytest.raises(IntegrityError, match="is damaged"):
        open_artifact(store, spec().path)
