"""Candidates' calibrated true-class columns on the rows of their finished folds.

Reads OOF rows from the store, fits the temperatures, keeps what is likely to be asked for again
within a bound of memory, and those of complete candidates in the run folder.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foldrace.core.errors import RunFolderError
from foldrace.ensemble.temperature import fit_temperature, true_prob_at
from foldrace.run_folder.records import CandidateSummary
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.trials import suffix

_MOST_BYTES = 256 << 20
"""At 33,000 rows those of 1,000 complete candidates with two variants."""
_KEPT = 0.75
"""Part of the bound that is left when it was passed, so that tidying up is rare."""

Columns = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class Held:
    """The columns of one candidate."""

    rows: NDArray[np.intp]
    """(n,) which of the scored rows they are of, ascending."""
    columns: Columns
    """Variant -> (n,) probability of the true class at the variant's own temperature."""
    folds: tuple[int, ...]
    complete: bool
    loss: float
    """Of the better variant, uncalibrated."""

    @property
    def worth(self) -> tuple[bool, float]:
        """Of keeping it: the same for all incomplete ones, of which the older go first."""
        return self.complete, -self.loss if self.complete else 0.0

    @property
    def size(self) -> int:
        return sum(column.nbytes for column in self.columns.values())


class CalibratedColumns:
    """Reads each candidate's columns once for each set of finished folds, unless so many others
    were read since that they had to go: the oldest incomplete ones first, then the worst of the
    complete ones."""

    def __init__(self, store: RunStore, most_bytes: int = _MOST_BYTES) -> None:
        self._store, self._most_bytes = store, most_bytes
        scored = store.scored_rows()
        self._fold = store.folds().fold[scored]
        self._labels = store.labels()[scored]
        self._rows: dict[tuple[int, ...], NDArray[np.intp]] = {}
        self._bytes = 0
        self.held: dict[str, Held] = {}
        """By candidate; the one that was asked for last is the last."""

    def of(self, summary: CandidateSummary) -> Held:
        """RunFolderError where rows of a finished fold are missing or damaged."""
        name = summary.candidate.candidate
        folds = tuple(trial.fold for trial in summary.finished)
        held = self.held.get(name)
        if held is None or held.folds != folds:
            held = self._read(summary, folds)
        self.drop(name)
        self.held[name] = held
        self._bytes += held.size
        if self._bytes > self._most_bytes:
            self._tidy(name)
        return held

    def drop(self, candidate: str) -> None:
        held = self.held.pop(candidate, None)
        self._bytes -= held.size if held is not None else 0

    def rows(self, folds: tuple[int, ...]) -> NDArray[np.intp]:
        """(n,) which of the scored rows are of these folds, ascending."""
        if folds not in self._rows:
            self._rows[folds] = np.flatnonzero(np.isin(self._fold, folds))
        return self._rows[folds]

    def _read(self, summary: CandidateSummary, folds: tuple[int, ...]) -> Held:
        rows, complete = self.rows(folds), len(folds) == summary.folds
        columns = self._store.calibrated(summary) if complete else None
        if columns is None:
            columns = self._calibrated(summary, folds, rows)
            if complete:
                self._store.save_calibrated(summary, columns)
        loss = summary.pooled_logloss(summary.best) if summary.best else float("inf")
        return Held(rows, columns, folds, complete, loss)

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
            message = f"holds no probabilities in the {row + 1}th of its rows; train it anew"
            raise RunFolderError.single(where, message)
        return column

    def _tidy(self, newest: str) -> None:
        order = sorted((n for n in self.held if n != newest), key=lambda n: self.held[n].worth)
        for name in order:
            if self._bytes <= _KEPT * self._most_bytes:
                return
            self.drop(name)
