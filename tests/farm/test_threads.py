"""Threads that share what memory they may use."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.threads import Allowance, in_threads


@given(st.lists(st.integers(0, 30), max_size=40))
def test_never_more_than_allowed_but_for_one_alone(sizes: Sequence[int]) -> None:
    allowance, lock, taken = Allowance(20), threading.Lock(), []
    most: list[tuple[int, int]] = []

    def work(size: int) -> int:
        with allowance.take(size):
            with lock:
                taken.append(size)
                most.append((sum(taken), len([one for one in taken if one])))
            with lock:
                taken.remove(size)
        return size

    assert list(in_threads(work, sizes, 8)) == sizes
    assert all(total <= 20 or how_many == 1 for total, how_many in most)


def test_what_fails_gives_back_what_it_took() -> None:
    allowance = Allowance(10)
    for _ in range(3):
        with pytest.raises(ValueError, match="broken"), allowance.take(10):
            raise ValueError("broken")
