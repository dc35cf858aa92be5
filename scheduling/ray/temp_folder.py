"""The folder for temporary files: sockets of loader processes lie below it, whose path is short.

Ray's own sockets lie elsewhere: see `private_cluster`.
"""

from __future__ import annotations

import os
import tempfile

_LONGEST = 107  # bytes of a Unix socket's path
_OF_LOADERS = "/pymp-abcdefgh/listener-abcdefgh"


def loader_folder_fault() -> str | None:
    """A sentence about this machine's folder if loader processes cannot hand their batches over."""
    folder = tempfile.gettempdir()
    length, most = len(os.fsencode(folder)), _LONGEST - len(_OF_LOADERS)
    if length <= most:
        return None
    return (
        f"TMPDIR={folder} is {length} bytes long; allowed: at most {most}, since sockets of the "
        f"processes that load images lie below it, whose path may have {_LONGEST}; set TMPDIR to a "
        "short folder, such as /tmp"
    )
