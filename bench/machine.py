"""The machine a result was measured on, and the lines a bench prints."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, object]:
    """CPU, cores this process may use, GPU and versions, for a bench's first line."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def sayer(file: Path | None) -> Callable[[Mapping[str, Any]], None]:
    """Prints rows as JSON lines; the file has them too, as far as they have come."""
    lines: list[str] = []

    def say(row: Mapping[str, Any]) -> None:
        lines.append(json.dumps(row))
        print(lines[-1], flush=True)
        if file:
            file.write_text("\n".join(lines) + "\n")

    return say
