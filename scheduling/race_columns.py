"""Candidates' calibrated true-class probabilities on the rows of their finished folds.

Reads OOF rows from the store, fits the temperatures; keeps the columns within a bound of memory,
and those of complete candidates in the run folder.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foldrace.core.errors import RunFolderError
from foldrace.core.temperature import fit_temperature, true_prob_at
from foldrace.run_folder.records import CandidateSummary
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.trials import suffix

_MOST_BYTES = 256 << 20
"""Enough for 1,000 complete candidates with two variants at 33,000 rows."""
_KEPT = 0.75
"""Part of the bound that is kept when it was passed, so that columns are rarely dropped."""

Columns = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class CandidateColumns:
    """The columns of one candidate, on the rows of its finished folds."""

    rows: NDArray[np.intp]
    """(n,) indices of these rows among the scored rows, ascending."""
    columns: Columns
    """Variant -> (n,) probability of the true class at the variant's own temperature."""
    folds: tuple[int, ...]
    """Finished folds, ascending."""
    complete: bool
    """True where all folds are finished."""
    loss: float
    """Log loss of the better variant, uncalibrated."""

    @property
    def keep_priority(self) -> tuple[bool, float]:
        """Sort key: incomplete candidates are dropped first, then the worst complete ones."""
        return self.complete, -self.loss if self.complete else 0.0

    @property
    def size(self) -> int:
        """Bytes of the columns."""
        return sum(column.nbytes for column in self.columns.values())


class ColumnCache:
    """Cache of the candidates' columns, which are read once for each set of finished folds.

    Beyond the bound of memory the oldest incomplete candidates are dropped first, then the worst of
    the complete ones.
    """

    def __init__(self, store: RunStore, most_bytes: int = _MOST_BYTES) -> None:
        self._store, self._most_bytes = store, most_bytes
        scored = store.scored_rows()
        self._fold = store.folds().fold[scored]
        self._labels = store.labels()[scored]
        self._rows: dict[tuple[int, ...], NDArray[np.intp]] = {}
        self._bytes = 0
        self.cached: dict[str, CandidateColumns] = {}
        """Candidate -> its columns, the one that was asked for last at the end."""

    def read(self, summary: CandidateSummary) -> CandidateColumns:
        """The candidate's columns; RunFolderError where rows are missing or damaged."""
        name = summary.candidate.candidate
        folds = tuple(trial.fold for trial in summary.finished)
        found = self.cached.get(name)
        if found is None or found.folds != folds:
            found = self._read(summary, folds)
        self._drop(name)
        self.cached[name] = found
        self._bytes += found.size
        if self._bytes > self._most_bytes:
            self._drop_others(name)
        return found

    def rows(self, folds: tuple[int, ...]) -> NDArray[np.intp]:
        """(n,) indices of the scored rows of these folds, ascending."""
        if folds not in self._rows:
            self._rows[folds] = np.flatnonzero(np.isin(self._fold, folds))
        return self._rows[folds]

    def _read(self, summary: CandidateSummary, folds: tuple[int, ...]) -> CandidateColumns:
        rows, complete = self.rows(folds), len(folds) == summary.folds
        columns = self._store.calibrated(summary) if complete else None
        if columns is None:
            columns = self._calibrated(summary, folds, rows)
            if complete:
                self._store.save_calibrated(summary, columns)
        loss = summary.pooled_logloss(summary.best) if summary.best else float("inf")
        return CandidateColumns(rows, columns, folds, complete, loss)

    def _calibrated(
        self, summary: CandidateSummary, folds: tuple[int, ...], rows: NDArray[np.intp]
    ) -> Columns:
        name = summary.candidate.candidate
        return {v: self._column(name, v, folds, rows) for v in summary.own_variants}

    def _column(
        self, candidate: str, variant: str, folds: tuple[int, ...], rows: NDArray[np.intp]
    ) -> NDArray[np.float32]:
        log_prob = self._store.oof_log_prob(candidate, variant, folds)
        labels = self._labels[rows]
        column = true_prob_at(log_prob, labels, fit_temperature(log_prob, labels))
        if not np.isfinite(column).all():
            where = f"{self._store.root}/trials/{candidate}/*/oof{suffix(variant)}.npy"
            row = int((~np.isfinite(column)).argmax())
            message = f"holds no probabilities in the {row + 1}th of its rows; train it again"
            raise RunFolderError.single(where, message)
        return column

    def _drop(self, candidate: str) -> None:
        dropped = self.cached.pop(candidate, None)
        self._bytes -= dropped.size if dropped is not None else 0

    def _drop_others(self, newest: str) -> None:
        others = (name for name in self.cached if name != newest)
        for name in sorted(others, key=lambda name: self.cached[name].keep_priority):
            if self._bytes <= _KEPT * self._most_bytes:
                return
            self._drop(name)
