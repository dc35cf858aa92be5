"""The folder for temporary files: sockets lie below it, and a socket's path is short.

Gives problems of the folder where Ray would start, and of a node's for its loader processes.
"""

from __future__ import annotations

import os
import tempfile

from foldrace.core.errors import Problem

_LONGEST = 107  # bytes of a Unix socket's path
_OF_RAY = "/ray/session_2026-01-31_23-59-59_000000_{}/sockets/plasma_store"  # {}: the driver's id
_OF_LOADERS = "/pymp-abcdefgh/listener-abcdefgh"


def ray_folder_problem() -> Problem | None:
    """The problem of a folder where this process cannot start Ray, as Ray chooses the folder."""
    variable = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    folder = os.environ.get(variable, "/tmp")
    fault = _fault(folder, _OF_RAY.format(os.getpid()), "Ray's sockets")
    return None if fault is None else Problem(f"{variable}={folder}", fault)


def loader_folder_fault() -> str | None:
    """A sentence about this machine's folder if loader processes cannot hand their batches over."""
    folder = tempfile.gettempdir()
    fault = _fault(folder, _OF_LOADERS, "sockets of the processes that load images")
    return None if fault is None else f"TMPDIR={folder} {fault}"


def _fault(folder: str, names: str, sockets: str) -> str | None:
    length, most = len(os.fsencode(folder)), _LONGEST - len(names)
    if length <= most:
        return None
    return (
        f"is {length} bytes long; allowed: at most {most}, since {sockets} lie below it, whose "
        f"path may have {_LONGEST}; set TMPDIR to a short folder, such as /tmp"
    )
