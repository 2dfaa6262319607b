"""How the suite is run: tests that start a Ray come first, one after another."""

from __future__ import annotations

import pytest

RAY_SECONDS = 900
"""When a test that starts a Ray hangs: several times what any takes on a busy machine of two cores."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under xdist's `--dist loadgroup` they share one worker: two Rays at once on two cores starve each other."""
    for item in items:
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group("ray"))
            item.add_marker(pytest.mark.timeout(RAY_SECONDS))
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
