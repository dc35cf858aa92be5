"""Rows of a user's own in the tables of parts: losses, backbones, metrics and so on.

Takes plugin files and the tables that may grow, changes those tables, gives every problem with its
file and line. The tables hold the rows of the files that were loaded last, and of no others.
"""

from __future__ import annotations

import ast
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from foldrace.core.errors import ConfigError, Problem, RunFailure, UserError
from foldrace.core.plugin_files import (
    PluginFile,
    error_line,
    error_with_place,
    import_plugins,
    place_of,
    read_plugins,
)

Row = TypeVar("Row")
PARTS = "PARTS"


@dataclass(frozen=True)
class PluginTable(Generic[Row]):
    """One table that plugins may add rows to."""

    record: type[Row]
    noun: str
    table: dict[str, Row]
    try_row: Callable[[Row], None]
    """Function that uses a row on something tiny; raises what the row raises, or UnfitRow."""
    key: str = "name"
    """Field of the record that is the key of the table."""


class PluginFailure(RunFailure):
    """A plugin's code raised; the message says where, and what."""


class UnfitRow(Exception):
    """A row ran, but what it gave is not what its table promises."""


@dataclass(frozen=True)
class Part:
    """A row that a plugin gives, with the line where it stands."""

    row: Any
    file: PluginFile
    line: int

    @property
    def where(self) -> str:
        """The `where` of a problem with this row."""
        return self.file.at(self.line)


@dataclass(frozen=True)
class _PluginRows:
    """The rows that the loaded files added to one table."""

    table: dict[str, Any]
    parts: dict[str, Part]
    problems: list[Problem]


@dataclass(frozen=True)
class _PluginState:
    """Plugin files of this process with their rows; `added` is by the record of the table."""

    files: tuple[PluginFile, ...] = ()
    parts: tuple[Part, ...] = ()
    problems: tuple[Problem, ...] = ()
    added: dict[type, _PluginRows] = field(default_factory=dict)


_now = _PluginState()
_lock = threading.RLock()


def load(files: Sequence[PluginFile], kinds: Sequence[PluginTable[Any]]) -> list[Problem]:
    """Add the files' rows to the tables of `kinds`, in place of those of other files.

    Files that are loaded already are not run again. Rows of other kinds are left out.
    """
    with _lock:
        if tuple(files) != _now.files:
            _replace(tuple(files))
        problems = list(_now.problems)
        for kind in kinds:
            if kind.record not in _now.added:
                _now.added[kind.record] = _add_rows(kind)
            problems += _now.added[kind.record].problems
        return problems


def check(paths: Sequence[str], kinds: Sequence[PluginTable[Any]]) -> list[Problem]:
    """Load the files as far as they are right, try every row, and give every problem."""
    files, problems = read_plugins(paths)
    problems += load(files, kinds)
    for part in _now.parts:
        kind = _kind_of(part.row, kinds)
        if kind is None:
            allowed = ", ".join(k.record.__name__ for k in kinds)
            message = f"{PARTS} holds {_shown(part.row)}; allowed are records: {allowed}"
            problems.append(Problem(part.where, message))
        elif part in _now.added[kind.record].parts.values():
            problems += _fault(part, kind)
    return list(dict.fromkeys(problems))


def loaded() -> tuple[PluginFile, ...]:
    """The files whose rows are in the tables; load them in another process to have them there."""
    return _now.files


@contextlib.contextmanager
def naming_plugins() -> Iterator[None]:
    """Turn an error out of a plugin's code into a PluginFailure with its file and line."""
    try:
        yield
    except (UserError, RunFailure):
        raise
    except Exception as error:  # a user's part may raise anything; what is not a plugin's passes on
        if place_of(error) is None:
            raise
        raise PluginFailure(error_with_place(error)) from error


def require(problems: Sequence[Problem]) -> None:
    """Raise a ConfigError where there are problems."""
    if problems:
        raise ConfigError(problems)


def _replace(files: tuple[PluginFile, ...]) -> None:
    global _now
    for added in _now.added.values():
        for name in added.parts:
            del added.table[name]
    parts: list[Part] = []
    problems: list[Problem] = []
    _now = _PluginState()  # stays where importing is interrupted
    for file, module in import_plugins(files).items():
        found = module if isinstance(module, Problem) else _parts(file, module)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            parts += found
    _now = _PluginState(files, tuple(parts), tuple(problems))


def _parts(file: PluginFile, module: object) -> list[Part] | Problem:
    """The rows that a module offers."""
    lines = _lines(file)
    rows = getattr(module, PARTS, None)
    if not isinstance(rows, (list, tuple)):
        found = "defines no PARTS" if rows is None else f"has PARTS = {_shown(rows)}"
        return Problem(
            file.at(lines[0]) if rows is not None else file.path,
            f"{found}; it should end in PARTS = [<record>, ...], a list of the rows it adds, or "
            "PARTS = [] where it only helps other plugins",
        )
    each = lines[1:] if len(lines) == len(rows) + 1 else lines[:1] * len(rows)
    return [Part(row, file, line) for row, line in zip(rows, each, strict=True)]


def _lines(file: PluginFile) -> list[int]:
    """The line of the last `PARTS = ...`, then those of the entries where they are written out."""
    lines = [1]
    for node in ast.parse(file.source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(t, ast.Name) and t.id == PARTS for t in targets):
            value = getattr(node, "value", None)
            entries = value.elts if isinstance(value, (ast.List, ast.Tuple)) else []
            lines = [node.lineno, *(entry.lineno for entry in entries)]
    return lines


def _add_rows(kind: PluginTable[Any]) -> _PluginRows:
    added: dict[str, Part] = {}
    problems: list[Problem] = []
    for part in _now.parts:
        if not isinstance(part.row, kind.record):
            continue
        name = getattr(part.row, kind.key)
        if not isinstance(name, str) or not name:
            message = f"{kind.noun}: {kind.key} is {_shown(name)}, should be a text"
            problems.append(Problem(part.where, message))
        elif name in kind.table:
            owner = f"in {added[name].where}" if name in added else "in Foldrace itself"
            names = ", ".join(n for n in kind.table if n not in added)
            message = f"{kind.noun} {name!r} exists already, {owner}; choose a name beside {names}"
            problems.append(Problem(part.where, message))
        else:
            kind.table[name] = part.row
            added[name] = part
    return _PluginRows(kind.table, added, problems)


def _fault(part: Part, kind: PluginTable[Any]) -> list[Problem]:
    """The problem of a row that was tried, at the line that raised it, else at the row's."""
    name = getattr(part.row, kind.key)
    try:
        kind.try_row(part.row)
    except UnfitRow as error:
        return [Problem(part.where, f"{kind.noun} {name!r} {error}")]
    except Exception as error:  # a user's part may raise anything
        where = place_of(error) or part.where
        return [Problem(where, f"{kind.noun} {name!r}, tried, raises {error_line(error)}")]
    return []


def _kind_of(row: object, kinds: Sequence[PluginTable[Any]]) -> PluginTable[Any] | None:
    return next((kind for kind in kinds if isinstance(row, kind.record)), None)


def _shown(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
