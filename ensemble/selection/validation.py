"""Validation: what a member's arrays must be before any blend looks at them.

Takes a source with its arrays and the scored rows; gives every violation as a `Problem` that names
trial, row and file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foldrace.core.errors import Problem
from foldrace.core.metrics import CLIP
from foldrace.core.temperature import LOG_CLIP
from foldrace.dataset.folds import FoldTable
from foldrace.ensemble.selection.members import OofSource, member_name
from foldrace.run_folder.oof import row_name
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.trials import suffix

_TOLERANCE = 1e-3
"""Largest distance from 1 of the sum of a row's probabilities, and of one above 1."""
_HALF_ROUNDING = 1 / 2048
"""Relative: float16 has 11 significant bits."""
_BLOCK = 1 << 16
"""Probabilities computed at a time."""
_SHOWN = 3
"""Problems of one member that are listed; the rest are counted."""


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """The rows that every member must have predicted."""

    rows: NDArray[np.int64]
    """(N,) rows of folds.csv, from 0."""
    labels: NDArray[np.int64]  # (N,)
    classes: tuple[str, ...]
    table: FoldTable

    @classmethod
    def of(cls, store: RunStore) -> ScoredRows:
        """The scored rows of a run folder."""
        rows = store.scored_rows()
        return cls(rows, store.labels()[rows], store.classes(), store.folds())

    @property
    def fold(self) -> NDArray[np.int64]:
        """(N,) fold of each row, of several repeats in the first one."""
        return self.fold_in(0)

    @property
    def groups(self) -> NDArray[np.int64] | None:
        """(N,) number of each row's group, None without groups."""
        numbers = self.table.group_numbers
        return None if numbers is None else np.asarray(numbers[self.rows])

    def fold_in(self, repeat: int) -> NDArray[np.int64]:
        """(N,) fold of each row in a repeat."""
        return np.asarray(self.table.by_repeat[repeat, self.rows])


@dataclass(frozen=True, eq=False)
class _Fault:
    """One kind of violation: in which array and rows (N,), and what to say of a row."""

    array: str
    wrong: NDArray[np.bool_]
    says: Callable[[int], str]


def violations(
    source: OofSource,
    log_prob: NDArray[np.floating],
    true_prob: NDArray[np.floating],
    scored: ScoredRows,
) -> list[Problem]:
    """All that is wrong with a member's log-probabilities (N, C) and true_prob (N,).

    The first row of each kind and fold; empty where nothing is wrong.
    """
    expected = (len(scored.rows), len(scored.classes))
    arrays = (("oof", log_prob, expected), ("true_prob", true_prob, expected[:1]))
    odd = [
        Problem(
            _file(source, array, None),
            f"{_name(source)}: the shape is {values.shape}, should be {shape}; {_remedy(source)}",
        )
        for array, values, shape in arrays
        if values.shape != shape
    ]
    if odd:
        return odd
    faults = _faults(log_prob, true_prob, scored)
    found = [p for fault in faults for p in _problems(source, fault, scored)]
    if len(found) <= _SHOWN:
        return found
    more = f"{_name(source)}: {len(found) - _SHOWN} more problems like these"
    return [*found[:_SHOWN], Problem(source.where, more)]


def _faults(
    log_prob: NDArray[np.floating], true_prob: NDArray[np.floating], scored: ScoredRows
) -> Iterator[_Fault]:
    peak = log_prob.max(axis=1)  # a NaN wins
    odd = ~(peak <= _TOLERANCE)
    yield _Fault("oof", odd, lambda i: _odd_value(log_prob[i], scored.classes))
    sums = _row_sums(log_prob)
    allowed = allowed_sum_error(len(scored.classes))
    off = ~odd & ~(np.abs(sums - 1.0) <= allowed)
    yield _Fault(
        "oof",
        off,
        lambda i: f"the probabilities sum to {sums[i]:.4g}, should be 1 within {allowed:.2g}",
    )
    beyond = ~((true_prob >= 0.0) & (true_prob <= 1.0))
    yield _Fault("true_prob", beyond, lambda i: f"true_prob is {true_prob[i]}, should be in [0, 1]")
    stored = log_prob[np.arange(len(scored.labels)), scored.labels]
    apart = ~(odd | off | beyond) & _differ(stored, true_prob)
    yield _Fault(
        "true_prob",
        apart,
        lambda i: (
            f"true_prob is {true_prob[i]:.6g}, but the OOF probabilities give its class "
            f"{scored.classes[scored.labels[i]]} {math.exp(stored[i]):.6g}: rows or labels are "
            "mixed up"
        ),
    )


def allowed_sum_error(n_classes: int) -> float:
    """Largest distance from 1 of the sum of a sound row's probabilities.

    `_TOLERANCE`, and what float16 logarithms may lose: each log p_c is stored as log p_c (1 + d_c)
    with |d_c| <= 1/2048, so that the sum changes by sum_c p_c log p_c d_c to first order, which is
    at most the row's entropy / 2048 <= log(C) / 2048.
    """
    return _TOLERANCE + math.log(n_classes) * _HALF_ROUNDING


def _differ(stored: NDArray[np.floating], true_prob: NDArray[np.floating]) -> NDArray[np.bool_]:
    """(n,) where a log-probability and a probability are not the same number.

    In logarithms, so that small ones count; both clipped as in the score, below which no file is
    exact.
    """
    left = np.maximum(stored, LOG_CLIP)
    right = np.log(np.maximum(true_prob, CLIP))
    return np.asarray(np.abs(left - right) > 2 * _TOLERANCE - 2 * _HALF_ROUNDING * left)


def _row_sums(log_prob: NDArray[np.floating]) -> NDArray[np.float64]:
    """(N,) sums of the probabilities."""
    step = max(1, _BLOCK // log_prob.shape[1])
    with np.errstate(over="ignore", invalid="ignore"):
        blocks = [
            np.exp(log_prob[start : start + step]).sum(axis=1, dtype=np.float64)
            for start in range(0, len(log_prob), step)
        ]
    return np.concatenate(blocks)


def _odd_value(row: NDArray[np.floating], classes: tuple[str, ...]) -> str:
    column = int(np.argmax(~(row <= _TOLERANCE)))
    return f"class {classes[column]} has the log-probability {row[column]:.6g}, should be <= 0"


def _problems(source: OofSource, fault: _Fault, scored: ScoredRows) -> Iterator[Problem]:
    """One problem a fold."""
    wrong = np.flatnonzero(fault.wrong)
    fold = scored.fold_in(source.repeat)[wrong]
    for k in np.unique(fold):
        of_fold = wrong[fold == k]
        first = int(of_fold[0])
        row = row_name(int(scored.rows[first]), scored.table)
        more = f" (and {len(of_fold) - 1:,} more rows of this fold)" if len(of_fold) > 1 else ""
        yield Problem(
            _file(source, fault.array, int(k)),
            f"{_name(source)}, fold {k}, {row}: {fault.says(first)}{more}; {_remedy(source)}",
        )


def _name(source: OofSource) -> str:
    return member_name(source.member)


def _of_trials(source: OofSource) -> bool:
    return "/*/" in source.where


def _file(source: OofSource, array: str, fold: int | None) -> str:
    """The file to blame: a run's members have one per fold and array, others one in all."""
    if not _of_trials(source):
        return source.where
    folder = source.where.rpartition("/*/")[0]
    name = f"{array}{suffix(source.member.variant)}.npy"
    return f"{folder}/{'*' if fold is None else f'fold{fold}'}/{name}"


def _remedy(source: OofSource) -> str:
    if _of_trials(source):
        return "delete this fold's folder and resume"
    return "correct the file and add it again"
