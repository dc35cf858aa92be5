"""Probabilities that were made elsewhere: a CSV with ids, or an npy in the order of the run.

Takes a path and the rows that it should hold, gives (n, C) in their order, or adds every problem
to a list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foldrace.core.errors import Problem, cause, listing
from foldrace.core.opening import GB, file_fault, open_regular, unreadable
from foldrace.dataset.readers import READERS, TABLE_KINDS
from foldrace.dataset.tables import Table, clean, read_table, twice

SUFFIXES = (*READERS, ".npy")

MOST_BYTES = 10 * GB  # a million rows of 1,000 classes in float64 have 8 GB
_SUM_TOLERANCE = 1e-3  # a row may miss 1 by so much, for float16 does
_SHOWN = 5  # cells, rows or names of each kind of problem; the rest are counted
_LOG_TOLERANCE = 1e-2  # of the sum that rows of float16 logarithms have
_ABOVE_ONE = 1e-6  # rounding may lift a float32 probability above 1 by so much


@dataclass(frozen=True)
class ExpectedRows:
    """Rows that a table of predictions should hold, each once."""

    kind: str
    """Name of one row in messages: 'scored row'."""
    ids: tuple[str, ...]
    """Ids in the order that is given back; no two are alike."""
    id_columns: tuple[str, ...]
    """Names that a CSV's column of ids may have; the first that is there is taken."""
    order: str
    """Name of the order of an npy's rows in messages."""
    classes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and classes, (n, C)."""
        return len(self.ids), len(self.classes)


def read_predictions(
    path: Path, expected: ExpectedRows, problems: list[Problem]
) -> NDArray[np.float64] | None:
    """Probabilities (n, C) in the order of `expected`, rows scaled to sum to 1.

    None where there are problems, which are added to the list.
    """
    fault = file_fault(path)
    if fault is not None:
        message = f"{fault}; needed: a {TABLE_KINDS} or an .npy of predictions"
        problems.append(Problem(str(path), message))
        return None
    before = len(problems)
    read = _read_npy if path.suffix.lower() == ".npy" else _read_table
    values = read(path, expected, problems)
    if values is None or len(problems) > before:
        return None
    return np.asarray(values / values.sum(axis=1, keepdims=True))


def _read_npy(
    path: Path, expected: ExpectedRows, problems: list[Problem]
) -> NDArray[np.float64] | None:
    try:
        with open_regular(path, MOST_BYTES) as file:
            array: NDArray[np.generic] = np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        problems.append(Problem(str(path), unreadable(error)))
        return None
    except Exception as error:  # damaged headers have many ways to fail
        message = f"is no readable npy file: {cause(error)}; use np.save"
        problems.append(Problem(str(path), message))
        return None
    fits = array.shape == expected.shape
    if not fits or not np.issubdtype(array.dtype, np.floating):
        message = (
            f"has the shape {array.shape} and the type {array.dtype}; needed: {expected.shape} "
            f"floating-point numbers, rows in the order of {expected.order}, columns in the order "
            "of classes.json"
        )
        problems.append(Problem(str(path), message))
    if array.shape[1:] != expected.shape[1:] or not np.issubdtype(array.dtype, np.floating):
        return None
    values = array.astype(np.float64)
    problems += _value_problems(
        str(path),
        values,
        expected.classes,
        row_name=lambda row: f"row {row} ({expected.ids[row]})" if fits else f"row {row}",
        cell=lambda row, column: str(values[row, column]),
    )
    return values if fits else None


def _read_table(
    path: Path, expected: ExpectedRows, problems: list[Problem]
) -> NDArray[np.float64] | None:
    table = read_table(path, str(path), problems)
    if table is None:
        return None
    id_column = _id_column(table, expected)
    found = [*_wrong_columns(table, id_column, expected), *_wrong_ids(table, id_column, expected)]
    problems += found
    if _lacks_classes(table, expected):
        return None
    columns = [table.columns.index(name) for name in expected.classes]
    values = _numbers(table, columns)
    problems += _value_problems(
        table.name,
        values,
        expected.classes,
        row_name=lambda row: f"line {table.lines[row]}",
        cell=lambda row, column: repr(table.rows[row][columns[column]]),
    )
    if found or id_column is None:
        return None
    row_of = {key: row for row, key in enumerate(_keys(table, id_column))}
    return values[[row_of[_key(name)] for name in expected.ids]]


def _id_names(expected: ExpectedRows) -> list[str]:
    """Names that a column of ids may have."""
    names = dict.fromkeys(clean(name) for name in expected.id_columns)
    return [name for name in names if name not in expected.classes]


def _id_column(table: Table, expected: ExpectedRows) -> int | None:
    """Index of the column of ids, or None."""
    names = (name for name in _id_names(expected) if name in table.columns)
    return next((table.columns.index(name) for name in names), None)


def _lacks_classes(table: Table, expected: ExpectedRows) -> bool:
    return any(table.columns.count(name) != 1 for name in expected.classes)


def _wrong_columns(
    table: Table, id_column: int | None, expected: ExpectedRows
) -> Iterator[Problem]:
    if id_column is None:
        allowed = ", ".join(map(repr, _id_names(expected)))
        first = listing(map(repr, table.columns), _SHOWN)
        message = f"has no column of ids; its columns: {first}; allowed names: {allowed}"
        yield Problem(table.name, message)
    others = set(_id_names(expected))
    rest = [c for i, c in enumerate(table.columns) if i != id_column and c not in others]
    for message, names in (
        ("classes without a column", [c for c in expected.classes if c not in table.columns]),
        ("columns that are no class", [c for c in rest if c not in expected.classes]),
        ("columns that are there twice", twice(rest)),
    ):
        if names:
            advice = "it needs a column of ids and one for each class"
            yield Problem(table.name, f"{message}: {listing(names, _SHOWN)}; {advice}")


def _wrong_ids(table: Table, id_column: int | None, expected: ExpectedRows) -> Iterator[Problem]:
    if id_column is None:
        return
    lines: dict[str, list[int]] = {}
    for line, key in zip(table.lines, _keys(table, id_column), strict=True):
        lines.setdefault(key, []).append(line)
    wanted = {_key(name) for name in expected.ids}
    unknown = [f"{key!r} (line {at[0]})" for key, at in lines.items() if key not in wanted]
    if unknown:
        message = f"ids that are no {expected.kind} of this run: {listing(unknown, _SHOWN)}"
        advice = f"remove these rows; the run's ids look like {expected.ids[0]!r}"
        yield Problem(table.name, f"{message}; {advice}")
    missing = [name for name in expected.ids if _key(name) not in lines]
    if missing:
        message = f"{len(missing):,} of {len(expected.ids):,} {expected.kind}s are not in it"
        yield Problem(table.name, f"{message}: {listing(missing, _SHOWN)}; each needs a row")
    doubled = [f"{key!r} (lines {listing(at)})" for key, at in lines.items() if len(at) > 1]
    if doubled:
        message = f"ids that are there twice: {listing(doubled, _SHOWN)}; keep one row of each"
        yield Problem(table.name, message)


def _keys(table: Table, id_column: int) -> list[str]:
    return [_key(row[id_column]) for row in table.rows]


def _key(name: str) -> str:
    """An id as compared: Windows writes paths with another slash."""
    return clean(name).replace("\\", "/")


def _numbers(table: Table, columns: Sequence[int]) -> NDArray[np.float64]:
    """Numbers (rows, columns); NaN where a cell is no number."""
    values = np.empty((len(table.rows), len(columns)))
    for target, row in zip(values, table.rows, strict=True):
        cells = [row[column] for column in columns]
        try:
            target[:] = cells
        except ValueError:  # one by one, to tell which
            target[:] = [_number(cell) for cell in cells]
    return values


def _number(cell: str) -> float:
    try:
        return float(cell.replace(",", "."))  # as Excel writes it in half the world
    except ValueError:
        return float("nan")


def _value_problems(
    where: str,
    values: NDArray[np.float64],
    classes: Sequence[str],
    row_name: Callable[[int], str],
    cell: Callable[[int, int], str],
) -> Iterator[Problem]:
    """The problems of the numbers (n, C); `cell` gives a number as written."""
    wrong = ~((values >= 0.0) & (values <= 1.0 + _ABOVE_ONE))
    if wrong.any():
        cells = (
            f"{row_name(int(r))}, column {classes[c]!r}: {cell(int(r), int(c))}"
            for r, c in np.argwhere(wrong)
        )
        shown, hint = listing(cells, _SHOWN), _hint(values, wrong)
        message = f"values that are no probability: {shown}; allowed: numbers from 0 to 1{hint}"
        yield Problem(where, message)
    sums = np.where(wrong, np.nan, values).sum(axis=1)  # NaN: reported already
    odd = np.flatnonzero(np.abs(sums - 1.0) > _SUM_TOLERANCE)
    if len(odd):
        shown = listing((f"{row_name(int(r))}: {sums[r]:.6g}" for r in odd), _SHOWN)
        message = f"rows that do not sum to 1: {shown}; allowed: 1 ± {_SUM_TOLERANCE}"
        yield Problem(where, f"{message}, so divide each row by its sum")


def _hint(values: NDArray[np.float64], wrong: NDArray[np.bool_]) -> str:
    """Advice where most rows of the numbers (n, C) are wrong in one way, else ''."""
    rows = values[wrong.any(axis=1) & ~np.isnan(values).any(axis=1)]
    if len(rows) <= len(values) / 2:
        return ""
    with np.errstate(over="ignore", invalid="ignore"):
        percent = np.abs(rows.sum(axis=1) - 100.0) <= 100 * _SUM_TOLERANCE
        logs = np.abs(np.exp(rows).sum(axis=1) - 1.0) <= _LOG_TOLERANCE
    if percent.mean() > 0.5 and rows.min() >= 0:
        return "; these look like percent: divide them by 100"
    if logs.mean() > 0.5:
        return "; these look like log-probabilities: give exp of them"
    if np.isfinite(rows).all() and rows.min() < 0:
        return "; these look like logits: give the softmax of each row"
    return ""
