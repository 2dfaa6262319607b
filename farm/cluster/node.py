"""A node seen from within: what a process there finds other than the driver does.

Sent to nodes by value, so that one without this package can say so: nothing of the project is imported at the top.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from farm.preflight import State

    Found = list[tuple[State, str]]

CLOCK_SECONDS = 5
"""A clock may be off by as much."""
PACKAGES = (
    "diffusers",
    "numpy",
    "onnxruntime",
    "opencv-python-headless",
    "peft",
    "pillow",
    "pyarrow",
    "pydantic",
    "ray",
    "safetensors",
    "scikit-image",
    "scikit-learn",
    "scipy",
    "torch",
    "torchvision",
    "transformers",
)  # those that what a worker does and makes depends on


def facts() -> dict[str, str | None]:
    """What should be the same on every node: Python, packages, this project's code. None for what is not there."""
    versions: dict[str, str | None] = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    for name in ("e2gan", "farm"):
        spec = importlib.util.find_spec(name)
        folders = spec.submodule_search_locations if spec else None
        files = sorted(Path(folders[0]).rglob("*.py")) if folders else []
        code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
        versions[name] = code if files else None
    return versions


def differences(here: dict[str, str | None], given: bytes, gpus: float) -> Found:
    """Runs on a node: how it differs from the driver, whose `facts` are `here`. gpus: how many Ray counts there.

    given: pickled, because the node may not have the classes: the store, the key of an object in it, and of each model
    that the node should have its key in the configuration, its path or hub id, and its revision.
    """
    there = facts()
    found = compared(here, there)
    if gpus:
        found += gpus_seen(gpus)
    if there["farm"] is not None:
        found += data_seen(given)
    return found


def compared(here: dict[str, str | None], there: dict[str, str | None]) -> Found:
    """What of the driver's facts is otherwise on a node; what the driver does not have either is no matter."""
    found: Found = []
    other = [name for name in here if here[name] is not None and there[name] != here[name]]
    ours = [name for name in other if name in ("e2gan", "farm")]
    absent = [name for name in other if there[name] is None and name not in ours]
    versions = [f"{name} {there[name]} ({here[name]} here)" for name in other if name not in (*ours, *absent)]
    if absent:
        found.append(("error", f"lacks {', '.join(absent)}: install from constraints.txt."))
    if versions:
        found.append(("warning", f"has {', '.join(versions)}: install from constraints.txt."))
    if here["farm"] is not None and there["farm"] is None:
        found.append(
            ("warning", "has no farm, so its store and models were not looked at: install it, or submit a job.")
        )
    elif ours:
        found.append(
            ("warning", f"has other code of {' and '.join(ours)}: update it, or submit a job, which brings its own.")
        )
    return found


def gpus_seen(counted: float) -> Found:
    """Whether torch sees as many GPUs as Ray counts on this machine."""
    shown = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}  # Ray hides them
    count = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    seen = int(subprocess.run(count, env=shown, capture_output=True, text=True, check=True).stdout)
    if seen >= counted:
        return []
    return [("error", f"Ray counts {counted:g} GPUs and torch sees {seen}: check its driver (nvidia-smi) and torch.")]


def data_seen(given: bytes) -> Found:
    """Whether this machine has the store, unless it is None, and the models."""
    from ray import cloudpickle

    from farm.store import NotFoundError

    store, probe, models = cloudpickle.loads(given)  # unpickled, unlike opened, a store that is away is not made anew
    found: Found = []
    try:
        if store is not None:
            store.get(probe)
    except NotFoundError:
        found.append(("error", f"has another folder at {store.url}: mount the same one there."))
    except Exception as error:
        found.append(("error", f"cannot read the store ({error}): mount it there under the same path."))
    lacking = [f"{model} ({key})" for key, model, revision in models if not has_model(model, revision)]
    return found + [("error", f"does not have {model}: put or fetch it there.") for model in lacking]


def has_model(model: str, revision: str | None) -> bool:
    """Whether this machine has the file, the folder, or the hub id in its Hugging Face cache."""
    from farm.editors.weights import locate
    from farm.errors import UserError

    if Path(model).expanduser().exists():
        return True
    try:
        locate(model, revision)
    except UserError:
        return False
    return True


def clock() -> float:
    """Seconds since 1970, by this machine."""
    return time.time()


def clock_off(sent: float, there: float, received: float) -> Found:
    """How far another machine's clock is off at the least, when it was read between two moments of this one's."""
    ahead, behind = there - received, sent - there
    if max(ahead, behind) <= CLOCK_SECONDS:
        return []
    way = f"{ahead:.0f} s ahead of" if ahead > 0 else f"{behind:.0f} s behind"
    return [("warning", f"its clock is {way} this one, and `farm queue list` goes by clocks: keep them by NTP.")]
