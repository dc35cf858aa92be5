"""Arrays of a run folder: `.npy` files without pickle, and a candidate's folds put together.

Takes files and names, gives arrays; checks that each scored row is there once before anyone blends
them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from experiment.errors import Problem, RunFolderError
from experiment.files import Files
from experiment.folds import FoldTable

_REMEDY = "delete this fold's folder and resume"


def npy(array: NDArray[np.generic]) -> bytes:
    """The bytes of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def array_of(data: bytes) -> NDArray[np.float32]:
    """The inverse of `npy`; ValueError where these are not the bytes of an array of numbers."""
    try:
        array: NDArray[np.float32] = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except (EOFError, OverflowError, MemoryError, SyntaxError, TypeError) as error:
        raise ValueError(f"{error}") from error  # damaged headers have many ways to fail
    if array.dtype.kind not in "iuf":
        raise ValueError(f"it holds {array.dtype}, should hold numbers")
    return array


def read_array(files: Files, name: str) -> NDArray[np.float32]:
    """RunFolderError where the file is missing or damaged."""
    try:
        return array_of(files.read(name))
    except (OSError, ValueError) as error:
        raise RunFolderError.single(f"{files.root}/{name}", f"cannot be read: {error}") from error


def pooled(
    files: Files, folders: Mapping[int, str], name: str, folds: FoldTable
) -> NDArray[np.float32]:
    """The arrays `name` of fold trials, fold -> folder, in the order of their rows: of all folds,
    the order of the scored rows.

    RunFolderError with every fold trial that does not hold each row of its fold once, or has files
    that cannot be read.
    """
    problems: list[Problem] = []
    paths = folders.values()
    row_parts = [_read_of_trial(files, f"{folder}/rows.npy", problems) for folder in paths]
    parts = [_read_of_trial(files, f"{folder}/{name}", problems) for folder in paths]
    problems += [
        Problem(f"{files.root}/{folder}/{name if fits else 'rows.npy'}", f"{_of(folder)}: {text}")
        for (fold, folder), rows, part in zip(folders.items(), row_parts, parts, strict=True)
        if rows is not None and part is not None
        for fits, text in _misfits(fold, rows, part, folds)
    ]
    if problems:
        raise RunFolderError(problems)
    whole, order = [p for p in parts if p is not None], [r for r in row_parts if r is not None]
    return np.concatenate(whole)[np.argsort(np.concatenate(order))]


def row_name(row: int, folds: FoldTable) -> str:
    """A row as the user finds it: the header is line 1."""
    return f"line {row + 2} of folds.csv ({folds.image_paths[row]})"


def _read_of_trial(files: Files, name: str, problems: list[Problem]) -> NDArray[np.float32] | None:
    """None where it cannot be read: `problems` has why."""
    try:
        return array_of(files.read(name))
    except (OSError, ValueError) as error:
        folder = name.rpartition("/")[0]
        text = f"{_of(folder)}: cannot be read: {error}; {_REMEDY}"
        problems.append(Problem(f"{files.root}/{name}", text))
        return None


def _of(folder: str) -> str:
    """`c0003, fold 1` of trials/c0003/fold1."""
    _, candidate, fold = folder.rsplit("/", 2)
    return f"{candidate}, {fold.replace('fold', 'fold ')}"


def _misfits(
    fold: int, rows: NDArray[np.generic], part: NDArray[np.generic], folds: FoldTable
) -> Iterator[tuple[bool, str]]:
    """What is wrong with one fold trial, and whether its rows fit."""
    says = "does not hold each scored row once"
    expected = np.flatnonzero(folds.fold == fold)
    if rows.shape != expected.shape or not np.array_equal(np.sort(rows), expected):
        what = _first_wrong_row(rows.ravel(), expected, folds)
        counts = f"{rows.size} rows for {len(expected)} of fold {fold}"
        yield False, f"{says}, for example {what} ({counts}); {_REMEDY}"
    elif part.shape[:1] != rows.shape:
        yield True, f"{says}: its shape is {part.shape} for {len(rows)} rows; {_REMEDY}"


def _first_wrong_row(
    rows: NDArray[np.generic], expected: NDArray[np.int64], folds: FoldTable
) -> str:
    missing = np.setdiff1d(expected, rows)
    if len(missing):
        return f"{row_name(int(missing[0]), folds)} is missing"
    values, counts = np.unique(rows, return_counts=True)
    strange = np.setdiff1d(values, expected)
    if len(strange):
        return f"row {strange[0]} (from 0) is of another fold, or none"
    twice = values[counts > 1]
    return f"{row_name(int(twice[0]), folds)} is there twice" if len(twice) else "an odd shape"
