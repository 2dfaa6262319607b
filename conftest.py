"""How the suite is run: tests that start a Ray or a server first, and never two of them at once."""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadScopeScheduling

INTEGRATION = "tests/integration/"
INTEGRATION_SECONDS = 900
"""When such a test hangs: several times what any takes on a busy machine of two cores."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(INTEGRATION):
            item.add_marker(pytest.mark.timeout(INTEGRATION_SECONDS))
    items.sort(key=lambda item: not item.nodeid.startswith(INTEGRATION))


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    """All integration tests go to one worker: two Rays on two cores starve each other."""

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return INTEGRATION if nodeid.startswith(INTEGRATION) else nodeid.partition("::")[0]

    return Scheduling(config, log)  # type: ignore[arg-type]
