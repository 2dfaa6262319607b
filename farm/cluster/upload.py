"""What `ray job submit` would send: Ray copies a job's whole working directory, less what is named as not wanted."""

from __future__ import annotations

import logging
import os
from collections import Counter
from pathlib import Path

from rich.filesize import decimal

from farm.preflight import Check

ZIP_ENTRY_BYTES = 76
"""What a file costs in a zip besides its content and, twice, its name."""


def upload_size(folder: Path) -> tuple[int, list[tuple[str, int]]]:
    """The bytes that `ray job submit --working-dir folder` sends, and the entries of the folder with theirs, largest
    first. What is left out is up to Ray's own code: .gitignore, .rayignore, and what it never takes."""
    from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE, get_runtime_env_default_excludes
    from ray._private.runtime_env import packaging

    folder = folder.absolute()
    sizes: Counter[str] = Counter()

    def add(path: Path) -> None:
        if path != folder and (path.is_file() or (path.is_dir() and not any(path.iterdir()))):
            name = path.relative_to(folder)
            length = len(name.as_posix().encode()) + path.is_dir()  # a folder's ends with a slash
            sizes[name.parts[0]] += ZIP_ENTRY_BYTES + 2 * length + (path.stat().st_size if path.is_file() else 0)

    packaging._dir_travel(
        folder,
        [packaging._get_excludes(folder, get_runtime_env_default_excludes())],
        add,
        include_gitignore=os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1",
        logger=logging.getLogger(__name__),
    )
    return sizes.total() + 22, sizes.most_common()


def upload_limit() -> int:
    """How many bytes `ray job submit` can send: the job server takes no larger request, and Ray's own store of files,
    which `ray.init` writes to, no larger package."""
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
    from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE

    return min(DASHBOARD_CLIENT_MAX_SIZE, GCS_STORAGE_MAX_SIZE)


def check_upload(folder: Path) -> Check:
    """Whether `ray job submit` takes the folder."""
    if not folder.is_dir():
        return Check("job upload", "error", f"--working-dir: there is no folder {folder}; name the checkout.")
    size, entries = upload_size(folder)
    limit = upload_limit()
    largest = ", ".join(f"{name} {decimal(count)}" for name, count in entries[:4])
    found = f"`ray job submit --working-dir {folder}` sends {decimal(size)}"
    name_it = f"name in {folder / '.rayignore'} what the job does not need ({largest})"
    if size > limit:
        return Check("job upload", "error", f"{found} and Ray takes {decimal(limit)}: {name_it}.")
    if size > limit / 2:
        return Check("job upload", "warning", f"{found}, and Ray takes {decimal(limit)} at most: {name_it}.")
    if git := dict(entries).get(".git"):
        return Check("job upload", "warning", f"{found}, {decimal(git)} of it .git: name `.git/` in .rayignore.")
    return Check("job upload", "ok", f"{found} ({largest})")
