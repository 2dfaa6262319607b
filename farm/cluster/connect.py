"""Connecting to Ray."""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from farm.cluster.placement import preflight
from farm.config import BaseConfig, ClusterConfig
from farm.errors import UserError


@contextmanager
def connected(config: ClusterConfig, base: BaseConfig | None = None) -> Iterator[None]:
    """Connect to the configured Ray cluster, or start one on this machine for as long as the block lasts.

    base: when given, its workers must fit on the nodes all at once.

    Raises:
        UserError: Ray does not start here, or the cluster does not answer or refuses the token, or cannot ever place
            what the stages ask for.
    """
    import ray
    from ray.exceptions import AuthenticationError

    if ray.is_initialized():
        preflight(config, base)
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray reads this when it is first imported: on one machine its own ports then listen on loopback alone.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints a table even at verbose=0
    # Ray 2.60 warns at every start that it will stop hiding GPUs from workers that asked for none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Services that only speak as S3 does may never answer a put with the checksums that pyarrow, by which Ray Train and
    # Ray Tune write, would add. Workers on other machines have it from their own environment.
    os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    named = config.address or os.environ.get("RAY_ADDRESS")
    address = None if named in (None, "", "local") else named
    if address and (problem := silent(address)):
        raise UserError(f"cluster.address: {problem}")
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    keep_token_private(make=not address)
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            ray.init(address="local", num_cpus=config.cpus or os.cpu_count(), include_dashboard=False, **quiet)
    except (ConnectionError, AuthenticationError) as error:  # to Ray, one that refuses the token is often one not there
        raise UserError(
            f"cluster.address: the Ray at {address} does not take this machine in; export RAY_AUTH_MODE=token and copy "
            "its head's ~/.ray/auth_token here."
        ) from error
    except Exception as error:  # when its own processes do not come up in time, Ray raises bare ones
        if address:
            raise
        why = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"cluster: Ray does not start on this machine ({why}): `farm doctor` looks at what it needs; where the "
            "machine is only busy, the same command goes on later."
        ) from error
    try:
        preflight(config, base)
        yield
    finally:
        ray.shutdown()


def silent(address: str) -> str | None:
    """Why nothing answers at a cluster's address, None when something does. Ray itself would try for many minutes."""
    from ray._private.services import canonicalize_bootstrap_address

    try:
        at = canonicalize_bootstrap_address(address) if address == "auto" else address.removeprefix("ray://")
        host, _, port = str(at).rpartition(":")
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:  # Ray's own ConnectionError is one of the first
        return f"no Ray cluster answers at {address} ({error}): start one with `ray start --head`."
    return None


def keep_token_private(*, make: bool) -> None:
    """Let nobody else read Ray's token, `~/.ray/auth_token`; Ray itself writes it readable by everyone.

    make: write a new one, as Ray does when it starts a cluster, where there is none and none is named elsewhere.
    """
    token = Path.home() / ".ray" / "auth_token"
    named = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    used = os.environ.get("RAY_AUTH_MODE", "token").lower() == "token"
    if make and used and not named and not token.exists():
        token.parent.mkdir(mode=0o700, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=token.parent) as whole:  # its mode is 0600 from the beginning
            whole.write(secrets.token_hex(32))
            whole.flush()
            with suppress(FileExistsError):  # another process has just made one: both must use the same
                os.link(whole.name, token)
    if token.exists() and token.stat().st_mode & 0o077:
        token.chmod(0o600)
