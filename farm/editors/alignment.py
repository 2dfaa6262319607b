"""Which tokens of two captions belong together, for prompt-to-prompt's replacement of cross-attention maps.

Prompt-to-Prompt (Hertz et al. 2022), section 4, with the choices of the authors' repository google/prompt-to-prompt;
where captions differ in length, its map of the tokens behind the last changed word is off by the difference, ours not.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farm.errors import UserError

END_OF_WORD = "</w>"
"""What the last token of a word ends with in CLIP's vocabulary."""


class Word(NamedTuple):
    """A word or a punctuation mark: the place of its first token, counted with the start token at 0, and its tokens."""

    start: int
    tokens: tuple[int, ...]

    @property
    def span(self) -> slice:
        return slice(self.start, self.start + len(self.tokens))


@dataclass(frozen=True)
class TokenMap:
    """How the edit's cross-attention maps `[..., pixels, k]` over its k tokens are made of the source's and its own:
    `source_maps @ from_source + own_maps * from_own`.

    from_source: float32 `[k, k]`, from a token of the source's caption to one of the edit's. from_own: float32 `[k]`.
    """

    from_source: Tensor
    from_own: Tensor

    def amplified(self, gains: Tensor) -> TokenMap:
        """The same with the map of token j times `gains[j]`."""
        return TokenMap(self.from_source * gains, self.from_own * gains)

    def to(self, device: torch.device) -> TokenMap:
        return TokenMap(self.from_source.to(device), self.from_own.to(device))


def token_map(tokenizer: Any, before: str, after: str, amplify: Sequence[tuple[str, float]] = ()) -> TokenMap:
    """What the maps of the edit's caption take from those of the source's, amplified words included.

    tokenizer: a CLIPTokenizer. Captions of as many words replace maps word by word (the paper's word swap), others
    refine them: words both have take the source's maps, new words keep their own. amplify: words or phrases of
    `after` and the factor of their maps (the paper's attention re-weighting).

    Raises:
        UserError: an amplified word is not in `after`.
    """
    old, new = read_words(tokenizer, before), read_words(tokenizer, after)
    length: int = tokenizer.model_max_length
    mapped = replacement(old, new, length) if len(old) == len(new) else refinement(old, new, length)
    gains = torch.ones(length)
    for text, factor in amplify:
        found = find_phrase(new, read_words(tokenizer, text))
        if not found:
            raise UserError(
                f"editor.amplify: {text!r} is not in the caption {after!r}; name words as that caption has them."
            )
        for word in found:
            gains[word.span] *= factor
    return mapped.amplified(gains)


def read_words(tokenizer: Any, caption: str) -> list[Word]:
    """The words of a caption as CLIP's tokenizer separates them, up to the length it cuts captions to."""
    ids = tokenizer(caption, truncation=True, max_length=tokenizer.model_max_length)["input_ids"][1:-1]
    words, begin = [], 0
    for end, token in enumerate(tokenizer.convert_ids_to_tokens(ids), start=1):
        if token.endswith(END_OF_WORD) or end == len(ids):  # the last word may be cut
            words.append(Word(begin + 1, tuple(ids[begin:end])))
            begin = end
    return words


def find_phrase(words: Sequence[Word], phrase: Sequence[Word]) -> list[Word]:
    """Every word of a caption that is part of an occurrence of a phrase in it."""
    wanted = [word.tokens for word in phrase]
    runs = [words[start : start + len(wanted)] for start in range(len(words))]
    return [word for run in runs if [word.tokens for word in run] == wanted for word in run]


def replacement(old: Sequence[Word], new: Sequence[Word], length: int) -> TokenMap:
    """Word i of one caption to word i of the other, which has as many. Every row of `from_source` sums to 1: what a
    pixel pays to a word it pays to its successor, in equal parts where the two have different numbers of tokens.
    """
    matrix = torch.zeros(length, length)
    matrix[0, 0] = 1
    for word, successor in zip(old, new, strict=True):
        matrix[word.span, successor.span] = _between(word, successor)
    for place, target in _tail(_end(old), _end(new), length):
        matrix[place, target] = 1
    return TokenMap(matrix, torch.zeros(length))


def refinement(old: Sequence[Word], new: Sequence[Word], length: int) -> TokenMap:
    """Words that both captions have take the old map; the other new words keep their own."""
    matrix, own = torch.zeros(length, length), torch.zeros(length)
    matrix[0, 0] = 1
    counterparts = align([word.tokens for word in old], [word.tokens for word in new])
    for word, counterpart in zip(new, counterparts, strict=True):
        if counterpart is None:
            own[word.span] = 1
        else:
            matrix[old[counterpart].span, word.span] = torch.eye(len(word.tokens))
    for place, source in _tail(_end(new), _end(old), length):
        matrix[source, place] = 1
    return TokenMap(matrix, own)


def align(old: Sequence[Hashable], new: Sequence[Hashable]) -> list[int | None]:
    """For each item of `new` the place of its counterpart in `old`, or None: Needleman-Wunsch with a match worth 1, a
    mismatch -1 and gaps 0, so a longest common subsequence. Of equally good alignments the one that matches earliest.
    """
    best = [[0] * (len(new) + 1) for _ in range(len(old) + 1)]
    for i, one in enumerate(old, start=1):
        for j, other in enumerate(new, start=1):
            best[i][j] = max(best[i - 1][j], best[i][j - 1], best[i - 1][j - 1] + (1 if one == other else -1))
    counterparts: list[int | None] = [None] * len(new)
    i, j = len(old), len(new)
    while i and j:
        if best[i][j] == best[i][j - 1]:
            j -= 1
        elif best[i][j] == best[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            counterparts[j] = i
    return counterparts


def _between(word: Word, successor: Word) -> Tensor:
    if len(word.tokens) == len(successor.tokens):
        return torch.eye(len(word.tokens))
    return torch.full((len(word.tokens), len(successor.tokens)), 1 / len(successor.tokens))


def _end(words: Sequence[Word]) -> int:
    """The place of the end token."""
    return words[-1].span.stop if words else 1


def _tail(end: int, other_end: int, length: int) -> list[tuple[int, int]]:
    """The end token and the padding behind it, and their counterparts: padding stays in place, where there is some."""
    padding = [(place, min(max(place, other_end + 1), length - 1)) for place in range(end + 1, length)]
    return [(end, other_end), *padding]
