"""The catalogues that come with the package, held against the paper and the rules in their headers."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import pytest

from farm.catalogue import PACKAGED, Concept, base_concepts, check_concepts, load_catalogue, problems, slug

DATA = Path(os.environ.get("FARM_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
COUNTS = {"ffhq": 260, "scenery": 20}

# E2GAN, appendix B.3.
BASE = """Abstract Art, Bleeding Person, Burning Person, Comic, Leonardo da Vinci painting, Frida Kahlo painting, Hulk,
Joker, Low Quality photo, Manga, Miro painting, Amedeo Modigliani painting, Monet painting, Ancient Egypt Monumental,
Mummy, Munch art, Picasso painting, Pink hair, Pop art, Sketch, Sleeping person, Ukiyo-e style, Wax figure,
Young person"""
RANDOM = """Leonardo da Vinci painting, Gouache, Abstract Murals, Pointillist Portraits, Young person, Op Art, Sand Art,
Cubist Makeup, Romanticism, Futurist Portraits, Hulk, Documentary Photography, Cubist Portraits, Pale person,
Typography Art, Picasso painting, Photorealistic Portraits, Black and White Photography, Quilting, Batman"""
EVALUATION = """Albino person, Angry person, Blond person, Old person, Grey hair, Put on sunglasses, Tan person,
Burning man, Abstract Expressionist Makeup, Watercolor painting, Screen printing, Silver Sculpture, Vincent van Gogh
style, Paul Gauguin painting, Henri Matisse paintings, Jacob Lawrence painting, Chinese Ink painting, Oldtime photo,
Low Quality photo, Green Lantern, White Walker, Hercule Poirot, Ghost Rider, Catwoman, Harley Quinn, Chewbacca from
Star Wars, Obi-wan Kenobi, Zombie, Gamora, Draco Malfoy"""
ELSEWHERE = {"A person with red lip", "Charcoal drawing", "Chalk art"}
# Tables 10, 11 and 14.
SCENERY_EVALUATED = {
    *("Forest in the dark", "Impressionism painting", "Forest in the autumn", "Vangogh style", "Add blossoms"),
    *("Forest in the winter", "Oil painting", "Forest in the spring"),
}


def names(text: str) -> set[str]:
    return {" ".join(name.split()) for name in text.split(",")}


def packaged(name: str) -> list[Concept]:
    concepts, mistakes = check_concepts(load_catalogue(name))
    assert mistakes == []
    return concepts


def in_set(concepts: list[Concept], paper_set: str) -> set[str]:
    return {concept.name for concept in concepts if paper_set in concept.sets}


@pytest.mark.parametrize("name", COUNTS)
def test_a_packaged_catalogue_is_whole(name: str) -> None:
    concepts = packaged(name)
    assert len(concepts) == COUNTS[name]
    assert problems(concepts, base=base_concepts(concepts), complete=True) == []
    for concept in concepts:
        assert concept.id == slug(concept.name)
        assert concept.domain == {"ffhq": "face", "scenery": "scenery"}[name]
        assert concept.editor is None and concept.teachers is None


def test_ids_are_unique_over_both() -> None:
    ids = Counter(concept.id for name in PACKAGED for concept in packaged(name))
    assert ids.most_common(1)[0][1] == 1 and ids.total() == 280


def test_the_sets_of_faces_are_the_papers() -> None:
    faces = packaged("ffhq")
    assert (len(names(BASE)), len(names(RANDOM)), len(names(EVALUATION))) == (24, 20, 30)
    assert in_set(faces, "base") == names(BASE)
    assert in_set(faces, "random") == names(RANDOM)
    assert in_set(faces, "evaluation") == names(EVALUATION)
    assert {concept.name for concept in faces} >= ELSEWHERE


def test_what_is_reserved_is_never_in_the_base() -> None:
    faces, scenery = packaged("ffhq"), packaged("scenery")
    assert set(base_concepts(faces)) == {slug(name) for name in names(BASE) - {"Low Quality photo"}}
    assert [concept.name for concept in faces if concept.reserved and "base" in concept.sets] == ["Low Quality photo"]
    assert in_set(scenery, "base") & in_set(scenery, "evaluation") == set()
    for concepts in (faces, scenery):
        assert not {concept.id for concept in concepts if concept.reserved} & set(base_concepts(concepts))


def test_the_split_of_landscapes() -> None:
    scenery = packaged("scenery")
    assert len(in_set(scenery, "base")) == len(in_set(scenery, "evaluation")) == 10
    assert in_set(scenery, "evaluation") > SCENERY_EVALUATED


@pytest.mark.parametrize("name", COUNTS)
def test_a_concept_is_one_line_below_its_category_which_the_header_explains(name: str) -> None:
    header, *groups = PACKAGED[name].read_text(encoding="utf-8").rstrip().split("\n\n")
    explained = re.findall(r"^# - ([a-z-]+): ", header, re.MULTILINE)
    assert len(groups) == len(explained)
    for category, group in zip(explained, groups, strict=True):
        comment, *lines = group.splitlines()
        assert comment.startswith("# ")
        assert all(re.match(rf"- \{{id: \S+, name: .*, category: {category}, .*\}}$", line) for line in lines)
        assert lines == sorted(lines, key=lambda line: line.split(",")[0])
    assert {concept.category for concept in packaged(name)} == set(explained)


@pytest.mark.parametrize("name", COUNTS)
def test_prompts_and_captions_are_plain_english(name: str) -> None:
    for concept in packaged(name):
        assert concept.captions is not None
        before, after = concept.captions
        assert before == ("a photo of a person" if concept.domain == "face" else "a photo of a landscape")
        assert len(set(before.split()) & set(after.split())) >= 2, after
        for text in (concept.prompt, before, after):
            assert re.fullmatch(r"[A-Za-z0-9,'-]+( [A-Za-z0-9,'-]+)*", text), text
            assert not re.search(r"\ba [aeio]|\ban [^aeioAEIO]|\b(\w+) \1\b", text), text
        assert concept.prompt[0].islower() and after.split()[0] in ("a", "an")


@pytest.mark.parametrize("name", COUNTS)
def test_nothing_is_cut_by_clips_75_tokens(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    bpe = DATA / "clip_bpe"
    if not bpe.is_dir():
        pytest.skip(f"no CLIP vocabulary at {bpe}; set FARM_TEST_DATA")
    tokenizer = transformers.CLIPTokenizer(vocab=str(bpe / "vocab.json"), merges=str(bpe / "merges.txt"))
    assert len(tokenizer("a photo of a person")["input_ids"]) == 5 + 2  # the vocabulary is really there
    texts = [text for c in packaged(name) for text in (c.prompt, c.request.before, c.request.after)]
    assert max(len(ids) - 2 for ids in tokenizer(texts)["input_ids"]) <= 75
