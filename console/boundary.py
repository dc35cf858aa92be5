"""The one place where errors become messages and exit codes.

0: done; 1: a failure while running, or a fault of Foldrace itself; 2: what the user gave is wrong;
130: interrupted. A traceback is shown with `--debug` alone.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from foldrace.console.progress import progress_shown
from foldrace.console.terminal import Terminal, screen
from foldrace.core.errors import FoldraceError, Interrupted, UserError, cause
from foldrace.core.opening import UnfitFile
from foldrace.core.redaction import starred

_WRONG_PATHS = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)
"""Errors of the operating system about a path that the user gave."""


@contextmanager
def exit_codes(debug: bool, interrupted: str) -> Iterator[None]:
    """Turn whatever is raised into lines on stderr and `typer.Exit` with its code."""
    terminal = Terminal(screen(sys.stderr))
    try:
        with progress_shown(terminal):
            yield
    except KeyboardInterrupt as error:
        terminal.print(interrupted)
        raise typer.Exit(Interrupted.exit_code) from error
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:  # whatever it is, nobody is to see a traceback unasked
        if debug:
            terminal.print_exception()
        lines, code = _told(error)
        for line in lines:
            terminal.print(line)
        raise typer.Exit(code) from error


def _told(error: Exception) -> tuple[list[str], int]:
    """The lines and the exit code of an error."""
    match error:
        case UserError():
            count = len(error.problems)
            problems = (f"- {problem}" for problem in error.problems)
            return [f"{count} problem{'s' if count != 1 else ''}:", *problems], error.exit_code
        case FoldraceError():
            return str(error).splitlines(), error.exit_code
        case MemoryError():
            return ["out of memory: it needs more than there is, or than is allowed"], 1
        case BrokenPipeError():
            return ["nobody reads what is written"], 1
        case OSError():
            wrong = isinstance(error, UnfitFile) or error.errno in _WRONG_PATHS
            where = f"{error.filename}: " if error.filename is not None else ""
            return [starred(f"{where}{error.strerror or error}")], 2 if wrong else 1
    fault = f"internal error: {starred(cause(error))}"
    advice = "this is a fault of Foldrace, not of what you gave it; --debug shows where"
    return [f"{fault}; {advice}"], 1
