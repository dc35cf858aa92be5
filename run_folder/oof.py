"""Arrays of a run folder: `.npy` files without pickle, a candidate's folds put together.

Takes files and names, gives arrays; checks that each scored row is there once before anyone blends
them. Also the file of a complete candidate's calibrated true-class columns, which the race goes by:
derived, but from 33,000 rows of 396 classes a column takes tenths of a second, and `resume` wants
those of all candidates.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from foldrace.core.errors import Problem, RunFolderError, cause
from foldrace.core.files import Files, record_json
from foldrace.dataset.folds import FoldTable
from foldrace.run_folder.records import TrialRecord

_REMEDY = "delete this fold's folder and resume"
NOT_OF_THIS_TRIAL = (
    "it does not belong to the trial.json beside it: it is damaged, or another attempt of the "
    "trial has written it"
)


def digest(data: bytes) -> str:
    """SHA-256 of a file's bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def npy(array: NDArray[np.generic]) -> bytes:
    """The bytes of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def array_of(data: bytes) -> NDArray[np.float32]:
    """The array in an .npy file's bytes; ValueError where they hold no array of numbers."""
    stream = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("its version is not 1.0")
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
        shape = tuple(map(int, shape))  # `True` is a number there, but none that NumPy takes
        needed = math.prod(shape) * dtype.itemsize
    except Exception as error:  # damaged headers have many ways to fail
        raise ValueError(cause(error)) from error
    if dtype.kind not in "iuf":
        raise ValueError(f"it holds {dtype}, should hold numbers")
    there = len(data) - stream.tell()
    if any(size < 0 for size in shape) or needed != there:  # before room is made for them
        raise ValueError(f"it holds {there:,} bytes of numbers, should hold {needed:,}")
    array = np.frombuffer(data, dtype, offset=stream.tell())
    found: NDArray[np.float32] = array.reshape(shape, order="F" if by_columns else "C").copy()
    return found


def read_array(files: Files, name: str) -> NDArray[np.float32]:
    """The array in an .npy file; RunFolderError where it is missing or damaged."""
    try:
        return array_of(files.read(name))
    except (OSError, ValueError) as error:
        raise RunFolderError.single(f"{files.root}/{name}", f"cannot be read: {error}") from error


def pooled(
    files: Files,
    folders: Mapping[int, str],
    name: str,
    folds: FoldTable,
    digests: Mapping[int, Mapping[str, str]],
) -> NDArray[np.float32]:
    """The arrays `name` of fold trials put together in the order of their rows in folds.csv.

    Of several repeats one lies after the other.

    `folders`: fold -> its folder; `digests`: fold -> digest of its files, as far as they are known.
    RunFolderError with every fold trial that does not hold each row of its fold once, has files
    that cannot be read, or such that are not those of its record.
    """
    problems: list[Problem] = []
    strange: list[Problem] = []

    def read(file: str) -> list[NDArray[np.float32] | None]:
        return [
            _read_of_trial(files, f"{folder}/{file}", digests[fold].get(file), problems, strange)
            for fold, folder in folders.items()
        ]

    row_parts, parts = read("rows.npy"), read(name)
    problems += [
        Problem(
            f"{files.root}/{folder}/{name if fits else 'rows.npy'}",
            f"{_trial_of(folder)}: {text}",
        )
        for (fold, folder), rows, part in zip(folders.items(), row_parts, parts, strict=True)
        if rows is not None and part is not None
        for fits, text in _misfits(fold, rows, part, folds)
    ]
    if problems or strange:  # what exactly is wrong says more than that something is
        raise RunFolderError(problems or strange)
    whole = [p for p in parts if p is not None]
    order = [
        folds.repeat_of(fold) * len(folds.fold) + rows
        for fold, rows in zip(folders, row_parts, strict=True)
        if rows is not None
    ]
    return np.concatenate(whole)[np.argsort(np.concatenate(order))]


def mean_log_prob(repeats: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Logarithm of the mean probabilities (N, C), of each repeat's log-probabilities (N, C).

    The probability of a row is the mean over its models, one of each repeat.
    """
    if len(repeats) == 1:
        return repeats[0]
    total = np.logaddexp.reduce(list(repeats), axis=0)
    return np.asarray(total - np.log(np.float32(len(repeats))), dtype=np.float32)


def row_name(row: int, folds: FoldTable) -> str:
    """Name of a row as the user finds it: the header is line 1."""
    return f"line {row + 2} of folds.csv ({folds.image_paths[row]})"


def _read_of_trial(
    files: Files,
    name: str,
    expected: str | None,
    problems: list[Problem],
    strange: list[Problem],
) -> NDArray[np.float32] | None:
    """The array in a fold trial's file; None and a problem where it cannot be read.

    One with another digest than `expected` is among `strange`.
    """
    where, trial = f"{files.root}/{name}", _trial_of(name.rpartition("/")[0])
    try:
        data = files.read(name)
        array = array_of(data)
    except (OSError, ValueError) as error:
        problems.append(Problem(where, f"{trial}: cannot be read: {error}; {_REMEDY}"))
        return None
    if expected is not None and digest(data) != expected:
        strange.append(Problem(where, f"{trial}: {NOT_OF_THIS_TRIAL}; {_REMEDY}"))
    return array


def _trial_of(folder: str) -> str:
    """Name of a fold trial by its folder: `c0003, fold 1` of trials/c0003/fold1."""
    _, candidate, fold = folder.rsplit("/", 2)
    return f"{candidate}, {fold.replace('fold', 'fold ')}"


def _misfits(
    fold: int, rows: NDArray[np.generic], part: NDArray[np.generic], folds: FoldTable
) -> Iterator[tuple[bool, str]]:
    """(do its rows fit, text) for each problem of one fold trial."""
    says = "does not hold each scored row once"
    expected = folds.rows_of(fold)
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


_TRIALS = "trials"
Columns = dict[str, NDArray[np.float32]]


def columns_file(
    trials: Iterable[TrialRecord], columns: Mapping[str, NDArray[np.float32]]
) -> bytes:
    """The bytes of race.safetensors; `columns`: variant -> true-class probabilities (N,)."""
    return save({**columns, _TRIALS: _digest(trials)})


def read_columns(
    data: bytes, trials: Iterable[TrialRecord], variants: Iterable[str] | None, rows: int
) -> Columns | None:
    """The columns in such a file; None where they are damaged or of other trials or rows.

    `variants`: those that it must have; None: whatever it has.
    """
    try:
        arrays = load(data)
    except Exception:  # damaged files have many ways to fail
        return None
    made_of = arrays.pop(_TRIALS, None)
    if made_of is None or not np.array_equal(made_of, _digest(trials)):
        return None
    wanted = tuple(arrays if variants is None else variants)
    columns = {v: arrays[v] for v in wanted if v in arrays and _fits(arrays[v], rows)}
    return columns if columns.keys() == set(wanted) else None


def _fits(column: NDArray[np.float32], rows: int) -> bool:
    """True where a column has probabilities of all rows."""
    right = column.shape == (rows,) and column.dtype == np.float32
    return right and bool(((column >= 0) & (column <= 1)).all())


def _digest(trials: Iterable[TrialRecord]) -> NDArray[np.uint8]:
    text = b"".join(record_json(trial) for trial in trials)
    return np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), dtype=np.uint8)
