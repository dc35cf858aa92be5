"""What `ensemble DIR --add NAME=oof.csv[:test.csv]` may say.

Takes the option's texts, gives one `AddSpec` each, or a ConfigError with all that is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiment.errors import ConfigError, Problem
from experiment.predictions_file import SUFFIXES
from experiment.tables import twice

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_CANDIDATE = re.compile(r"c\d+")
_FORM = "NAME=oof.csv[:test.csv] or NAME=:test.csv, each file a .csv or .npy"


@dataclass(frozen=True)
class AddSpec:
    """One `--add`; at least one of the two files is given."""

    name: str
    oof: Path | None
    test: Path | None


def parse_adds(texts: Sequence[str]) -> tuple[AddSpec, ...]:
    """The values of every `--add`; ConfigError with all that is wrong in them."""
    problems: list[Problem] = []
    specs = tuple(_parse(text, problems) for text in texts)
    for name in twice(spec.name for spec in specs):
        problems.append(Problem("--add", f"the name {name!r} is there twice; give each its own"))
    if problems:
        raise ConfigError(problems)
    return specs


def _parse(text: str, problems: list[Problem]) -> AddSpec:
    """One value, as far as it can be read; what is wrong with it joins `problems`."""
    name, equals, files = text.partition("=")
    oof, *further = files.split(":")
    test = further[0] if further else ""
    for message in _faults(name, oof, test, bool(equals), len(further)):
        problems.append(Problem(f"--add {text}", f"{message}; needed: {_FORM}"))
    return AddSpec(name, _path(oof), _path(test))


def _faults(name: str, oof: str, test: str, equals: bool, colons: int) -> list[str]:
    if not equals:
        return ["has no ="]
    found = []
    if not _NAME.fullmatch(name):
        found.append(
            f"the name {name!r} is not 1 to 64 of A-Z a-z 0-9 . _ - (first a letter or digit)"
        )
    if _CANDIDATE.fullmatch(name):
        found.append(f"the name {name!r} is that of a candidate of the run")
    if colons > 1:
        found.append(f"{colons} colons: one parts the two files, and their paths may hold none")
    if not oof and not test:
        found.append("names no file")
    kinds = [file for file in (oof, test) if file and Path(file).suffix.lower() not in SUFFIXES]
    return [*found, *(f"{file} is neither .csv nor .npy" for file in kinds)]


def _path(text: str) -> Path | None:
    return Path(text).expanduser() if text else None
