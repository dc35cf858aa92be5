"""Errors that a user sees, and how they are worded.

FoldraceError                 1  exit code: a failure while running
├── UserError                 2  what the user gave is wrong; carries every problem found
│   ├── ConfigError              the YAML/JSON file or a --set
│   ├── DataError                tables, images, archives, sample submission
│   ├── EnvironmentProblem       devices, disk, missing package, unreachable weights
│   └── RunFolderError           a folder that exists, is missing, or belongs to another sweep
├── RunFailure                1  no complete candidate, every image unreadable, ...
└── Interrupted             130  Ctrl-C or SIGTERM, after everything finished was saved

Also the line of a traceback that matters. Imports nothing heavy: the blend uses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Self

from foldrace.core.redaction import starred
from foldrace.core.synonyms import did_you_mean

_LONGEST_CAUSE = 400  # characters


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong; secrets of URLs in it are starred."""

    where: str
    """A file, a config key or a row."""
    message: str
    """The bad value, what is allowed and what to do."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "where", starred(self.where))
        object.__setattr__(self, "message", starred(self.message))

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


def cause(error: BaseException) -> str:
    """What an exception of a parser says, in one line."""
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST_CAUSE else f"{text[:_LONGEST_CAUSE]}…"
    plain = isinstance(error, (ValueError, OSError, EOFError)) and text
    return text if plain else f"{type(error).__name__}: {text}".removesuffix(": ")


def listing(items: Iterable[object], limit: int = 20) -> str:
    """Items as a message shows many: 'a, b, c and 312 more'."""
    items = iter(items)
    shown = ", ".join(str(item) for item in islice(items, limit))
    more = sum(1 for _ in items)
    return f"{shown} and {more:,} more" if more else shown


class FoldraceError(Exception):
    """Base of every error that the command line turns into a message and an exit code."""

    exit_code = 1

    def __str__(self) -> str:
        return starred(super().__str__())


class UserError(FoldraceError):
    """Something that the user can mend. All problems are listed, not only the first."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(p) for p in self.problems))

    @classmethod
    def single(cls, where: str, message: str) -> Self:
        """An error with one problem."""
        return cls([Problem(where, message)])


class ConfigError(UserError):
    """A key or value of the config file, or of a --set, is wrong."""


class DataError(UserError):
    """A table, an image, an archive or the sample submission is wrong."""


class EnvironmentProblem(UserError):
    """The machine or cluster cannot do what the config asks for."""


class RunFolderError(UserError):
    """The run folder exists, is missing, damaged, or belongs to another sweep."""


class RunFailure(FoldraceError):
    """The run could not produce what it was started for."""


class Interrupted(FoldraceError):
    """The user stopped the run; finished trials are safe in the run folder."""

    exit_code = 130


def check_name(where: str, name: str, table: Iterable[str]) -> Problem | None:
    """A problem with the nearest names where the table has no row `name`."""
    names = list(table)
    if name in names:
        return None
    return Problem(where, f"got {name!r}; {did_you_mean(name, names)}allowed: {', '.join(names)}")


_TRACEBACK = "Traceback (most recent call last):"


def message_line(text: str) -> str:
    """The line of an error's text that says what went wrong; '' where there is none.

    It is the message's first line, since advice and links come after it. Of tracebacks in the text
    the last counts; its frames are indented.
    """
    lines = [line for line in text.rpartition(_TRACEBACK)[2].splitlines() if line.strip()]
    message = [line for line in lines if not line[0].isspace()]
    return (message or lines[-1:] or [""])[0].strip()
