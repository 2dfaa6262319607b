"""A hint for whoever mistyped a name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def near(word: str, words: Iterable[str]) -> str:
    """A hint for a mistyped word: `did you mean …?` or the list of what there is, its beginning where it is long."""
    words = sorted(words)
    close = difflib.get_close_matches(word, words, n=3)
    close += [longer for longer in words if word and word in longer and longer not in close]
    if close:
        return f"did you mean {' or '.join(close[:3])}?"
    shown = words if len(words) <= 12 else [*words[:10], f"{len(words) - 10} more"]
    return f"there are {', '.join(shown) or 'none'}."
