"""The file of a complete candidate's calibrated true-class columns, which the race goes by.

Takes the trials that they came from and the columns, gives bytes and back. Derived: from 33,000
rows of 396 classes a column takes tenths of a second, and `resume` wants those of all candidates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from experiment.record_files import record_json
from experiment.records import TrialRecord

_TRIALS = "trials"
Columns = dict[str, NDArray[np.float32]]


def columns_file(
    trials: Iterable[TrialRecord], columns: Mapping[str, NDArray[np.float32]]
) -> bytes:
    """`columns`: variant -> (N,)."""
    return save({**columns, _TRIALS: _digest(trials)})


def read_columns(
    data: bytes, trials: Iterable[TrialRecord], variants: Iterable[str], rows: int
) -> Columns | None:
    """None where they are of other trials, variants or rows, or damaged."""
    try:
        arrays = load(data)
    except (SafetensorError, ValueError, KeyError):
        return None
    digest = arrays.pop(_TRIALS, None)
    if digest is None or not np.array_equal(digest, _digest(trials)):
        return None
    columns = {v: arrays[v] for v in variants if v in arrays and _fits(arrays[v], rows)}
    return columns if columns.keys() == set(variants) else None


def _fits(column: NDArray[np.float32], rows: int) -> bool:
    """Probabilities of all rows."""
    right = column.shape == (rows,) and column.dtype == np.float32
    return right and bool(((column >= 0) & (column <= 1)).all())


def _digest(trials: Iterable[TrialRecord]) -> NDArray[np.uint8]:
    text = b"".join(record_json(trial) for trial in trials)
    return np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), dtype=np.uint8)
