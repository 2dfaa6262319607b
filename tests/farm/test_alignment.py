"""Which tokens of two captions belong together, held against brute force and the tokenizer's own offsets."""

from __future__ import annotations

import os
import re
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_diffusers import clip_tokenizer
from torch import Tensor

from farm.editors.alignment import align, read_words, token_map
from farm.errors import UserError

LENGTH = 77
WORDS = st.sampled_from(["a", "of", "man", "zombie", "face", "photo,", "in", "style"])
CAPTIONS = st.lists(WORDS, min_size=1, max_size=12).map(" ".join)


@cache
def tiny_tokenizer() -> Any:
    """A token a letter."""
    return clip_tokenizer()


@pytest.fixture(scope="module")
def clip() -> Any:
    """The real vocabulary: a token a common word, several a rare one."""
    from transformers import CLIPTokenizer

    folder = Path(os.environ.get("FARM_TEST_DATA", Path(__file__).parents[3] / "shared/data")) / "clip_bpe"
    if not folder.is_dir():
        pytest.skip(f"no CLIP vocabulary at {folder}; set FARM_TEST_DATA")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = LENGTH
    assert len(tokenizer) == 49408
    return tokenizer


def columns_of(tokenizer: Any, caption: str, phrase: str) -> list[int]:
    """Places of the tokens that lie inside any occurrence of a phrase, by the tokenizer's character offsets."""
    spans = [found.span() for found in re.finditer(rf"(?<!\w){re.escape(phrase)}(?!\w)", caption)]
    offsets = tokenizer(caption, return_offsets_mapping=True)["offset_mapping"]
    return [
        place
        for place, (begin, end) in enumerate(offsets)
        if end > begin and any(first <= begin and end <= last for first, last in spans)
    ]


def end_of(tokenizer: Any, caption: str) -> int:
    return len(tokenizer(caption)["input_ids"]) - 1


def longest_common(old: list[str], new: list[str]) -> int:
    """By trying every subsequence of one."""

    def occurs(chosen: tuple[str, ...]) -> bool:
        rest = iter(new)
        return all(item in rest for item in chosen)

    return max(n for n in range(len(old) + 1) if any(occurs(chosen) for chosen in combinations(old, n)))


@settings(max_examples=200, deadline=None)
@given(old=st.lists(st.sampled_from("abc"), max_size=7), new=st.lists(st.sampled_from("abc"), max_size=7))
def test_the_alignment_is_a_longest_common_subsequence(old: list[str], new: list[str]) -> None:
    counterparts = align(old, new)
    matched = [(i, j) for j, i in enumerate(counterparts) if i is not None]
    assert all(old[i] == new[j] for i, j in matched)
    assert all(one < other for (one, _), (other, _) in pairwise(matched))
    assert len(matched) == longest_common(old, new)


def test_of_equal_alignments_the_earliest() -> None:
    assert align(list("ab"), list("abb")) == [0, 1, None]
    assert align(list("abb"), list("ab")) == [0, 1]


@settings(max_examples=60, deadline=None)
@given(caption=st.lists(st.sampled_from(["A", "man", "zombie,", "in", "the", "rain.", "3d"]), max_size=9).map(" ".join))
def test_words_are_what_the_tokenizer_separates(caption: str) -> None:
    tokenizer = tiny_tokenizer()
    words = read_words(tokenizer, caption)
    spelled = [tokenizer.decode(list(word.tokens)).strip() for word in words]
    assert spelled == re.findall(r"[a-z]+|\d|[.,]", caption.lower())
    ids = tokenizer(caption)["input_ids"]
    assert [ids[word.span] for word in words] == [list(word.tokens) for word in words]
    assert sum(len(word.tokens) for word in words) == len(ids) - 2


@settings(max_examples=100, deadline=None)
@given(old=CAPTIONS, new=CAPTIONS)
def test_attention_is_moved_not_made(old: str, new: str) -> None:
    """Word by word every row sums to 1, so maps still do; refined, every column does together with its own share."""
    tokenizer = tiny_tokenizer()
    mapped = token_map(tokenizer, old, new)
    if len(read_words(tokenizer, old)) == len(read_words(tokenizer, new)):
        assert torch.allclose(mapped.from_source.sum(1), torch.ones(LENGTH))
        assert not mapped.from_own.any()
    else:
        assert torch.allclose(mapped.from_source.sum(0) + mapped.from_own, torch.ones(LENGTH))
        assert set(mapped.from_own.tolist()) <= {0, 1}
    end, new_end = end_of(tokenizer, old), end_of(tokenizer, new)
    assert mapped.from_source[0, 0] == mapped.from_source[end, new_end] == 1
    within = mapped.from_source.nonzero().tolist()
    for row, column in within:  # start, words, end and padding keep apart
        assert (row == 0) == (column == 0)
        assert (row < end) == (column < new_end)
        assert (row == end) == (column == new_end)


@pytest.mark.parametrize("caption", ["a photo of a person", "zombie", "a" * 75])
def test_the_same_caption_keeps_every_map(caption: str) -> None:
    mapped = token_map(tiny_tokenizer(), caption, caption)
    assert torch.equal(mapped.from_source, torch.eye(LENGTH))
    assert not mapped.from_own.any()


def test_a_full_caption_leaves_no_padding_to_go_to() -> None:
    """Attention to padding that is no more goes to the end token."""
    mapped = token_map(tiny_tokenizer(), "man", "z" * 75)
    assert torch.equal(mapped.from_source[4:].argmax(1), torch.full((73,), 76))
    assert torch.allclose(mapped.from_source.sum(1), torch.ones(LENGTH))


def test_a_word_of_other_length_is_paid_to_in_equal_parts() -> None:
    """`man` is 3 tokens here and `zombie` 6; what stands behind them moves by 3."""
    matrix = token_map(tiny_tokenizer(), "a man in", "a zombie in").from_source
    assert torch.allclose(matrix[2:5, 2:8], torch.full((3, 6), 1 / 6))
    assert torch.equal(matrix[5:7, 8:10], torch.eye(2))  # in
    assert matrix[7, 10] == 1  # the end token
    assert torch.equal(matrix[11:, 11:], torch.eye(LENGTH - 11))  # padding in place
    assert matrix[8:11, 11].tolist() == [1, 1, 1]  # where there was padding and is none now


def test_new_words_keep_their_own_maps() -> None:
    tokenizer = tiny_tokenizer()
    mapped = token_map(tokenizer, "a man in rain", "a sad man in red rain")
    new = {
        *columns_of(tokenizer, "a sad man in red rain", "sad"),
        *columns_of(tokenizer, "a sad man in red rain", "red"),
    }
    assert set(mapped.from_own.nonzero().flatten().tolist()) == new
    for word in ("a", "man", "in", "rain"):
        rows = columns_of(tokenizer, "a man in rain", word)
        columns = columns_of(tokenizer, "a sad man in red rain", word)
        assert mapped.from_source[:, columns].argmax(0).tolist() == rows


@settings(max_examples=100, deadline=None)
@given(old=CAPTIONS, new=CAPTIONS, data=st.data(), factor=st.sampled_from([-2.0, 0.0, 0.5, 3.0]))
def test_amplification_touches_the_words_tokens_alone(old: str, new: str, data: st.DataObject, factor: float) -> None:
    tokenizer = tiny_tokenizer()
    phrase = data.draw(st.sampled_from([word.strip(",") for word in new.split()]))
    plain, loud = token_map(tokenizer, old, new), token_map(tokenizer, old, new, [(phrase, factor)])
    gains = torch.ones(LENGTH)
    gains[columns_of(tokenizer, new, phrase)] = factor
    assert torch.equal(loud.from_source, plain.from_source * gains)
    assert torch.equal(loud.from_own, plain.from_own * gains)


def gains_of(tokenizer: Any, before: str, after: str, *amplify: tuple[str, float]) -> Tensor:
    """What every token's attention is multiplied with, where nothing else changes."""
    return token_map(tokenizer, before, after, amplify).from_source.diagonal()


def test_phrases_are_found_whole_and_everywhere(clip: Any) -> None:
    caption = "a Van Gogh painting of a pointillist in van gogh style, vans"
    found = gains_of(clip, caption, caption, ("van gogh", 2), ("Pointillist", 3))
    twos = columns_of(clip, caption.lower(), "van gogh")
    threes = columns_of(clip, caption.lower(), "pointillist")
    assert len(twos) > 2
    assert len(threes) > 1  # of several tokens in the real vocabulary
    assert (found == 2).nonzero().flatten().tolist() == twos
    assert (found == 3).nonzero().flatten().tolist() == threes
    assert found.sum() == LENGTH + len(twos) + 2 * len(threes)


@pytest.mark.parametrize("word", ["ghost", "zomb", "ombie", "zombie man", "of zombie"])
def test_a_word_that_is_not_in_the_caption_is_refused(clip: Any, word: str) -> None:
    for tokenizer in (clip, tiny_tokenizer()):
        with pytest.raises(UserError, match=f"'{word}' is not in the caption 'a photo of a zombie'"):
            token_map(tokenizer, "a photo of a man", "a photo of a zombie", [(word, 2.0)])


def test_catalogue_captions_of_the_real_vocabulary(clip: Any) -> None:
    """`a photo of a person` to `a photo of a pointillist zombie`: what is shared stays, what is new is its own."""
    before, after = "a photo of a person, smiling", "a photo of a pointillist zombie, smiling"
    mapped = token_map(clip, before, after)
    new = columns_of(clip, after, "pointillist zombie")
    assert mapped.from_own.nonzero().flatten().tolist() == new
    assert torch.equal(mapped.from_source[:5, :5], torch.eye(5))
    assert mapped.from_source[columns_of(clip, before, "smiling"), columns_of(clip, after, "smiling")].tolist() == [1]
