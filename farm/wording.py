"""Whether two concepts ask for one edit in other words."""

from __future__ import annotations

import re
import unicodedata

_ARTICLES = frozenset({"a", "an", "the"})
_FILLERS = _ARTICLES | {
    "of", "in", "on", "with", "by", "as", "and", "from", "for", "to", "at", "into", "like", "if", "were", "is",
    "it", "this", "his", "her", "their", "him", "them", "person", "people", "someone", "face",
    "style", "styled", "manner", "art", "artwork", "painting", "painted", "drawing", "drawn", "portrait", "picture",
    "image", "photo", "photograph", "photography", "look", "add", "apply", "change", "convert", "draw", "give", "make",
    "put", "render", "show", "transform", "turn",
}  # fmt: skip
"""Words that say how an edit is asked for, not which one it is."""
_SPELLINGS = {
    "make-up": "makeup", "grey": "gray", "colour": "color", "blonde": "blond", "armour": "armor",
    "moustache": "mustache",
}  # fmt: skip


class Wording:
    """A concept's name and prompt, reduced to the words that tell it from others. artist: it is someone's manner."""

    def __init__(self, name: str, prompt: str, *, artist: bool) -> None:
        self._artist = artist
        self._prompt = prompt
        self._said = [word for word in _words(prompt) if word not in _ARTICLES] or [prompt]
        self._texts = {"name": (name, _key_words(name)), "prompt": (prompt, _key_words(prompt))}

    def repeated_by(self, other: Wording) -> str:
        """What the two have in common, such as `the same prompt 'add fog'`; empty when they are different edits."""
        if self._said == other._said:
            return f"the same prompt {self._prompt!r}"
        for what, (text, words) in self._texts.items():
            other_text, other_words = other._texts[what]
            if _same_edit(words, other_words, artist=self._artist or other._artist):
                return f"nearly the same {what} ({text!r}, {other_text!r})"
        return ""


def plain(text: str) -> str:
    """Lower case without accents and apostrophes."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    return re.sub("['’]", "", "".join(letter for letter in letters if not unicodedata.combining(letter)))


def _same_edit(one: list[str], other: list[str], *, artist: bool) -> bool:
    """Whether two lists of key words ask for one edit.

    They do when they are the same words, in any order or written together; when the longer adds no more than half to
    the shorter; and for artists when the longer only adds first names. A key word of its own on either side makes
    two edits, however much else they share: `Monet` and `Manet`.
    """
    short, long = sorted((one, other), key=len)
    if not short:
        return False
    if "".join(short) == "".join(long) or (set(short) <= set(long) and 3 * len(short) >= 2 * len(long)):
        return True
    return artist and (_ends_with(long, short) or _ends_with(short, long))


def _ends_with(words: list[str], others: list[str]) -> bool:
    """Whether the last words, written together, are the others written together."""
    return any("".join(others) == "".join(words[start:]) for start in range(1, len(words)))


def _key_words(text: str) -> list[str]:
    """Each once, in the order of the text."""
    found: dict[str, None] = {}
    for word in _words(text):
        singular = word.removesuffix("s") if len(word) > 3 and not word.endswith("ss") else word
        if not {word, singular} & _FILLERS:
            found[singular] = None
    return list(found)


def _words(text: str) -> list[str]:
    spelled = plain(text)
    for spelling, other in _SPELLINGS.items():
        spelled = spelled.replace(spelling, other)
    return re.findall(r"\w+", spelled)
