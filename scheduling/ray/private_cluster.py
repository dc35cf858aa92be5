"""What keeps the cluster that is started on this machine to the user who starts it.

Ray would listen on all addresses of the machine and keep its sessions where every user can write.
Here it listens on the loopback address alone, asks for a token, which nobody else can read, and
keeps its sessions in a folder that nobody else can enter.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray._common.utils import get_default_system_temp_dir
from ray._private import ray_constants

from foldrace.core.errors import EnvironmentProblem
from foldrace.core.private_folder import private_folder

_LOOPBACK = ("127.0.0.1", "::1")
_MODE = "RAY_AUTH_MODE"
_LONGEST = 37  # letters of `_temp_dir`; Linux allows a socket 107, and Ray's lie 70 further down

_log = logging.getLogger("foldrace")


@contextmanager
def private_cluster() -> Iterator[str]:
    """Give the folder for the sessions of a Ray that is started in the block (its `_temp_dir`).

    Raises EnvironmentProblem where the environment turns the token off, or where the folder is
    another user's.
    """
    _require_token()
    folder = session_folder()
    # Ray asks this where the machine's own address would be; as an argument it replaces 127.0.0.1.
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield str(folder)
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
    if not on_loopback():
        _log.warning("Ray %s listens beyond this machine: see docs/cluster.md", ray.__version__)


def on_loopback() -> bool:
    """True where this process's cluster has this machine alone, and listens on no other address."""
    return ray.util.get_node_ip_address() in _LOOPBACK  # type: ignore[no-untyped-call]


def session_folder() -> Path:
    """A folder within one that is closed to others: Ray opens its own to everybody."""
    name = f"foldrace-{os.geteuid()}"
    folder = Path(get_default_system_temp_dir()) / name / "ray"  # type: ignore[no-untyped-call]
    if len(os.fsencode(folder)) > _LONGEST:
        folder = Path("/tmp") / name / "ray"
    private_folder(folder.parent, "remove it, or set RAY_TMPDIR to a short folder of your own")
    return folder


def _require_token() -> None:
    """Have a token that only this user can read; EnvironmentProblem where it is turned off."""
    mode = os.environ.get(_MODE)
    if mode is not None and mode.lower() != "token":
        raise EnvironmentProblem.single(
            _MODE,
            f"got {mode!r}, with which every user of this machine could run code as you through "
            "Ray's ports; unset it, or set it to token",
        )
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    path = Path.home() / ".ray" / "auth_token"
    try:
        if not path.exists():
            _write_token(path)
        found = path.stat()
        if found.st_mode & 0o077 and found.st_uid == os.geteuid():
            path.chmod(0o600)  # Ray writes it for all to read
    except OSError as error:
        raise EnvironmentProblem.single(
            str(path),
            f"cannot hold the token that Ray is to ask for: {error}; set RAY_AUTH_TOKEN_PATH to a "
            "file with one that only you can read",
        ) from error


def _write_token(path: Path) -> None:
    """Write a new token, whole or not at all, unless another process was faster."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = path.with_name(f".auth_token-{secrets.token_hex(8)}")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        try:
            os.link(part, path)
        except FileExistsError:
            pass
        except OSError:  # a disk without links
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)
