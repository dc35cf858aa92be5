"""The command line as other users see it in the process list."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from foldrace.core.redaction import without_secrets


def take_arguments() -> list[str]:
    """The arguments of this process, whose secrets are starred in the process list from now on.

    Ray too shows the command line, in its dashboard and logs. What the shell or a scheduler shows
    of its own command cannot be changed from here.
    """
    arguments = sys.argv[1:]
    shown = [without_secrets(argument) for argument in arguments]
    if shown != arguments:
        sys.argv[1:] = shown
        _overwrite(dict(zip(arguments, shown, strict=True)))
    return arguments


def _overwrite(shown: dict[str, str]) -> None:
    """Write over the memory that the kernel shows; its size stays."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return
    start, end = int(fields[45]), int(fields[46])  # 0 where the kernel does not tell
    if start == 0:
        return
    known = {os.fsencode(old): os.fsencode(new) for old, new in shown.items()}
    old = ctypes.string_at(start, end - start)
    parts = [known.get(part, part)[: len(part)].ljust(len(part), b"*") for part in old.split(b"\0")]
    ctypes.memmove(start, b"\0".join(parts), end - start)
