"""URLs as they may be shown: a database's URL may hold a password.

Takes URLs, gives text for messages and reports.

The exception tree. Each class knows the exit code of the command line.

FoldraceError                 1  a failure while running
├── UserError                 2  what the user gave is wrong; carries every problem found
│   ├── ConfigError              the YAML/JSON file or a --set
│   ├── DataError                tables, images, archives, sample submission
│   ├── EnvironmentProblem       devices, disk, missing package, unreachable weights
│   └── RunFolderError           a folder that exists, is missing, or belongs to another sweep
├── RunFailure                1  no complete candidate, every image unreadable, ...
└── Interrupted             130  Ctrl-C or SIGTERM, after everything finished was saved

Names that people mistype: the nearest allowed ones, and the problem that tells them.

Takes a name and a table, gives a `Problem` or nothing. Imports nothing heavy: the blend uses it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Self


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `where` is a file, a config key or a row; `message` gives the
    bad value, what is allowed and what to do."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


def listing(items: Iterable[object], limit: int = 20) -> str:
    """'a, b, c and 312 more': what a message shows of many."""
    items = iter(items)
    shown = ", ".join(str(item) for item in islice(items, limit))
    more = sum(1 for _ in items)
    return f"{shown} and {more:,} more" if more else shown


class FoldraceError(Exception):
    """Base of every error that the command line turns into a message and an exit code."""

    exit_code = 1


class UserError(FoldraceError):
    """Something that the user can mend. All problems are listed, not only the first."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(p) for p in self.problems))

    @classmethod
    def single(cls, where: str, message: str) -> Self:
        return cls([Problem(where, message)])


class ConfigError(UserError):
    """A key or value of the config file, or of a --set, is wrong."""


class DataError(UserError):
    """A table, an image, an archive or the sample submission is wrong."""


class EnvironmentProblem(UserError):
    """This machine or cluster cannot do what the config asks for."""


class RunFolderError(UserError):
    """The run folder exists, is missing, damaged, or belongs to another sweep."""


class RunFailure(FoldraceError):
    """The run could not produce what it was started for."""


class Interrupted(FoldraceError):
    """The user stopped the run; finished trials are safe in the run folder."""

    exit_code = 130


def closest(name: str, allowed: Iterable[str], n: int = 3) -> list[str]:
    """The names in `allowed` that `name` is probably a misspelling of, best first."""
    return difflib.get_close_matches(name, list(allowed), n=n, cutoff=0.6)


def check_name(where: str, name: str, table: Iterable[str]) -> Problem | None:
    """A problem with the nearest names where the table has no row `name`."""
    names = list(table)
    if name in names:
        return None
    near = closest(name, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return Problem(where, f"got {name!r}; {hint}allowed: {', '.join(names)}")


_OF_USER = re.compile(r"(://[^:/]*):.*@", re.DOTALL)
"""Up to the last @, since a password may hold one that is not escaped."""
_IN_QUERY = re.compile(r"([?&]password=)[^&]*", re.IGNORECASE)


def without_password(url: str) -> str:
    """With *** in its place, also where the URL is malformed."""
    return _IN_QUERY.sub(r"\1***", _OF_USER.sub(r"\1:***@", url))


def has_password(url: str) -> bool:
    return without_password(url) != url
