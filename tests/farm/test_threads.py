"""Threads that share what memory they may use."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.threads import Allowance, beside, in_threads


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


@given(st.lists(st.integers(), max_size=30), st.integers(1, 4))
def test_calls_within_calls_do_not_wait_for_each_other(items: list[int], depth: int) -> None:
    def call(item: int, left: int) -> int:
        return sum(beside(lambda i: call(i, left - 1), [item] * 3, 8)) if left else item

    assert beside(lambda item: call(item, depth), items, 8) == [item * 3**depth for item in items]


@pytest.mark.parametrize("at_once", [1, 8])
def test_what_raises_ends_it_once_all_that_began_has_ended(at_once: int) -> None:
    running, most = set(), []

    def call(item: int) -> int:
        running.add(item)
        most.append(item)
        try:
            if item == 3:
                raise ValueError(item)
            threading.Event().wait(0.01)
        finally:
            running.remove(item)
        return item

    with pytest.raises(ValueError, match="3"):
        beside(call, range(100), at_once)
    assert not running and len(most) < 100


def test_a_forked_process_has_helpers_of_its_own() -> None:
    assert beside(abs, range(50), 8) == [*range(50)]
    child = os.fork()
    if not child:
        os._exit(beside(abs, range(50), 8) != [*range(50)])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
