"""What can be known of a machine before it has a farm: its Python, packages, GPU and disk. `farm.preflight` goes on."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.filesize import decimal

from farm.config import FarmConfig
from farm.editors.diffusion import DiffusionSettings
from farm.preflight import Check

PACKAGE = "e2gan-farm"
OLDEST = (3, 11)
EXTRAS = {"diffusion": "teachers that are diffusion models", "export": "packs for phones"}
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
FULL = 0.95
"""Share of a disk in use from which on Ray puts nothing there any more."""
INSTALL = "pip install -c constraints.txt -e ."


def check_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> Check:
    found = f"{'.'.join(map(str, version))} in {sys.prefix}"
    if version < OLDEST:
        return Check("Python", "error", f"{found}: the farm needs 3.11; make a virtual environment with a newer one.")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {decimal(memory)} of memory"
    return Check("Python", "ok", f"{found}; {machine}")


def check_packages(installed: Mapping[str, str] | None = None, config: FarmConfig | None = None) -> Iterator[Check]:
    """The packages that the farm's own metadata requires, those of its extras, and the versions that were tested.

    installed: versions by canonical name; this Python's when left out. config: its teachers may need an extra.
    """
    if installed is None:
        installed = {canonicalize_name(name): d.version for d in metadata.distributions() if (name := d.name)}
    try:
        required = [Requirement(text) for text in metadata.requires(PACKAGE) or ()]
    except metadata.PackageNotFoundError:
        yield Check("packages", "error", f"{PACKAGE} is not installed in {sys.prefix}: {INSTALL}")
        return
    plain = [r for r in required if _wanted(r, "")]
    if wrong := list(_unmet(plain, installed)):
        yield Check("packages", "error", f"{', '.join(wrong)}: {INSTALL}")
    elif other := list(_untested(plain, installed)):
        yield Check("packages", "warning", f"not the versions that were tested: {', '.join(other)}: {INSTALL}")
    else:
        yield Check("packages", "ok", f"{len(plain)} of {PACKAGE} {metadata.version(PACKAGE)}, as required")
    for extra, what in EXTRAS.items():
        wrong = list(_unmet([r for r in required if _wanted(r, extra) and not _wanted(r, "")], installed))
        if not wrong:
            yield Check(f"extra {extra}", "ok", f"installed: {what}")
            continue
        lacking, fix = ", ".join(wrong), f"pip install '{PACKAGE}[{extra}]'"
        if extra == "diffusion" and config is not None and (names := diffusion_teachers(config)):
            yield Check(f"extra {extra}", "error", f"{lacking}, and {', '.join(names)} cannot work without: {fix}")
        else:
            yield Check(f"extra {extra}", "ok", f"not installed, only {what} need it: {fix}")


def diffusion_teachers(config: FarmConfig) -> list[str]:
    """The names of the teachers that are diffusion models."""
    every = {name: t for concept in config.catalogue for name, t in config.candidates(concept.id).items()}
    return sorted(name for name, teacher in every.items() if isinstance(teacher, DiffusionSettings))


def check_gpu(config: FarmConfig | None = None) -> Check:
    """The GPUs that PyTorch sees, against those the driver knows and those the teachers want."""
    import torch

    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        return Check("GPU", "ok", ", ".join(f"{gpu.name}, {decimal(gpu.total_memory)}" for gpu in gpus))
    if driver := _driver_sees():
        return Check(
            "GPU",
            "warning",
            f"the driver has {driver} and PyTorch {torch.__version__} sees none: install a PyTorch for its CUDA, and "
            "look at CUDA_VISIBLE_DEVICES.",
        )
    if config is not None and (names := diffusion_teachers(config)):
        return Check(
            "GPU", "warning", f"none, and a photo takes {', '.join(names)} minutes without: use a node with one."
        )
    return Check("GPU", "ok", "none, and none is needed: filters, networks, training and serving run on the CPU")


def check_scratch(folder: Path | None = None) -> Check:
    """The disk that Ray puts its logs and what does not fit in memory on."""
    folder = folder or Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    usage = shutil.disk_usage(folder)
    found = f"{decimal(usage.free)} free in {folder}"
    if usage.used / usage.total > FULL:
        fix = "free space, or let RAY_TMPDIR name a folder on another disk"
        return Check("scratch disk", "warning", f"{found}, less than {1 - FULL:.0%}, where Ray stops writing: {fix}.")
    return Check("scratch disk", "ok", found)


def _wanted(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _unmet(requirements: list[Requirement], installed: Mapping[str, str]) -> Iterator[str]:
    for requirement in requirements:
        version = installed.get(canonicalize_name(requirement.name))
        if version is None:
            yield f"{requirement.name} is missing"
        elif not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement.name} is {version}, not {requirement.specifier}"


def _untested(requirements: list[Requirement], installed: Mapping[str, str]) -> Iterator[str]:
    """Those whose version is not that of constraints.txt, which only a checkout has."""
    if not CONSTRAINTS.is_file():
        return
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE))
    tested = {canonicalize_name(name): version for name, version in pins.items()}
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        if name in tested and installed[name].partition("+")[0] != tested[name]:
            yield f"{name} {installed[name]} ({tested[name]} was)"


def _driver_sees() -> str:
    """What NVIDIA's driver has, empty without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    asked = subprocess.run([program, "-L"], capture_output=True, text=True, check=False)
    return "; ".join(re.findall(r"^GPU \d+: (.*?)(?: \(|$)", asked.stdout, re.MULTILINE))
