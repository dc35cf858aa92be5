"""Errors that a user sees, and how they are worded.

FoldraceError                 1  exit code: a failure while running
├── UserError                 2  what the user gave is wrong; carries every problem found
│   ├── ConfigError              the YAML/JSON file or a --set
│   ├── DataError                tables, images, archives, sample submission
│   ├── EnvironmentProblem       devices, disk, missing package, unreachable weights
│   └── RunFolderError           a folder that exists, is missing, or belongs to another sweep
├── RunFailure                1  no complete candidate, every image unreadable, ...
└── Interrupted             130  Ctrl-C or SIGTERM, after everything finished was saved

Also the line of a traceback that matters, and the name that a mistyped one was meant to be. Imports
nothing heavy: the blend uses it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Self

from foldrace.core.redaction import starred

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


def closest(name: str, allowed: Iterable[str], n: int = 3) -> list[str]:
    """The names in `allowed` that `name` is probably a misspelling of, best first."""
    return difflib.get_close_matches(name, list(allowed), n=n, cutoff=0.6)


SYNONYMS: dict[str, tuple[str, ...]] = {
    "architectures": ("backbones",), "batch": ("batch_size",), "bs": ("batch_size",),
    "bayesian": ("tpe",), "ce": ("cross_entropy",), "crossentropyloss": ("cross_entropy",),
    "cutmix": ("cutmix_alpha", "cutmix_prob"), "ema": ("ema_epochs",),
    "gpus": ("gpus_per_trial",), "gradclip": ("clip_grad",),
    "gradientclipping": ("clip_grad",), "imgsize": ("image_size",), "imgsz": ("image_size",),
    "inputsize": ("image_size",), "learningrate": ("lr",), "lr0": ("lr",),
    "lrscheduler": ("schedule",), "maxgradnorm": ("clip_grad",),
    "mixup": ("mixup_alpha", "mixup_prob"), "model": ("backbones",), "models": ("backbones",),
    "nfolds": ("k",), "nll": ("cross_entropy",), "nsplits": ("k",), "ntrials": ("candidates",),
    "numepochs": ("epochs",), "onecyclelr": ("one_cycle",), "rdrop": ("rdrop_alpha",),
    "reducelronplateau": ("plateau",), "resolution": ("image_size",), "sam": ("sam_rho",),
    "scheduler": ("schedule",), "smoothing": ("label_smoothing",),
    "stochasticdepth": ("drop_path",), "timelimit": ("time_budget",), "trials": ("candidates",),
    "wd": ("weight_decay",),
}  # fmt: skip
"""Name in other tools -> our names for the same, where they are not similar."""

_NO_EARLY_STOPPING = (
    "no trial stops early by itself: all folds of a candidate keep the last epoch, and the race "
    "sets poor candidates aside; "
)
MISSING = {
    "earlystopping": _NO_EARLY_STOPPING,
    "patience": _NO_EARLY_STOPPING,
    "longerside": "stored images are bounded by their shorter side: set cache.shorter_side; ",
}
"""Name that there is nothing for -> why."""


def plain_name(name: str) -> str:
    """A name as tables of synonyms have it: small letters, no `_` or `-`."""
    return re.sub(r"[-_ ]", "", name.lower())


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """'did you mean 'lr'? ', from synonyms and similar names; empty where nothing is near.

    For a name that there is nothing for, the reason instead.
    """
    if plain_name(name) in MISSING:
        return MISSING[plain_name(name)]
    names = list(allowed)
    meant = [n for n in SYNONYMS.get(plain_name(name), ()) if n in names]
    near = meant or closest(name, names, n=1)
    return f"did you mean {' and '.join(map(repr, near))}? " if near else ""


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
