from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from farm.catalogue import (
    PACKAGED,
    Concept,
    base_concepts,
    check_concepts,
    find_concept,
    load_catalogue,
    near,
    problems,
    repeats,
    slug,
)
from farm.editors.base import Prompt
from farm.errors import UserError


def concept(concept_id: str, **options: Any) -> Concept:
    return Concept.model_validate({"id": concept_id, "prompt": f"make it {concept_id}", **options})


def test_a_concept_is_scenery_unless_told_otherwise() -> None:
    assert concept("sepia").domain == "scenery"
    assert concept("old-age", domain="face").domain == "face"


@pytest.mark.parametrize("concept_id", ["a", "van-gogh", "1980s-film", "x" * 80])
def test_ids(concept_id: str) -> None:
    assert concept(concept_id).id == concept_id


@pytest.mark.parametrize(
    "concept_id", ["", "Ink", "van gogh", "van--gogh", "-ink", "ink-", "a/b", "../a", "ínk", "a\n", "x" * 81]
)
def test_other_ids_are_refused(concept_id: str) -> None:
    with pytest.raises(ValidationError):
        concept(concept_id)


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"id": "Old Person"}, "'Old Person': id: an id is lower-case words and digits joined by single hyphens, not "),
    ({"id": 1980}, "entry 2: id: should be a valid string, not 1980."),
    ({"id": ...}, "entry 2: the key id is missing."),
    ({"prompt": ...}, "'ink': the key prompt is missing."),
    ({"prompt": ""}, "'ink': prompt: String should have at least 1 character, not ''."),
    ({"prompt": " \n"}, "'ink': prompt: it is blank, not "),
    ({"prompt": "x" * 1001}, "'ink': prompt: String should have at most 1000 characters"),
    ({"promt": "x"}, "'ink': unknown key promt; did you mean prompt?"),
    ({"domain": "pets"}, "'ink': domain: should be 'face' or 'scenery', not 'pets'."),
    ({"category": "Hair"}, "'ink': category: an id is lower-case"),
    ({"sets": ["test"]}, "'ink': sets.0: should be 'base', 'random' or 'evaluation', not 'test'."),
    ({"sets": "base"}, "'ink': sets: should be a valid tuple, not 'base'."),
    ({"captions": ["a photo"]}, "'ink': captions: there are two, of the photo and of the edited photo."),
    ({"captions": ["a", "b", "c"]}, "'ink': captions: there are two, of the photo and of the edited photo."),
    ({"captions": ["a photo", ""]}, "'ink': captions.1: String should have at least 1 character, not ''."),
    ({"editor": {"kind": "procedural", "stile": "ink"}}, "'ink': unknown key editor.procedural.stile; remove it."),
    (
        {"editor": {"kind": "procedural"}, "teachers": ["sd"]},
        "'ink': editor and teachers exclude each other: remove one of them.",
    ),
]


@pytest.mark.parametrize(("wrong", "told"), MISTAKES)
def test_a_mistake_is_one_sentence_and_the_other_concepts_stand(wrong: dict[str, Any], told: str) -> None:
    entry = {key: value for key, value in {"id": "ink", "prompt": "make it ink", **wrong}.items() if value is not ...}
    concepts, mistakes = check_concepts([{"id": "fog", "prompt": "add fog"}, entry])
    assert [c.id for c in concepts] == ["fog"]
    assert len(mistakes) == 1
    assert mistakes[0].startswith(told) and mistakes[0][-1] in ".?" and "\n" not in mistakes[0]
    with pytest.raises(ValidationError):
        Concept.model_validate(entry)


def test_every_mistake_is_told() -> None:
    _, mistakes = check_concepts([{"id": "A", "domain": "pets"}, {"id": "b", "prompt": "b"}, {"weight": 1}])
    assert [mistake.partition(":")[0] for mistake in mistakes] == ["'A'"] * 3 + ["entry 3"] * 3


def test_what_teachers_are_asked_for() -> None:
    captions = ("a photo of a person", "a photo of a sad person")
    sad = concept("sad-person", prompt="make the person sad", captions=captions, domain="face")
    assert sad.request == Prompt(instruction="make the person sad", before=captions[0], after=captions[1])
    for domain, photo in (("face", "a photo of a person"), ("scenery", "a photo of a landscape")):
        fog = concept("fog", prompt="add fog", domain=domain)
        assert fog.request == Prompt(instruction="add fog", before=photo, after="add fog")


def test_titles_and_reserves() -> None:
    assert concept("old-person").title == "old person"
    assert concept("old-person", name="Old person").title == "Old person"
    concepts = [
        concept("a", sets=["base"]),
        concept("b", sets=["base", "random"]),
        concept("c", sets=["evaluation", "base"]),
        concept("d", sets=["evaluation"]),
        concept("e", sets=["random"]),
    ]
    assert [c.id for c in concepts if c.reserved] == ["c", "d"]
    assert base_concepts(concepts) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("Élisabeth Vigée Le Brun painting", "elisabeth-vigee-le-brun-painting"),
        ("Frankenstein's monster", "frankensteins-monster"),
        ("  Obi-wan   Kenobi! ", "obi-wan-kenobi"),
        ("1970s / snapshot", "1970s-snapshot"),
        ("火", ""),
    ],
)
def test_the_id_of_a_name(name: str, wanted: str) -> None:
    assert slug(name) == wanted


@given(st.text(max_size=30))
def test_the_id_of_a_name_is_an_id(name: str) -> None:
    made = slug(name)
    assert slug(made) == made
    if made:
        assert concept(made).id == made


def test_reading_a_list(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("# mine\n- {id: fog, prompt: add fog}\n- id: ink\n  prompt: 'make it ink'\n")
    assert load_catalogue(path) == load_catalogue(str(path))
    assert load_catalogue(path) == [{"id": "fog", "prompt": "add fog"}, {"id": "ink", "prompt": "make it ink"}]
    path.write_text("# nothing yet\n")
    assert load_catalogue(path) == []
    assert load_catalogue("scenery") == load_catalogue(PACKAGED["scenery"])


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"- {id: fog", r"is not YAML at line 2: "),
        (b"- 2024-13-45", r"is not YAML: month must be in 1..12"),
        (b"- \xff", r"is not UTF-8 text; save it as such"),
        (
            b"catalogue:\n- {id: fog, prompt: add fog}\n",
            r"a catalogue is a list of concepts; write each as a line such",
        ),
        (b"just text", r"a catalogue is a list of concepts"),
        (b"- {id: fog, prompt: add fog}\n- zombie\n", r"entry 2 is not a mapping of keys; write it as `- \{id: "),
    ],
)
def test_a_file_that_is_no_list_of_concepts(tmp_path: Path, data: bytes, told: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(data + b"\n")
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: {told}[^\n]*\.$"):
        load_catalogue(path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError, match=r": cannot be read \(.*\); give ffhq, scenery or the path of a YAML list"):
            load_catalogue(path)


def test_problems_are_told_one_by_one() -> None:
    concepts = [
        concept("fog", category="weather", name="Fog", captions=["a photo", "a photo in fog"]),
        concept("fog", prompt="add a thick fog"),
        concept("mist", prompt="Add thick FOG!"),
        concept("low-quality", sets=["base", "evaluation"]),
        concept("snow", sets=["evaluation"]),
    ]
    assert problems(concepts) == [
        "the id 'fog' occurs 2 times; ids must be unique.",
        "'fog' and 'mist' have the same prompt 'add a thick fog'; keep one of them.",
    ]
    assert problems(concepts[3:], base=["low-quality", "rain"]) == [
        "'low-quality' is reserved for evaluation; take it out of the base's concepts."
    ]
    assert problems(concepts[::3], complete=True) == ["'low-quality' has no name, category, captions."]


def test_a_concept_repeats_others_of_its_domain() -> None:
    fog, mist = concept("fog", prompt="add fog"), concept("mist", prompt="add some mist")
    others = [fog, mist, concept("haze", prompt="add fog", domain="face")]
    assert repeats(concept("fog", prompt="make it ink"), others) == [(fog, "the same id")]
    assert repeats(concept("thick-air", prompt="Add the fog."), others) == [(fog, "the same prompt 'Add the fog.'")]
    assert repeats(concept("snow"), others) == []
    assert problems(others) == []


def test_concepts_are_found_by_id() -> None:
    concepts = [concept("sepia"), concept("fog")]
    assert find_concept(concepts, "fog", key="concept") is concepts[1]
    with pytest.raises(UserError, match=r"^base\.concepts: there is no concept 'seppia' .*; did you mean sepia\?$"):
        find_concept(concepts, "seppia", key="base.concepts")
    with pytest.raises(UserError, match=r"'x' in the catalogue; there are fog, sepia\.$"):
        find_concept(concepts, "x", key="concept")
    with pytest.raises(UserError, match=r"there are none\.$"):
        find_concept([], "x", key="concept")


def test_hints_in_a_long_list() -> None:
    words = [f"word-{number:02}" for number in range(40)]
    assert near("zzz", words) == f"there are {', '.join(words[:10])}, 30 more."
    names = ["vincent-van-gogh-style", "vangogh-style", *words]
    assert near("van-gogh", names) == "did you mean vangogh-style or vincent-van-gogh-style?"


@given(words=st.sets(st.text("abc", min_size=1, max_size=8), max_size=6), word=st.text("abc", max_size=8))
def test_a_hint_names_words_that_are_there(words: set[str], word: str) -> None:
    hint = near(word, words)
    named = hint.removeprefix("did you mean ").removeprefix("there are ").rstrip(".?")
    assert set(named.replace(" or ", ", ").split(", ")) <= words | {"none"}
    assert (word not in words) or word in hint
