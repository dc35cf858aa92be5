"""Opening files that others wrote: regular files of bounded size alone.

Takes a path, gives an open file or its bytes. A pipe, a device or a file without an end would let a
command wait, or read, for ever: it raises UnfitFile at once. Users' files are opened nowhere else;
`tests/test_architecture.py` holds that.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

MB, GB = 10**6, 10**9

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class UnfitFile(OSError):
    """A path to anything but a regular file of bounded size; `strerror` says what it is to."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(errno.EINVAL, reason, str(path))


def open_regular(path: Path, most: int) -> BufferedReader:
    """Open a regular file of at most `most` bytes to read; OSError where there is none.

    A link is followed.
    """
    try:
        _require_regular(path, os.stat(path), most)  # before it is opened: a device may act on that
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except ValueError as error:
        raise UnfitFile(path, "has a NUL character in its name") from error
    try:
        _require_regular(path, os.fstat(handle), most)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a regular file of at most `most` bytes; OSError where there is none.

    UnfitFile, too, for one that holds more than its size, as a file that grows, or those of /proc.
    """
    with open_regular(path, most) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(size)
        if file.read(1):
            reason = f"holds more than its size of {size:,} bytes: it grows, or is on no disk"
            raise UnfitFile(path, f"{reason}; allowed: a regular file that stays as it is")
    return data


def file_fault(path: Path) -> str | None:
    """What else a path is than a regular file, as what follows its name; None where it is one."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return "does not exist"
    except (OSError, ValueError) as error:
        return f"is no file: {getattr(error, 'strerror', None) or error}"
    return None if stat.S_ISREG(found.st_mode) else f"is {_kind(found)}"


def unreadable(error: OSError) -> str:
    """Why a file cannot be read, as what follows its name in a message."""
    if isinstance(error, UnfitFile):
        return str(error.strerror)
    return f"cannot be read: {error.strerror or error}"


def _require_regular(path: Path, found: os.stat_result, most: int) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise UnfitFile(
            path, f"is {_kind(found)}; allowed: a regular file of at most {_size(most)}"
        )
    if found.st_size > most:
        raise UnfitFile(path, f"has {_size(found.st_size)}; allowed: at most {_size(most)}")


def _kind(found: os.stat_result) -> str:
    return next((kind for is_kind, kind in _KINDS if is_kind(found.st_mode)), "no file")


def _size(count: int) -> str:
    return f"{count / GB:,.4g} GB" if count >= GB else f"{count / MB:,.4g} MB"
