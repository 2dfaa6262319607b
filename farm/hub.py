"""A published adapter's folder on the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from farm.artifacts import need_artifact
from farm.errors import UserError
from farm.registry import Entry
from farm.signing import NOBODY, Keys
from farm.store import Store

REPO = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Pushed:
    """url: of the commit. files: how many there are in it, and their bytes."""

    url: str
    files: int
    size: int


def push(
    store: Store,
    entry: Entry,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    keys: Keys = NOBODY,
) -> Pushed:
    """Commit the files of a published adapter to the model repository `repo`, `user/name`, made where it is not there.

    Every file is read and checked against the manifest first. The manifest itself stays here: it holds paths of this
    machine. Nor does the base go along, which the model card says. The token is the client's own affair: HF_TOKEN, or
    what `hf auth login` left; HF_ENDPOINT names another hub.

    private: of a repository that is made now. revision: the branch, made where it is not there; `main` when None.
    keys: whose signatures count (`farm.signing`).

    Raises:
        UserError: a file is damaged, the repository's name is none, there is no token, or the hub refuses or is away.
    """
    if not REPO.fullmatch(repo):
        raise UserError(f"--repo: {repo!r} is no repository's name; give it as user/name.")
    artifact = need_artifact(store, entry.adapter, keys)
    files = {name: artifact.read(name) for name in sorted(artifact.manifest.files)}

    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if get_token() is None:
        raise UserError("farm push-hub: there is no token of the hub; run `hf auth login` or set HF_TOKEN.")
    disable_progress_bars()  # an adapter is smaller than the line that would show how far its upload is
    api = HfApi()
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        done = api.create_commit(
            repo,
            [CommitOperationAdd(name, data) for name, data in files.items()],
            commit_message=f"{entry.concept} version {entry.version}",
            commit_description=f"Adapter {entry.digest} of base {entry.base}",
            revision=revision,
        )
    except Exception as error:  # the errors of the client, its network library and its uploader have no common base
        raise _told(error, repo, api.endpoint) from error
    return Pushed(str(done.commit_url), len(files), sum(map(len, files.values())))


def _told(error: Exception, repo: str, endpoint: str) -> UserError:
    status = next((found for found in map(_status, _causes(error)) if found), None)
    if status == 401:
        return UserError(f"{endpoint} does not accept the token; make a new one and run `hf auth login`.")
    if status == 403:
        return UserError(f"{endpoint}: this token may not write to {repo}; use one that may, or another --repo.")
    said = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
    return UserError(
        f"{endpoint}: nothing was put into {repo} ({said}); check the network, HF_ENDPOINT and --repo, and run again."
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """The HTTP status that the hub answered with."""
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    return status
