"""Progress in a notebook: one output that is drawn again, instead of a terminal's bars."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from farm.progress import Bar, Screen

DRAW_SECONDS = 0.5


def screen() -> Screen:
    """Where a run shows how far it is: the notebook's cell, or a terminal."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return NotebookScreen() if type(shell).__name__ == "ZMQInteractiveShell" else Screen()


class NotebookScreen(Screen):
    """A cell's output: what was said, then a bar a stage."""

    def __init__(self) -> None:
        super().__init__()
        self._said: list[str] = []
        self._bars: dict[str, str] = {}
        self._output: Any = None
        self._drawn = 0.0

    def say(self, line: str) -> None:
        self._said.append(html.escape(line))
        self._draw()

    @contextmanager
    def bar(self, name: str) -> Iterator[Bar]:
        started = time.monotonic()
        notebook = self

        class Row:
            def update(self, done: int, total: int, note: str = "") -> None:
                seconds = time.monotonic() - started
                notebook._bars[name] = (
                    f'{html.escape(name)} <progress value="{done}" max="{max(total, 1)}"></progress> '
                    f"{done}/{total}, {seconds:.0f} s {html.escape(note)}"
                )
                notebook._draw(always=done == total)

        yield Row()
        self._draw()

    def _draw(self, *, always: bool = True) -> None:
        """Again in the same place; between two updates of a bar not more often than eyes can follow."""
        from IPython.display import HTML, display

        if not always and time.monotonic() - self._drawn < DRAW_SECONDS:
            return
        self._drawn = time.monotonic()
        page = HTML("<br>".join([*self._said, *self._bars.values()]))  # type: ignore[no-untyped-call]
        if self._output is None:
            self._output = display(page, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._output.update(page)
