"""What each candidate adds to the blend of the complete ones, after whole folds and at rungs.

Takes summaries, reads OOF rows and rung columns from the run folder, fits temperatures; gives
gains, kept until the blend changes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from foldrace.core.errors import RunFolderError
from foldrace.core.temperature import fit_temperature, true_prob_at
from foldrace.ensemble.running_blend import Gain, RunningBlend, bounded_gain
from foldrace.run_folder.records import CandidateSummary
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.trials import suffix

Columns = Mapping[str, NDArray[np.float32]]
"""Variant -> (n,) calibrated probability of the true class on the rows of some folds, ascending,
one repeat after the other."""
Better = tuple[str, Gain]
"""The variant with the higher gain, and that gain."""

_MOST_MEMBERS = 1000
"""Columns that the race's blend keeps (132 MB at 33,000 rows, times the repeats)."""
_MOST_RUNGS = 1024
"""Columns at rungs that are kept in memory (54 MB at 6,600 rows a fold, two variants)."""
_log = logging.getLogger("foldrace")


class Gains:
    """The blend of the complete candidates, and every other candidate's gain over it.

    Its columns have each row once a repeat, as that repeat's model scored it: a candidate with few
    repeats is compared with the others' models of the same ones, not with means of more models.
    """

    def __init__(self, store: RunStore) -> None:
        self._store = store
        scored = store.scored_rows()
        table = store.folds()
        self._fold = table.by_repeat[:, scored].ravel()
        self._labels = np.tile(store.labels()[scored], table.repeats)
        # Of each entry of a column, the row; None where each row has one.
        self._row = None if table.repeats == 1 else np.tile(scored, table.repeats)
        groups = table.group_numbers
        self._group = None if groups is None else np.tile(groups[scored], table.repeats)
        self._blend = RunningBlend(len(self._fold), len(store.classes()), _MOST_MEMBERS)
        self._members = 0
        self._columns: dict[str, tuple[tuple[int, ...], Columns]] = {}  # of incomplete candidates
        self._known: dict[object, tuple[int, Better | None]] = {}  # with the version of the blend
        self._at_rung = lru_cache(_MOST_RUNGS)(self._read_rung)
        self._at_end = lru_cache(_MOST_RUNGS)(self._read_end)

    @property
    def has_members(self) -> bool:
        """True once a complete candidate is in the blend."""
        return self._members > 0

    @property
    def blend_loss(self) -> float | None:
        """Log loss of the blend on all rows; None while it has no members.

        Of several repeats it is their mean.
        """
        return self._blend.loss if self._members else None

    def join(self, complete: Sequence[CandidateSummary]) -> None:
        """Add complete candidates to the blend, the best of many first, as far as there is room."""
        columns: dict[str, NDArray[np.float32]] = {}
        known = [(s.pooled_calibrated(s.best), s) for s in complete if s.best and s.is_member]
        for _, summary in sorted(known, key=lambda pair: pair[0]):
            name = summary.candidate.candidate
            own = self._of_folds(summary)
            columns |= {f"{name} {variant}": column for variant, column in own.items()}
            self._columns.pop(name, None)
            if len(columns) >= _MOST_MEMBERS:
                break
        if columns:
            self._blend.add(columns)
            self._members += len(columns)

    def of(self, summary: CandidateSummary) -> Better | None:
        """A candidate's gain on the rows of its finished folds.

        None while the blend has no members, and where the rows cannot be read.
        """
        folds = tuple(trial.fold for trial in summary.finished)
        if not self._members or not folds:
            return None
        key = summary.candidate.candidate, folds
        return self._kept(key, lambda: self._better(self._of_folds(summary), folds))

    def at_rung(self, candidate: str, fold: int, epoch: int) -> Better | None:
        """A candidate's gain on the rows of a fold, as it was after so many epochs of it.

        None while the blend has no members, and where no such columns are stored.
        """
        if not self._members:
            return None
        key = candidate, fold, epoch
        return self._kept(key, lambda: self._better(self._at_rung(*key), (fold,)))

    def at_end(self, summary: CandidateSummary, fold: int) -> Better | None:
        """A candidate's gain on the rows of one finished fold alone, complete ones too."""
        if not self._members:
            return None
        key = summary.candidate.candidate, fold
        return self._kept(key, lambda: self._better(self._at_end(*key), (fold,)))

    def _kept(self, key: object, make: Callable[[], Better | None]) -> Better | None:
        known = self._known.get(key)
        if known is None or known[0] != self._blend.version:
            known = self._known[key] = self._blend.version, make()
        return known[1]

    def _better(self, columns: Columns, folds: Sequence[int]) -> Better | None:
        mine = np.isin(self._fold, folds)
        mixed, rows = self._blend.mixed[mine], None if self._row is None else self._row[mine]
        groups = None if self._group is None else self._group[mine]
        gains = {v: bounded_gain(column, mixed, rows, groups) for v, column in columns.items()}
        variant = max(gains, key=lambda name: gains[name].mean, default=None)  # first on a tie
        return None if variant is None else (variant, gains[variant])

    def _read_rung(self, candidate: str, fold: int, epoch: int) -> Columns:
        rows = int((self._fold == fold).sum())
        return self._store.rung_columns(candidate, fold, epoch, rows) or {}

    def _read_end(self, candidate: str, fold: int) -> Columns:
        record = self._store.trial(candidate, fold)
        variants = [] if record is None else record.own_variants
        try:
            rows = self._fold == fold
            return {v: self._column(candidate, v, (fold,), rows) for v in variants}
        except RunFolderError:  # named where the candidate itself is judged
            return {}

    def _of_folds(self, summary: CandidateSummary) -> Columns:
        """Columns of the finished folds; empty, and a warning, where they cannot be read."""
        name = summary.candidate.candidate
        folds = tuple(trial.fold for trial in summary.finished)
        known = self._columns.get(name)
        if known is not None and known[0] == folds:
            return known[1]
        try:
            columns = self._read(summary, folds)
        except RunFolderError as error:
            for problem in error.problems:
                _log.warning("%s: %s", problem.where, problem.message)
            columns = {}
        self._columns[name] = folds, columns
        return columns

    def _read(self, summary: CandidateSummary, folds: tuple[int, ...]) -> Columns:
        """Complete ones are in the run folder too: a column of many classes takes long to fit."""
        complete = len(folds) == summary.folds
        stored = self._store.calibrated(summary) if complete else None
        if stored is not None:
            return stored
        name, rows = summary.candidate.candidate, np.isin(self._fold, folds)
        columns = {v: self._column(name, v, folds, rows) for v in summary.own_variants}
        if complete:
            self._store.save_calibrated(summary, columns)
        return columns

    def _column(
        self, candidate: str, variant: str, folds: tuple[int, ...], rows: NDArray[np.bool_]
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
