"""What a phone that has one pack needs to have the next: the bytes that were added, and the programs.

A pack that goes on from another begins with that one's weights (`PackWriter(since=…)`), but for the head of weight.bin,
which counts its constants. So an update of one concept is about as large as the concept.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from e2gan.export.mlpackage import MODEL, WEIGHTS

HEAD = 64
"""Bytes of weight.bin before the first constant."""
UPDATE, ADDED = "update.json", "weights.append"


def write_update(old: Path, new: Path, folder: Path) -> dict[str, Any]:
    """Write what turns the package `old` into `new`, which goes on from it, and return `update.json`.

    Raises:
        ValueError: `new` does not go on from `old`.
    """
    had, has = (old / WEIGHTS).read_bytes(), (new / WEIGHTS).read_bytes()
    if has[HEAD : len(had)] != had[HEAD:]:
        raise ValueError(f"{new} does not begin with the weights of {old}")
    (folder / ADDED).write_bytes(has[len(had) :])
    for name, source in (("model.mlmodel", new / MODEL), ("Manifest.json", new / "Manifest.json")):
        shutil.copyfile(source, folder / name)
    document = {
        "weights_before": len(had),
        "weights_before_sha256": hashlib.sha256(had).hexdigest(),
        "weights_head": base64.b64encode(has[:HEAD]).decode(),
        "weights_sha256": hashlib.sha256(has).hexdigest(),
    }
    (folder / UPDATE).write_text(json.dumps(document, indent=1) + "\n")
    return document


def apply_update(old: Path, update: Path, new: Path) -> None:
    """Make the package `new` from `old` and an update's folder, as an app does.

    Raises:
        ValueError: the update is for another package, or does not give what it says.
    """
    told = json.loads((update / UPDATE).read_text())
    weights = (old / WEIGHTS).read_bytes()
    if hashlib.sha256(weights).hexdigest() != told["weights_before_sha256"]:
        raise ValueError(f"this update is not for {old}")
    weights = base64.b64decode(told["weights_head"]) + weights[HEAD:] + (update / ADDED).read_bytes()
    if hashlib.sha256(weights).hexdigest() != told["weights_sha256"]:
        raise ValueError(f"the update in {update} is damaged")
    (new / WEIGHTS).parent.mkdir(parents=True)
    (new / WEIGHTS).write_bytes(weights)
    shutil.copyfile(update / "model.mlmodel", new / MODEL)
    shutil.copyfile(update / "Manifest.json", new / "Manifest.json")
