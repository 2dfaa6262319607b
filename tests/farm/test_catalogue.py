from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from farm.catalogue import Concept, find_concept, near
from farm.errors import UserError


def concept(concept_id: str, **options: Any) -> Concept:
    document = {"id": concept_id, "prompt": "a prompt", "editor": {"kind": "procedural"}, **options}
    return Concept.model_validate(document)


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


@pytest.mark.parametrize("wrong", [{"prompt": ""}, {"prompt": "x" * 1001}, {"domain": "pets"}, {"weight": 1}])
def test_wrong_concepts_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        concept("ink", **wrong)


def test_concepts_are_found_by_id() -> None:
    concepts = [concept("sepia"), concept("fog")]
    assert find_concept(concepts, "fog", key="concept") is concepts[1]
    with pytest.raises(UserError, match=r"^base\.concepts: there is no concept 'seppia' .*; did you mean sepia\?$"):
        find_concept(concepts, "seppia", key="base.concepts")
    with pytest.raises(UserError, match=r"'x' in the catalogue; there are fog, sepia\.$"):
        find_concept(concepts, "x", key="concept")
    with pytest.raises(UserError, match=r"there are none\.$"):
        find_concept([], "x", key="concept")


@given(words=st.sets(st.text("abc", min_size=1, max_size=8), max_size=6), word=st.text("abc", max_size=8))
def test_a_hint_names_words_that_are_there(words: set[str], word: str) -> None:
    hint = near(word, words)
    named = hint.removeprefix("did you mean ").removeprefix("there are ").rstrip(".?")
    assert set(named.replace(" or ", ", ").split(", ")) <= words | {"none"}
    assert (word not in words) or word in hint
