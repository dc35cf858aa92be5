"""The exception tree. Each class knows the exit code of the command line.

FoldraceError                 1  a failure while running
├── UserError                 2  what the user gave is wrong; carries every problem found
│   ├── ConfigError              the YAML/JSON file or a --set
│   ├── DataError                tables, images, archives, sample submission
│   ├── EnvironmentProblem       devices, disk, missing package, unreachable weights
│   └── RunFolderError           a folder that exists, is missing, or belongs to another sweep
├── RunFailure                1  no complete candidate, every image unreadable, ...
└── Interrupted             130  Ctrl-C or SIGTERM, after everything finished was saved
"""

from __future__ import annotations

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
