"""The finished farm that tests of many modules read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from stage_farm import built, contents, write_config
from terminal import Terminal


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished farm, only to read: `stage_farm.copied` makes one to change."""
    root = built(tmp_path_factory.getbasetemp())
    before = contents(root)
    yield root
    assert contents(root) == before, "a test has written to the farm that all share"


@pytest.fixture
def config(root: Path, tmp_path: Path) -> Path:
    """The finished farm's configuration."""
    return write_config(tmp_path / "farm.yaml", root)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    """The command line of this process."""
    return Terminal(monkeypatch, capsys)
