"""Tables of parts, and the rows of a user's own beside them: losses, backbones, metrics and so on.

`Table` holds the built-in rows of a kind, which never change. `Parts` holds the rows of a run's
plugin files: it is made once and passed to whatever looks a name up, so that runs with other
plugins live in one process. Every problem is given with its file and line.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
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


class Table(Mapping[str, Row]):
    """The built-in rows of one kind by their names; a plugin's stand beside them in `Parts`."""

    def __init__(
        self, record: type[Row], noun: str, rows: Iterable[Row], key: str = "name"
    ) -> None:
        """`noun` names a row in messages; `key` is the field of the record that is its name."""
        self.record, self.noun, self.key = record, noun, key
        self._rows = MappingProxyType({self.name_of(row): row for row in rows})

    def name_of(self, row: Row) -> str:
        """The row's name."""
        name: str = getattr(row, self.key)
        return name

    def __getitem__(self, name: str) -> Row:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


@dataclass(frozen=True, eq=False)
class Part:
    """A row that a plugin gives."""

    row: Any
    where: str
    """File and line in which it stands."""


@dataclass(frozen=True, eq=False)
class Parts:
    """The rows that a run's plugins add to the tables: `parts[LOSSES]["poly1"]`."""

    files: tuple[PluginFile, ...] = ()
    own: tuple[Part, ...] = ()

    def __getitem__(self, table: Table[Row]) -> Mapping[str, Row]:
        """The built-in rows, then those of the plugins, by name."""
        own = [(table.name_of(p.row), p.row) for p in self.own if isinstance(p.row, table.record)]
        return {**table, **{n: row for n, row in own if isinstance(n, str) and n not in table}}

    def __reduce__(self) -> tuple[Callable[..., Parts], tuple[tuple[PluginFile, ...]]]:
        """Another process runs the files itself."""
        return _parts_of, (self.files,)


NO_PARTS = Parts()
"""The built-in rows alone."""


@dataclass(frozen=True)
class PluginTable(Generic[Row]):
    """A table that plugins may add rows to."""

    table: Table[Row]
    try_row: Callable[[Row], None]
    """Function that uses a row on something tiny; raises what the row raises, or UnfitRow."""


class PluginFailure(RunFailure):
    """A plugin's code raised; the message says where, and what."""


class UnfitRow(Exception):
    """A row ran, but what it gave is not what its table promises."""


def load_parts(files: Sequence[PluginFile], kinds: Sequence[PluginTable[Any]]) -> Parts:
    """The rows of plugin files.

    Raises ConfigError where a file cannot be run here, or where a row of `kinds` has no name or one
    that is taken.
    """
    parts, problems = _load(files)
    problems += _name_problems(parts, kinds).values()
    if problems:
        raise ConfigError(problems)
    return parts


def check_plugins(
    paths: Sequence[str], kinds: Sequence[PluginTable[Any]]
) -> tuple[Parts, list[Problem]]:
    """Load the files as far as they are right, try every row, and give every problem."""
    files, problems = read_plugins(paths)
    parts, found = _load(files)
    problems += found
    misnamed = _name_problems(parts, kinds)
    for part in parts.own:
        kind = next((k for k in kinds if isinstance(part.row, k.table.record)), None)
        if kind is None:
            allowed = ", ".join(k.table.record.__name__ for k in kinds)
            message = f"{PARTS} holds {_shown(part.row)}; allowed are records: {allowed}"
            problems.append(Problem(part.where, message))
        elif part in misnamed:
            problems.append(misnamed[part])
        else:
            problems += _fault(part, kind)
    return parts, list(dict.fromkeys(problems))


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


def _parts_of(files: tuple[PluginFile, ...]) -> Parts:
    return _load(files)[0]


def _load(files: Sequence[PluginFile]) -> tuple[Parts, list[Problem]]:
    own: list[Part] = []
    problems: list[Problem] = []
    for file, module in import_plugins(files).items():
        found = module if isinstance(module, Problem) else _rows_of(file, module)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            own += found
    return Parts(tuple(files), tuple(own)), problems


def _rows_of(file: PluginFile, module: object) -> list[Part] | Problem:
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
    return [Part(row, file.at(line)) for row, line in zip(rows, each, strict=True)]


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


def _name_problems(parts: Parts, kinds: Sequence[PluginTable[Any]]) -> dict[Part, Problem]:
    """Problems of rows without a name, or with one that another row has."""
    problems: dict[Part, Problem] = {}
    for table in (kind.table for kind in kinds):
        owners = dict.fromkeys(table, "Foldrace itself")
        for part in (part for part in parts.own if isinstance(part.row, table.record)):
            name = table.name_of(part.row)
            if not isinstance(name, str) or not name:
                message = f"{table.noun}: {table.key} is {_shown(name)}, should be a text"
                problems[part] = Problem(part.where, message)
            elif name in owners:
                message = f"{table.noun} {name!r} exists already, in {owners[name]}"
                advice = f"choose a name beside {', '.join(table)}"
                problems[part] = Problem(part.where, f"{message}; {advice}")
            else:
                owners[name] = part.where
    return problems


def _fault(part: Part, kind: PluginTable[Any]) -> list[Problem]:
    """The problem of a row that was tried, at the line that raised it, else at the row's."""
    row = f"{kind.table.noun} {kind.table.name_of(part.row)!r}"
    try:
        kind.try_row(part.row)
    except UnfitRow as error:
        return [Problem(part.where, f"{row} {error}")]
    except Exception as error:  # a user's part may raise anything
        return [Problem(place_of(error) or part.where, f"{row}, tried, raises {error_line(error)}")]
    return []


def _shown(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
