"""Concept ids for a shell that completes a command: read from the YAML alone, since every keystroke waits for it."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

CONCEPTS = Path(__file__).with_name("concepts")
_ID = re.compile(r"^\s*- (?:\{\s*)?id:\s*[\"']?([a-z0-9-]+)", re.MULTILINE)


def ids(config: str | Path | None) -> list[str]:
    """The ids of a farm's catalogue, in its order; empty where the file says nothing that can be understood."""
    import yaml

    if config is None:
        return []
    with suppress(OSError, ValueError, yaml.YAMLError, AttributeError, TypeError, KeyError):
        catalogue = yaml.safe_load(Path(config).expanduser().read_text())["catalogue"]
        if isinstance(catalogue, list):
            return [concept["id"] for concept in catalogue]
        if isinstance(catalogue, dict):
            return list(catalogue["only"])
        packaged = CONCEPTS / f"{catalogue}.yaml"
        file = packaged if packaged.is_file() else Path(catalogue)
        return _ID.findall(file.read_text())
    return []
