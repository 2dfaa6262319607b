"""The layout of a store: which keys there are and what their objects mean, as one number in `farm.json` at its root.

Digests keep what a stage's code makes apart by themselves (`farm.plan.VERSIONS`); this number is for what they cannot:
where things lie, and how documents are written. A store without the mark is of layout 1, the first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from farm.errors import IntegrityError, UserError
from farm.objects import NotFoundError, Reader, Store, StoreUnreachableError, where

MARK = "farm.json"
MARK_BYTES = 1 << 16
LAYOUT = 1
"""What this version writes, and reads."""
STEPS: Mapping[int, Callable[[Store], None]] = {}
"""How a store of a layout becomes one of the next: idempotent, and readable by the older version until it has ended.
None yet: layout 1 is the first."""


def layout_of(store: Reader) -> int | None:
    """The store's mark; None without one.

    Raises:
        IntegrityError: it cannot be read.
    """
    try:
        found = json.loads(store.get(MARK, MARK_BYTES))["layout"]
    except NotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f'{where(store, MARK)} is damaged: write {{"layout": N}} into it, or copy it from a backup.'
        ) from error
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise IntegrityError(f"{where(store, MARK)} is damaged: a layout is a number such as {LAYOUT}.")
    return found


def check_layout(store: Reader) -> None:
    """One call of the store.

    Raises:
        UserError: the store is of a newer layout, or of an older one that `farm migrate` brings up.
    """
    try:
        found = layout_of(store) or 1
    except StoreUnreachableError as error:
        raise UserError(f"The store {store.url} does not answer: check its address.") from error
    if found > LAYOUT:
        raise UserError(
            f"The store {store.url} is of layout {found} and this version reads {LAYOUT}: install the e2gan-farm that "
            "wrote it, or a newer one."
        )
    if found < LAYOUT:
        raise UserError(
            f"The store {store.url} is of layout {found} and this version reads {LAYOUT}: end its runs and servers, "
            "and `farm migrate` brings it up."
        )


def mark_layout(store: Store) -> bool:
    """Mark a store that has no mark; whether it had none. Who writes first into a store does this, one call."""
    return store.put_if_absent(MARK, _mark(LAYOUT))


def migrate(store: Store) -> list[int]:
    """Bring a store up to this version's layout, step by step; the layouts it had on the way, empty where it is there.

    The mark moves after each step, so that what is interrupted goes on. A store without a mark gets one.

    Raises:
        UserError: the store is newer than this version.
    """
    found = layout_of(store)
    if (found or 1) > LAYOUT:
        check_layout(store)
    taken = []
    for layout in range(found or 1, LAYOUT):
        STEPS[layout](store)
        store.put(MARK, _mark(layout + 1))
        taken.append(layout)
    mark_layout(store)
    return taken


def _mark(layout: int) -> bytes:
    return f"{json.dumps({'layout': layout})}\n".encode()
