"""What teachers do for a concept: compared, editing, and editing again what was bad; step by step, without Ray."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
from stage_farm import DOCUMENT, contents, copied, plan_of
from tiny_onnx import unchanged

from e2gan.pairs import Image, read_table
from farm.artifacts import Manifest, find, open_artifact, verify
from farm.editors import Failed, ProceduralSettings, Prompt, edit_seed, open_editor
from farm.errors import IntegrityError, UserError
from farm.plan import Plan
from farm.stages import units
from farm.stages.ingest import read_images
from farm.stages.quality import edited_pairs
from farm.stages.represent import choose_base
from farm.stages.select import selected_ids
from farm.stages.teach import advance, teach
from farm.stages.units import Unit, Worker, edited_ids
from farm.standing import base_concepts, quarantined, usable
from farm.store import LocalStore, Store

Bad = Callable[[str, int], bool]
"""Whether an image's attempt is bad."""


@pytest.fixture
def store(root: Path, tmp_path: Path) -> LocalStore:
    """A farm whose photos are chosen and not yet edited."""
    return copied(root, tmp_path / "farm", "sources", "selections")


def plan_for(store: LocalStore, **changes: Any) -> Plan:
    return plan_of(store.root, **changes)


def committed(store: Store, path: str) -> Manifest:
    manifest = find(store, path)
    assert manifest is not None
    return manifest


def images_of(store: Store, path: str) -> dict[str, Image]:
    artifact = open_artifact(store, path)
    names = sorted(name for name in artifact.manifest.files if name.startswith("images/"))
    return {key: image for name in names for key, image in read_table(artifact.read(name)).items()}


@pytest.mark.parametrize("concept", ["charcoal", "sepia"])
def test_edits_are_the_teachers(store: LocalStore, concept: str) -> None:
    plan = plan_for(store)
    teach(store, plan, concept, Worker(store, plan))
    photos, edits = images_of_sources(store, plan), images_of(store, plan.edits(concept).path)
    assert list(edits) == edited_ids(store, plan)
    teacher = open_editor(ProceduralSettings(), concept)
    prompt = plan.config.concept(concept).request
    for image_id in [*list(edits)[:3], list(edits)[-1]]:
        (wanted,) = teacher.edit([photos[image_id]], prompt, [edit_seed(0, concept, image_id)])
        assert not isinstance(wanted, Failed)
        np.testing.assert_array_equal(edits[image_id], wanted)
    for spec in (plan.edits(concept), plan.quality(concept)):
        assert verify(store, spec.path) == []


def images_of_sources(store: Store, plan: Plan) -> dict[str, Image]:
    return read_images(open_artifact(store, plan.sources.path))


def test_a_lost_unit_is_made_again_alone(store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_IMAGES", 8)
    plan = plan_for(store)
    todo = advance(store, plan, "sepia")
    assert [len(unit.ids) for unit in todo] == [8, 8, 8, 3]
    worker = Worker(store, plan)
    teach(store, plan, "sepia", worker)
    before = contents(store.root)
    whole, parted = (images_of(s, plan.edits("sepia").path) for s in (LocalStore(root), store))
    assert list(parted) == list(whole) and all(np.array_equal(parted[i], whole[i]) for i in whole)

    store.delete(todo[2].receipt_key)
    store.delete(f"{plan.edits('sepia').path}/manifest.json")
    store.delete(f"{plan.quality('sepia').path}/manifest.json")
    assert advance(store, plan, "sepia") == [todo[2]]
    worker.work(todo[2])
    assert advance(store, plan, "sepia") == []
    after = contents(store.root)
    assert after.keys() == before.keys()
    changed = {key.rpartition("/")[2] for key in before if after[key] != before[key]}
    assert changed <= {"manifest.json", "part-00002.json"}  # what something cost is never the same


@dataclass(frozen=True)
class Watched(LocalStore):
    """Notes what is read and written, and dies after so many writes."""

    most: int = 10**9
    read: list[str] = field(default_factory=list, compare=False)
    written: list[str] = field(default_factory=list, compare=False)

    def get(self, key: str, at_most: int | None = None) -> bytes:
        self.read.append(key)
        return super().get(key, at_most)

    def put(self, key: str, data: bytes) -> None:
        if len(self.written) == self.most:
            raise KeyboardInterrupt
        self.written.append(key)
        super().put(key, data)


def test_a_receipt_comes_last_and_tells_what_was_put(store: LocalStore) -> None:
    plan = plan_for(store)
    (unit,) = advance(store, plan, "sepia")
    names = [*unit.files, f"receipts/{unit.name}.json"]
    for survived in range(3):
        with pytest.raises(KeyboardInterrupt):
            Worker(Watched(store.root, survived), plan).work(unit)
        assert list(store.list(unit.folder)) == [f"{unit.folder}/{name}" for name in names[:survived]]
        assert advance(store, plan, "sepia") == [unit]
    watched = Watched(store.root)
    Worker(watched, plan).work(unit)
    assert watched.written == [f"{unit.folder}/{name}" for name in names]
    written = json.loads(store.get(f"{unit.folder}/{names[2]}"))
    assert written["failed"] == 0 and written["seconds"] >= 0
    for name in unit.files:
        data = store.get(f"{unit.folder}/{name}")
        assert written["files"].pop(name) == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert not written["files"]

    driver = Watched(store.root)
    assert advance(driver, plan, "sepia") == []
    assert not [key for key in driver.read if "/images/" in key], "images never pass through the driver"
    assert verify(store, unit.folder) == []
    assert names[2] not in open_artifact(store, unit.folder).manifest.files


def test_a_unit_done_by_another_meanwhile_is_left_as_it_is(store: LocalStore) -> None:
    plan = plan_for(store)
    (unit,) = advance(store, plan, "sepia")
    Worker(store, plan).work(unit)
    late = Watched(store.root)
    Worker(late, plan).work(unit)
    assert late.written == []


def test_damaged_receipts_and_measures_are_named_with_what_to_delete(store: LocalStore) -> None:
    plan = plan_for(store)
    (unit,) = advance(store, plan, "sepia")
    Worker(store, plan).work(unit)
    sound = store.get(unit.receipt_key)
    for damaged in (b"", sound[:-20], sound.replace(b"sha256", b"md5")):
        store.put(unit.receipt_key, damaged)
        with pytest.raises(IntegrityError, match=r"/receipts/part-00000\.json is damaged .*: delete it and run"):
            advance(store, plan, "sepia")
    store.delete(unit.receipt_key)
    assert advance(store, plan, "sepia") == [unit]

    Worker(store, plan).work(unit)
    measures = f"{unit.folder}/{unit.files[1]}"
    store.put(measures, b"PAR1 and then nothing")
    fix = f"delete {unit.receipt_key} and, if it is there, {unit.folder}/manifest.json, and run again."
    with pytest.raises(IntegrityError, match=r"measures/part-00000\.parquet is damaged ") as caught:
        advance(store, plan, "sepia")
    assert str(caught.value).endswith(fix)
    for key in (measures, unit.receipt_key, f"{unit.folder}/manifest.json"):
        store.delete(key)
    assert advance(store, plan, "sepia") == [unit]
    teach(store, plan, "sepia", Worker(store, plan))
    assert verify(store, unit.folder) == []


class Sabotaged:
    """A seeded teacher: the charcoal filter, but the photo itself where `bad` says so. Knows images by their seeds."""

    def __init__(self, plan: Plan, ids: Sequence[str], bad: Bad) -> None:
        self.filter = open_editor(ProceduralSettings(), "charcoal")
        self.seeds = {
            edit_seed(plan.config.seed, "sepia", image_id, attempt): (image_id, attempt)
            for image_id in ids
            for attempt in range(4)
        }
        self.bad = bad
        self.calls: Counter[str] = Counter()

    def edit(self, images: Sequence[Image], prompt: Prompt, seeds: Sequence[int]) -> list[Image | Failed]:
        edits = self.filter.edit(images, prompt, seeds)
        for place, seed in enumerate(seeds):
            image_id, attempt = self.seeds[seed]
            self.calls[image_id] += 1
            if self.bad(image_id, attempt):
                edits[place] = images[place]
        return edits


def taught(store: LocalStore, monkeypatch: pytest.MonkeyPatch, bad: Bad, **changes: Any) -> tuple[Plan, Sabotaged]:
    """Have a sabotaged teacher edit for `sepia`."""
    monkeypatch.setattr(ProceduralSettings, "seeded", True)
    plan = plan_for(store, **changes)
    teacher = Sabotaged(plan, edited_ids(store, plan), bad)
    monkeypatch.setattr(units, "open_editor", lambda *_: teacher)
    teach(store, plan, "sepia", Worker(store, plan))
    return plan, teacher


def test_bad_edits_are_made_again_with_new_seeds(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = edited_ids(store, plan_for(store))
    once, twice, always = ids[3], ids[10], ids[20]
    lasting = {once: 1, twice: 2, always: 9}
    plan, teacher = taught(store, monkeypatch, lambda image_id, attempt: attempt < lasting.get(image_id, 0))
    assert teacher.calls == Counter(dict.fromkeys(ids, 1) | {once: 2, twice: 3, always: 3})

    manifest = committed(store, plan.quality("sepia").path)
    assert verify(store, manifest.path) == []
    facts = manifest.summary
    assert (facts["images"], facts["good"], facts["attempts"], facts["rescued"]) == (27, 26, 5, 2)
    assert facts["left_out"].keys() == {always} and "no-op" in facts["left_out"][always]
    assert facts["reasons"] == dict.fromkeys(facts["left_out"][always], 1)
    assert facts["quarantined"] is None and quarantined(store, plan, "sepia") is None
    table = pq.read_table(io.BytesIO(store.get(f"{manifest.path}/quality.parquet"))).to_pylist()
    rows = {row["id"]: row for row in table}
    assert {i: row["attempts"] for i, row in rows.items() if row["attempts"] > 1} == {once: 2, twice: 3, always: 3}
    assert [i for i, row in rows.items() if not row["good"]] == [always]

    # Learned from is the filter's edit of every image, the retried ones too, without the one left out.
    photos = images_of_sources(store, plan)
    for split, chosen in selected_ids(store, plan).items():
        pairs = edited_pairs(store, plan, "sepia", split)
        assert list(pairs.ids) == [i for i in chosen if i != always]
        for image_id, target in zip(pairs.ids, pairs.target, strict=True):
            attempt = min(2, lasting.get(image_id, 0))
            seed = edit_seed(0, "sepia", image_id, attempt)
            (wanted,) = teacher.filter.edit([photos[image_id]], plan.config.concept("sepia").request, [seed])
            assert not isinstance(wanted, Failed)
            np.testing.assert_array_equal(target.permute(1, 2, 0).numpy(), wanted)


def test_retries_resume_where_they_stopped(store: LocalStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Killed after every unit, the same is made as without, and nothing twice."""
    ids = edited_ids(store, plan_for(store))

    def bad(image_id: str, attempt: int) -> bool:
        return image_id in ids[:6] and attempt < 2

    plan, teacher = taught(store, monkeypatch, bad)
    other = LocalStore(tmp_path / "other")
    for key in store.list():
        if key.startswith(("sources/", "selections/")):
            other.put(key, store.get(key))
    before = Counter(teacher.calls)
    while todo := advance(other, plan, "sepia"):
        Worker(other, plan).work(todo[0])
    assert teacher.calls - before == before
    for spec in (plan.edits("sepia"), plan.quality("sepia")):
        assert committed(other, spec.path).files == committed(store, spec.path).files


def test_other_limits_judge_the_same_edits_again(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, teacher = taught(store, monkeypatch, lambda image_id, attempt: False)
    calls = Counter(teacher.calls)
    lenient = plan_for(store, quality={"min_good": 0.1})
    assert lenient.edits("sepia").digest == plan.edits("sepia").digest
    teach(store, lenient, "sepia", Worker(store, lenient))
    assert teacher.calls == calls
    assert find(store, lenient.quality("sepia").path) is not None


def test_a_hopeless_concept_is_quarantined_without_further_attempts(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, teacher = taught(store, monkeypatch, lambda image_id, attempt: True)
    assert set(teacher.calls.values()) == {1}
    reason = quarantined(store, plan, "sepia")
    assert reason is not None and reason.startswith("only 0 of 27 edits are good") and "27 no-op" in reason
    assert usable(store, plan, ["charcoal", "sepia"]) == ["charcoal"]


def test_a_split_with_too_few_good_edits_is_quarantined(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled = selected_ids(store, plan_for(store))["validation"][1:]
    plan, _ = taught(store, monkeypatch, lambda image_id, attempt: image_id in spoiled)
    assert quarantined(store, plan, "sepia") == "1 of its validation edits are good, at least 2 are needed"


def test_failed_edits_are_no_pictures_and_never_learned_from(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = edited_ids(store, plan_for(store))

    class Blanking(Sabotaged):
        def edit(self, images: Sequence[Image], prompt: Prompt, seeds: Sequence[int]) -> list[Image | Failed]:
            edits = super().edit(images, prompt, seeds)
            flagged = [self.seeds[seed][0] in ids[:2] for seed in seeds]
            return [Failed("the safety checker blanked it") if f else e for f, e in zip(flagged, edits, strict=True)]

    monkeypatch.setattr("test_teaching.Sabotaged", Blanking)
    plan, _ = taught(store, monkeypatch, lambda image_id, attempt: False)
    edits, checked = committed(store, plan.edits("sepia").path), committed(store, plan.quality("sepia").path)
    assert edits.summary["failed"] == 2
    assert not set(ids[:2]) & images_of(store, edits.path).keys()
    assert checked.summary["left_out"] == {i: ["failed"] for i in ids[:2]}
    assert not set(ids[:2]) & set(edited_pairs(store, plan, "sepia", "train").ids)


def comparing(store: LocalStore, tmp_path: Path, *names: str) -> Plan:
    """Sepia's teacher is chosen among these."""
    teachers = {
        "ink": {"kind": "procedural", "style": "charcoal"},
        "brown": {"kind": "procedural", "style": "sepia"},
        "nothing": unchanged(tmp_path / "unchanged.onnx"),
        "still-nothing": unchanged(tmp_path / "unchanged.onnx"),
    }
    catalogue = [dict(concept) for concept in DOCUMENT["catalogue"]]
    catalogue[3] = {"id": "sepia", "prompt": "sepia", "teachers": list(names)}
    return plan_for(store, catalogue=catalogue, teachers=teachers, comparison={"probes": 5})


def test_the_best_teacher_edits_the_rest(store: LocalStore, tmp_path: Path) -> None:
    plan = comparing(store, tmp_path, "nothing", "ink")
    first = advance(store, plan, "sepia")
    assert [(unit.teacher, len(unit.ids)) for unit in first] == [("nothing", 5), ("ink", 5)]
    assert set(first[0].ids) <= set(selected_ids(store, plan)["train"]) and first[0].ids == first[1].ids
    worker = Worker(store, plan)
    teach(store, plan, "sepia", worker, goal="comparison")
    assert find(store, plan.edits("sepia").path) is None
    manifest = committed(store, plan.comparison("sepia").path)
    assert verify(store, manifest.path) == [] and manifest.summary == {"teacher": "ink", "images": 10}
    choice = json.loads(store.get(f"{manifest.path}/choice.json"))
    assert choice["teacher"] == "ink" and list(choice["scores"]) == ["nothing", "ink"]
    assert choice["scores"]["nothing"]["good"] == 0 and choice["scores"]["ink"]["good"] == 1
    sheet = PIL.Image.open(io.BytesIO(store.get(f"{manifest.path}/sheet.webp")))
    assert sheet.size == (5 * 128 + 4 * 2, 3 * 128 + 2 * 2)  # photos, and a row a teacher

    teach(store, plan, "sepia", worker)
    assert committed(store, plan.edits("sepia").path).summary["teacher"] == "ink"
    edits, photos = images_of(store, plan.edits("sepia").path), images_of_sources(store, plan)
    image_id = next(iter(edits))
    request = plan.config.concept("sepia").request
    ink = open_editor(ProceduralSettings(style="charcoal"), "sepia")
    (wanted,) = ink.edit([photos[image_id]], request, [edit_seed(0, "sepia", image_id)])
    np.testing.assert_array_equal(edits[image_id], np.asarray(wanted))


def test_without_a_good_teacher_nothing_more_is_edited(store: LocalStore, tmp_path: Path) -> None:
    plan = comparing(store, tmp_path, "nothing", "still-nothing")
    teach(store, plan, "sepia", Worker(store, plan))
    assert find(store, plan.edits("sepia").path) is None
    reason = quarantined(store, plan, "sepia")
    assert reason is not None and reason.startswith("none of its teachers makes good edits")


def test_a_teacher_that_cannot_be_opened_is_named_by_its_key(store: LocalStore, tmp_path: Path) -> None:
    plan = comparing(store, tmp_path, "nothing", "ink")
    (tmp_path / "unchanged.onnx").unlink()
    (nothing, ink), worker = advance(store, plan, "sepia"), Worker(store, plan)
    for _ in range(2):
        with pytest.raises(UserError, match=r"^teachers\.nothing\.path: there is no file .*unchanged\.onnx; "):
            worker.work(nothing)
    worker.work(ink)
    assert advance(store, plan, "sepia") == [nothing]


def test_the_base_learns_representatives(root: Path, tmp_path: Path) -> None:
    store = copied(root, tmp_path / "farm", "sources", "selections", "edits", "quality")
    plan = plan_for(store, base={"representatives": 2})
    assert base_concepts(store, plan) == []
    manifest = choose_base(store, plan)
    chosen = base_concepts(store, plan)
    assert chosen == manifest.summary["concepts"] and len(chosen) == 2
    assert set(chosen) <= {"charcoal", "cyanotype", "sepia"}  # night is searched
    assert "cyanotype" in chosen  # the blue one is far from the two grey and brown ones
    assert choose_base(store, plan) == manifest


def test_units_are_cut_evenly_and_named_in_order() -> None:
    ids = [f"photo-{n:03d}" for n in range(120)]
    cut = units.cut_units("sepia", "ink", "edits/sepia/0", "part", ids)
    assert [unit.name for unit in cut] == ["part-00000", "part-00001", "part-00002"]
    assert [image_id for unit in cut for image_id in unit.ids] == ids
    assert isinstance(cut[0], Unit) and hash(cut[0]) != hash(cut[1])
