"""Folders that this user alone can enter, since what lies in them is trusted later."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from foldrace.core.errors import EnvironmentProblem


def private_folder(path: Path, remedy: str) -> Path:
    """The folder, made where there is none, and closed to other users (0700).

    Raises EnvironmentProblem with the `remedy` where it, or a link to it, is another user's.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    own = os.geteuid()
    for found in (os.lstat(path), os.stat(path)):
        if found.st_uid != own:
            raise EnvironmentProblem.single(
                str(path),
                f"is a folder of {_name(found.st_uid)}, not yours ({_name(own)}), who could change "
                f"what is in it; {remedy}",
            )
    if found.st_mode & 0o077:
        path.chmod(0o700)
    return path


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # of a container without names
        return f"user {uid}"
