from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.catalogue import Concept, check_concepts, load_catalogue
from farm.wording import Wording, plain

SAME_NAMES = [
    ("Vincent van Gogh style", "Van Gogh painting"),
    ("Vangogh style", "a painting in the style of van Gogh"),
    ("Henri Matisse paintings", "Henri Matisse"),
    ("Grey hair", "gray hair"),
    ("Sunglasses", "Put on sunglasses"),
    ("Portrait of an old person", "Old person"),
    ("Élisabeth Vigée Le Brun painting", "Vigee Le Brun painting"),
    ("Cubist Makeup", "Cubist make-up"),
    ("Watercolour painting", "Watercolor"),
    ("Old time photo", "Oldtime photo"),
    ("Black and White Photography", "black & white"),
    ("Zombies", "zombie"),
]
OTHER_NAMES = [
    ("Monet painting", "Manet painting"),
    ("Paul Klee painting", "Paul Gauguin painting"),
    ("Pink hair", "Red hair"),
    ("Pink hair", "Pink"),
    ("Burning man", "Burning Person"),
    ("Cubist Makeup", "Cubist Portraits"),
    ("Abstract Art", "Abstract Murals"),
    ("Op Art", "Pop art"),
    ("Oil portrait", "Oil pastel"),
    ("High-key lighting", "Low-key lighting"),
    ("Forest in the winter", "Forest in the dark"),
    ("Art style", "Painting of a person"),
    ("Claude Monet painting", "Monet painting"),  # told apart but for painters
]
SAME_PROMPTS = [
    ("turn the person into a zombie", "make this person a zombie"),
    ("turn him into a zombie", "Make her look like a ZOMBIE!"),
    ("make it a charcoal drawing", "convert this photo to charcoal"),
    ("give the person pink hair", "give him pink hair."),
    ("make it an oil painting with thick strokes", "an oil painting with thick, visible strokes"),
]
OTHER_PROMPTS = [
    ("give the person pink hair", "give the person blue hair"),
    ("paint the person's face like a tiger", "turn the person into a tiger"),
    (
        "a highly detailed painting of a person by Claude Monet, oil on canvas, museum quality, masterpiece",
        "a highly detailed painting of a person by Edouard Manet, oil on canvas, museum quality, masterpiece",
    ),
    ("make it a photo", "turn it into a picture"),
    ("🔥", "❄"),
]


def named(name: str, *, artist: bool = False) -> Wording:
    return Wording(name, f"prompt {sum(name.encode())}", artist=artist)


def prompted(prompt: str) -> Wording:
    return Wording(f"name{sum(prompt.encode())}", prompt, artist=False)


@pytest.mark.parametrize(("one", "other"), SAME_NAMES)
def test_names_of_one_edit(one: str, other: str) -> None:
    assert named(one).repeated_by(named(other)) == f"nearly the same name ({one!r}, {other!r})"


@pytest.mark.parametrize(("one", "other"), OTHER_NAMES)
def test_names_of_two_edits(one: str, other: str) -> None:
    assert named(one).repeated_by(named(other)) == ""


@pytest.mark.parametrize(("one", "other"), SAME_PROMPTS)
def test_prompts_of_one_edit(one: str, other: str) -> None:
    assert prompted(one).repeated_by(prompted(other)) == f"nearly the same prompt ({one!r}, {other!r})"


@pytest.mark.parametrize(("one", "other"), OTHER_PROMPTS)
def test_prompts_of_two_edits(one: str, other: str) -> None:
    assert prompted(one).repeated_by(prompted(other)) == ""


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Claude Monet painting", "Monet painting", True),
        ("Vincent van Gogh style", "Vangogh style", True),
        ("Vincent van Gogh style", "Gogh", True),
        ("Claude Monet painting", "Edouard Manet painting", False),
        ("Peter Paul Rubens painting", "Paul Klee painting", False),
        ("Frida Kahlo painting", "Frida Kahlo headdress with flowers", False),
        ("Titian painting", "Titian red hair", False),
    ],
)
def test_a_painter_is_one_with_and_without_first_names(one: str, other: str, same: bool) -> None:
    assert bool(named(one, artist=True).repeated_by(named(other))) is same
    assert bool(named(other).repeated_by(named(one, artist=True))) is same


def test_the_same_prompt_but_for_case_articles_and_marks() -> None:
    said = "make it a charcoal drawing"
    for again in (said, "Make it: charcoal DRAWING!", "make it the charcoal drawing"):
        assert prompted(said).repeated_by(prompted(again)) == f"the same prompt {said!r}"


def test_plain() -> None:
    assert plain("Élisabeth’s ÀRT") == "elisabeths art"


WORDS = ["the", "of", "painting", "red", "blue", "hair", "van", "gogh", "vangogh", "monet"]
texts = st.lists(st.sampled_from(WORDS), max_size=5).map(" ".join)


@given(one=texts, other=texts, artist=st.booleans())
def test_likeness_goes_both_ways(one: str, other: str, artist: bool) -> None:
    first, second = (Wording(f"n{text}", text, artist=artist) for text in (one, other))
    assert bool(first.repeated_by(second)) == bool(second.repeated_by(first))


def packaged_faces() -> list[Concept]:
    return check_concepts(load_catalogue("ffhq"))[0]


@given(st.sampled_from(packaged_faces()))
def test_packaged_concepts_in_other_words(concept: Concept) -> None:
    said = Wording(concept.title, concept.prompt, artist=False)
    renamed = Wording(f"A picture of {concept.title.upper()}", "none of these words", artist=False)
    shouted = Wording("nothing alike", f"{concept.prompt.upper()}!!", artist=False)
    reworded = Wording("nothing alike", f"Transform this portrait: {concept.prompt}.", artist=False)
    assert said.repeated_by(renamed).startswith("nearly the same name")
    assert said.repeated_by(shouted).startswith("the same prompt")
    assert said.repeated_by(reworded).startswith("nearly the same prompt")
