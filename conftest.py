"""How the suite is run: tests that start a Ray or a server come first, those of a kind one after another."""

from __future__ import annotations

import hypothesis
import pytest
from xdist.scheduler import LoadScopeScheduling

hypothesis.settings.register_profile("patient", deadline=None)  # time never decides a test
hypothesis.settings.load_profile("patient")

INTEGRATION = "tests/integration/"
BROWSER = "tests/browser/"
INTEGRATION_SECONDS = 900
"""When such a test hangs: several times what any takes on a busy machine of two cores."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(INTEGRATION):
            item.add_marker(pytest.mark.timeout(INTEGRATION_SECONDS))
    items.sort(key=lambda item: not item.nodeid.startswith(INTEGRATION))


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    """All that start a Ray go to one worker, since two on two cores starve each other; all that share Ceph to one, and
    all that share a served page."""

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if file.startswith(BROWSER):
                return "browser"
            if not file.startswith(INTEGRATION):
                return file
            return "ceph" if file.startswith(f"{INTEGRATION}test_s3_") else "ray"

    return Scheduling(config, log)  # type: ignore[arg-type]
