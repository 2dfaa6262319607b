"""Where a model's weights lie on this machine, and what they are: folders, hub ids, hashes of big files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farm.errors import UserError, brief

COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
MATTERS = (".json", ".model", ".safetensors", ".txt")
"""Names of files a model is made of end so: configurations, tokenizers, weights."""
SETTLED_SECONDS = 2
"""A file changed more recently than this may change again within one tick of its clock: its hash is not kept."""


@dataclass(frozen=True)
class Located:
    """A model on this machine. commit: the 40 hex digits of its revision on the hub, None for a folder of one's own."""

    folder: Path
    commit: str | None


def locate(
    model: str,
    revision: str | None = None,
    download: bool = False,
    *,
    variant: str | None = None,
    key: str = "editor.model",
) -> Located:
    """Find a model: a folder, or a hub id in this machine's cache.

    With `download` a hub id is fetched when its revision is not in the cache, or only in part: configurations,
    tokenizers and the safetensors of `variant`. Never with HF_HUB_OFFLINE=1. key: of the configuration, for the errors.

    Raises:
        UserError: there is no such folder, the id is not in the cache, or it cannot be fetched.
    """
    folder = _own_folder(model, key)
    if folder is not None:
        return Located(folder, None)
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    download = download and not constants.HF_HUB_OFFLINE
    try:
        # Without patterns the client asks for every file of the repository, of which far from all are needed.
        found = Path(snapshot_download(model, revision=revision, local_files_only=True, allow_patterns=[]))
    except LocalEntryNotFoundError as error:
        if not download:
            raise _missing(model, revision, key) from error
        found = _fetch(model, revision, variant, key)
    if download and not _whole(found):  # an earlier fetch was cut off
        found = _fetch(model, revision, variant, key)
    return Located(found, found.name)


def weights_fingerprint(
    model: str, revision: str | None = None, download: bool = False, *, key: str = "editor.model"
) -> dict[str, str]:
    """What a model's weights are: the id and commit of a hub id, the sha256 over a folder's files.

    A hub id whose `revision` is a whole commit needs neither cache nor network.

    Raises:
        UserError: as `locate`.
    """
    folder = _own_folder(model, key)
    if folder is not None:
        return {"sha256": folder_sha256(folder)}
    if revision is not None and COMMIT.fullmatch(revision):
        return {"id": model, "commit": revision}
    try:
        commit = locate(model, revision, key=key).commit
    except UserError:
        from huggingface_hub import constants

        if not download or constants.HF_HUB_OFFLINE:
            raise
        commit = _ask_hub(model, revision, key).sha
    assert commit is not None
    return {"id": model, "commit": commit}


def folder_sha256(folder: Path) -> str:
    """The sha256 over the relative names and contents of a model folder's files, wherever the folder lies."""
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix in MATTERS and path.is_file() and not _hidden(path.relative_to(folder))
    )
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter's lock
        hashes = pool.map(lambda name: file_sha256(folder / name), names)
        return hashlib.sha256(json.dumps(list(zip(names, hashes, strict=True))).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """A file's sha256. It is read once: the hash is kept under its path, size and time of change.

    The hashes lie in `e2gan-farm/sha256` below $XDG_CACHE_HOME (`~/.cache`); where that cannot be written, files are
    read every time.
    """
    path = path.resolve()
    before = path.stat()
    stamp = {"path": str(path), "size": before.st_size, "mtime_ns": before.st_mtime_ns}
    kept = _kept_hashes() / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError):  # not there, or damaged
        entry = json.loads(kept.read_text(encoding="utf-8"))
        if isinstance(entry, dict) and stamp.items() <= entry.items() and re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
            return str(entry["sha256"])
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time() - before.st_mtime > SETTLED_SECONDS:
        with suppress(OSError):
            _write(kept, json.dumps({**stamp, "sha256": digest}))
    return digest


def needed_files(names: Iterable[str], variant: str | None = None) -> list[str]:
    """The files of a hub repository that `from_pretrained` reads: of all its weights one set of safetensors a folder.

    Of a folder's safetensors those marked `variant` (`model.fp16.safetensors`) are taken where there are any, else the
    unmarked ones. A pipeline's weights are in folders; the checkpoints beside its model_index.json are other formats.
    """
    names = [name for name in names if name.endswith(MATTERS)]
    weights: dict[str, list[str]] = {}
    for name in names:
        if name.endswith(".safetensors") and ("/" in name or "model_index.json" not in names):
            weights.setdefault(name.rpartition("/")[0], []).append(name)
    chosen = [name for name in names if not name.endswith(".safetensors")]
    for beside in weights.values():
        marked = [name for name in beside if variant_of(name) == variant]
        chosen += marked or [name for name in beside if variant_of(name) is None]
    return sorted(chosen)


def variant_of(name: str) -> str | None:
    """`fp16` of `unet/model.fp16-00001-of-00002.safetensors`, None of `unet/model-00001-of-00002.safetensors`."""
    marked = re.fullmatch(r"[^.]+\.([^.]+?)(-\d+-of-\d+)?\.safetensors", name.rpartition("/")[2])
    return marked[1] if marked else None


def _own_folder(model: str, key: str) -> Path | None:
    """The folder `model` names, or None when it is a hub id."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_file():
        raise UserError(
            f"{key}: {model} is a file; name a folder in diffusers' format, which "
            "`StableDiffusionPipeline.from_single_file(file).save_pretrained(folder)` makes of a single checkpoint."
        )
    if not HUB_ID.fullmatch(model):
        raise UserError(f"{key}: there is no folder {model}; name a model folder on this machine or a hub id.")
    return None


def _missing(model: str, revision: str | None, key: str) -> UserError:
    from huggingface_hub import constants

    fetch = f"hf download {model}" + (f" --revision {revision}" if revision else "")
    at = f" at revision {revision}" if revision else ""
    offline = " with HF_HUB_OFFLINE unset" if constants.HF_HUB_OFFLINE else ""
    return UserError(
        f"{key}: {model}{at} is neither a folder nor in the cache {constants.HF_HUB_CACHE}; fetch it with `{fetch}`, "
        f"or set {key.rpartition('.')[0]}.download: true{offline}."
    )


def _ask_hub(model: str, revision: str | None, key: str) -> Any:
    """The hub's record of a model at a revision, its file names included."""
    from huggingface_hub import HfApi

    try:
        return HfApi().model_info(model, revision=revision)
    except Exception as error:  # the network errors of the client's versions have no common base
        raise _unreachable(model, error, key) from error


def _fetch(model: str, revision: str | None, variant: str | None, key: str) -> Path:
    from huggingface_hub import snapshot_download

    info = _ask_hub(model, revision, key)
    names = needed_files((sibling.rfilename for sibling in info.siblings), variant)
    # The name of the revision, not its commit: the cache then knows which commit the name stands for.
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=names))
    except Exception as error:  # the network errors of the client's versions have no common base
        raise _unreachable(model, error, key) from error


def _unreachable(model: str, error: Exception, key: str) -> UserError:
    problem = brief(error)
    return UserError(
        f"{key}: {model} cannot be fetched ({problem}); check the id, the network and, for a gated model, that you are "
        "logged in (`hf auth login`)."
    )


def _whole(folder: Path) -> bool:
    """Whether the parts that a model folder lists are there: components, weights, shards."""
    with suppress(OSError, ValueError):
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        parts = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None]
        return all(_has_weights(folder / name) for name in parts)
    return _has_weights(folder)


def _has_weights(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    model = "config.json" in names  # tokenizers, schedulers and processors have other names for theirs
    return bool(names) and not missing_shards(folder) and (not model or any(n.endswith(".safetensors") for n in names))


def missing_shards(folder: Path) -> set[str]:
    """Names of weight files that an index in the folder lists and that are not there."""
    listed: set[str] = set()
    for index in folder.glob("*.safetensors.index*.json"):
        listed |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return {name for name in listed if not (folder / name).is_file()}


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _kept_hashes() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "e2gan-farm/sha256"


def _write(path: Path, text: str) -> None:
    """Atomically: others may be reading, or writing the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    Path(name).replace(path)
