"""YAML on one line."""

from __future__ import annotations

import yaml


def flow(value: object) -> str:
    """A value as YAML on one line."""
    text = yaml.safe_dump([value], default_flow_style=True, width=float("inf"), sort_keys=False, allow_unicode=True)
    return text.strip()[1:-1]
