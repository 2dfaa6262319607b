"""`farm doctor`: what this machine lacks, a line each with the fix; with a farm, what that farm lacks too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli_preflight import WorkingDir, checks, show
from farm.errors import UserError
from farm.options import Json, Override, load_config

if TYPE_CHECKING:
    from farm.config import FarmConfig
    from farm.preflight import Check

Farm = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Look at what the farm of this YAML file needs.", show_default=False),
]


def doctor(
    config: Farm = None,
    override: Override = None,
    working_dir: WorkingDir = Path(),
    quick: Annotated[bool, typer.Option("--quick", help="Start no Ray and load no PyTorch.")] = False,
    as_json: Json = False,
) -> None:
    """What this machine lacks, each line ok or the fix; with --config also what its farm lacks.

    Looks at Python, packages, GPU, Ray and disk, and with --config at all that `farm preflight` does. Exits with 1 on
    an error.
    """
    show(examined(config, override or [], working_dir, quick=quick), as_json=as_json)


def examined(path: Path | None, overrides: list[str], working_dir: Path, *, quick: bool = False) -> Iterator[Check]:
    """The checks of the machine, then those of the farm, where there is one."""
    from farm.cluster.inspect import check_token
    from farm.cluster.trial import check_ray
    from farm.cluster.upload import check_upload
    from farm.doctor import check_gpu, check_packages, check_python, check_scratch

    config = _readable(path, overrides)
    yield check_python()
    yield from check_packages(config=config)
    yield check_scratch()
    if not quick:
        yield check_gpu(config)
    named = (config.cluster.address if config else None) or os.environ.get("RAY_ADDRESS")
    if not quick and named in (None, "", "local"):
        yield check_ray()
    if path is not None:
        yield from checks(path, overrides, working_dir)
        return
    yield check_token(named)
    yield check_upload(working_dir)


def _readable(path: Path | None, overrides: list[str]) -> FarmConfig | None:
    """The farm's configuration; None for one with a mistake, which its own line tells of."""
    try:
        return load_config(path, overrides) if path else None
    except UserError:
        return None
