"""File systems that fail for a while: a full disk, a lost mount, an object store that is away.

What is asked of one is asked again with growing pauses, for minutes, and people are told.
"""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from foldrace.core.opening import UnfitFile

_Answer = TypeVar("_Answer")
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 15.0  # seconds
_FOR_GOOD = (
    FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError,
    UnfitFile,
)  # fmt: skip
_REFUSED = re.compile("ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY|SIGNATURE", re.IGNORECASE)


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Patience:
    """How long, and who is told."""

    seconds: float
    say: Callable[[str], None] = lambda line: None
    given_up: Callable[[], bool] = _never
    """True once somebody wants the process to end: then it waits no longer."""

    def ask(self, place: str, call: Callable[[], _Answer]) -> _Answer:
        """The answer of `call`, which reads or writes at `place`.

        Raises the last OSError after `seconds`, at once one that waiting does not mend, and
        KeyboardInterrupt where the waiting was given up.
        """
        ends, pause, told = time.monotonic() + self.seconds, _FIRST_PAUSE, False
        while True:
            try:
                answer = call()
            except OSError as error:
                if time.monotonic() + pause > ends or not _may_pass(error):
                    raise
                if not told:
                    self.say(f"{place}: {error}{free_room(place)}; waiting for it, up to "
                             f"{self.seconds:.0f} s")  # fmt: skip
                    told = True
            else:
                if told:
                    self.say(f"{place}: is well again")
                return answer
            _sleep(pause, self.given_up)
            pause = min(2 * pause, _LONGEST_PAUSE)


AT_ONCE = Patience(0.0)
"""No waiting."""


def free_room(place: str) -> str:
    """The free room of the disk that a path lies on, in words; empty where there is none."""
    if "://" in place:
        return ""
    folder = Path(place)
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        return f" ({shutil.disk_usage(folder).free / 1e6:,.1f} MB free)"
    except OSError:
        return ""


def _may_pass(error: OSError) -> bool:
    return not isinstance(error, _FOR_GOOD) and not _REFUSED.search(str(error))


def _sleep(seconds: float, given_up: Callable[[], bool]) -> None:
    """Sleep, and raise KeyboardInterrupt where that is given up."""
    ends, clock = time.monotonic() + seconds, threading.Event()
    while time.monotonic() < ends:
        if given_up():
            raise KeyboardInterrupt
        clock.wait(min(0.2, seconds))
