"""The folder `trials/` of a run: candidates, fold trials, race decisions and their arrays.

Takes and gives records and arrays; checks that a candidate's OOF rows are complete before anyone
blends them. `foldrace.run_folder.store.RunStore` is the door to it. No pickle is ever read.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foldrace.core.files import (
    Files,
    open_files,
    read_record,
    read_text,
    record_json,
    sound_record,
    to_bytes,
    warn_ignored,
)
from foldrace.dataset.folds import FoldTable, read_folds
from foldrace.run_folder.oof import columns_file, npy, pooled, read_columns
from foldrace.run_folder.records import (
    CandidateRecord,
    CandidateSummary,
    Oof,
    RaceDecision,
    TrialRecord,
    summarise,
)
from foldrace.run_folder.variants import RAW

FOLDS = "folds.csv"
_RESUME_STATE, _TRAIN_LOG, _DECISION = "resume.pt", "train_log.csv", "decision.json"
_RUNG = "rung"  # and the number of epochs trained by then
_FOLD_FOLDER = re.compile(r"fold(\d+)")


class TrialFiles:
    """The candidates and fold trials of one run folder, with the folds that they are of."""

    def __init__(self, root: str | Path) -> None:
        self.files: Files = open_files(root)
        self.root = self.files.root
        self._folds: FoldTable | None = None

    # -- folds

    def folds(self) -> FoldTable:
        """The table in folds.csv, read once."""
        if self._folds is None:
            self._folds = read_folds(read_text(self.files, FOLDS))
        return self._folds

    @property
    def fold_count(self) -> int:
        """Number of fold trials of a complete candidate."""
        return int(self.folds().fold.max()) + 1

    def scored_rows(self) -> NDArray[np.int64]:
        """(N,) rows that some fold trial scores: all, or with k: 1 the validation rows."""
        return np.flatnonzero(self.folds().fold >= 0)

    # -- candidates

    def save_candidate(self, record: CandidateRecord) -> None:
        """Write a candidate's record, when it is suggested."""
        self.files.write(f"trials/{record.candidate}/candidate.json", record_json(record))

    def candidate(self, name: str) -> CandidateRecord:
        """One candidate's record; RunFolderError where the run has none of that name."""
        return read_record(self.files, f"trials/{name}/candidate.json", CandidateRecord)

    def candidates(self) -> list[CandidateRecord]:
        """Every candidate ever suggested, in the order of their numbers: c9999 before c10000."""
        names = sorted(self.files.names("trials"), key=lambda name: (len(name), name))
        paths = [f"trials/{name}/candidate.json" for name in names]
        return [read_record(self.files, p, CandidateRecord) for p in paths if self.files.exists(p)]

    def summaries(self, running: bool = False) -> list[CandidateSummary]:
        """Every candidate with its status, from the files alone.

        `running`: the sweep goes on, so that incomplete candidates are `running` and not
        `unfinished`.
        """
        by_candidate: dict[str, list[TrialRecord]] = defaultdict(list)
        for (candidate, _), record in sorted(self.trials().items()):
            by_candidate[candidate].append(record)
        decisions = self.decisions()
        return [
            summarise(
                record,
                by_candidate[record.candidate],
                self.fold_count,
                running,
                decisions.get(record.candidate, ()),
            )
            for record in self.candidates()
        ]

    # -- fold trials

    @staticmethod
    def trial_folder(candidate: str, fold: int) -> str:
        """Name of a fold trial's folder, relative to the run folder."""
        return f"trials/{candidate}/fold{fold}"

    def save_trial(
        self,
        record: TrialRecord,
        oof: Mapping[str, Oof] | None = None,
        rows: NDArray[np.int64] | None = None,
        weights: Mapping[str, bytes] | None = None,
        log: str | None = None,
    ) -> None:
        """Write a fold trial; `trial.json` last, so that a trial with it is whole.

        `weights` are safetensors files by variant, `log` is the text of train_log.csv. A failed
        trial's resume state stays, for the next attempt.
        """
        folder = self.trial_folder(record.candidate, record.fold)
        if log is not None:
            self.save_train_log(record.candidate, record.fold, log)
        if rows is not None:
            self.files.write(f"{folder}/rows.npy", npy(rows))
        for variant, prob in (oof or {}).items():
            self.files.write(f"{folder}/oof{suffix(variant)}.npy", npy(prob.log_prob))
            self.files.write(f"{folder}/true_prob{suffix(variant)}.npy", npy(prob.true_prob))
        for variant, data in (weights or {}).items():
            self.files.write(weights_name(record.candidate, record.fold, variant), data)
        self.files.write(f"{folder}/trial.json", record_json(record))
        if record.status != "failed":
            self.files.delete(f"{folder}/{_RESUME_STATE}")

    def trial(self, candidate: str, fold: int) -> TrialRecord | None:
        """The trial's record, or None while it has not ended.

        A damaged record, or one of other folds, counts as none, with a warning in the log: the
        trial runs again.
        """
        name = f"{self.trial_folder(candidate, fold)}/trial.json"
        record = sound_record(self.files, name, TrialRecord)
        if record is None or record.folds_hash == self.folds().hash:
            return record
        warn_ignored(f"{self.root}/{name}", "it is of another folds.csv")
        return None

    def trials(self) -> dict[tuple[str, int], TrialRecord]:
        """(candidate, fold) -> record, for every fold trial that ended."""
        ended = ((key, self.trial(*key)) for key in self._fold_folders())
        return {key: record for key, record in ended if record is not None}

    def forget_trial(self, candidate: str, fold: int) -> None:
        """Remove what a fold trial left, so that it runs anew."""
        self.files.delete(self.trial_folder(candidate, fold))

    def clear_trial(self, candidate: str, fold: int) -> None:
        """Remove what an attempt left, but not what the next one goes on from: its resume state.

        The decisions about it and what it had at its rungs stay with that.
        """
        folder = self.trial_folder(candidate, fold)
        self.files.delete_parts(folder)
        for name in self.files.names(folder):
            if name not in (_RESUME_STATE, _TRAIN_LOG, _DECISION) and not name.startswith(_RUNG):
                self.files.delete(f"{folder}/{name}")

    def train_log(self, candidate: str, fold: int) -> str | None:
        """The text of train_log.csv, or None where there is none."""
        name = f"{self.trial_folder(candidate, fold)}/{_TRAIN_LOG}"
        return read_text(self.files, name) if self.files.exists(name) else None

    def save_train_log(self, candidate: str, fold: int, log: str) -> None:
        """Write train_log.csv; a trial that is stopped in mid-training has it before its record."""
        self.files.write(f"{self.trial_folder(candidate, fold)}/{_TRAIN_LOG}", to_bytes(log))

    def save_rung(
        self,
        candidate: str,
        fold: int,
        epoch: int,
        log: str,
        columns: Mapping[str, NDArray[np.float32]],
    ) -> None:
        """Write what a trial has after `epoch` epochs: the text of its log so far, and columns.

        `columns`: variant -> (n,) calibrated true-class probabilities on the fold's rows.
        """
        self.save_train_log(candidate, fold, log)
        self.files.write(self._rung_name(candidate, fold, epoch), columns_file((), columns))

    def rung_columns(
        self, candidate: str, fold: int, epoch: int, rows: int
    ) -> dict[str, NDArray[np.float32]]:
        """The columns that `save_rung` wrote, of so many rows; empty where there are none."""
        try:
            data = self.files.read(self._rung_name(candidate, fold, epoch))
        except OSError:
            return {}
        return read_columns(data, (), None, rows) or {}

    def _rung_name(self, candidate: str, fold: int, epoch: int) -> str:
        return f"{self.trial_folder(candidate, fold)}/{_RUNG}{epoch}.safetensors"

    def _fold_folders(self) -> Iterator[tuple[str, int]]:
        """(candidate, fold) of every fold trial that has a folder."""
        for candidate in self.files.names("trials"):
            for folder in self.files.names(f"trials/{candidate}"):
                match = _FOLD_FOLDER.fullmatch(folder)
                if match is not None:
                    yield candidate, int(match[1])

    # -- race decisions

    def save_decision(self, decision: RaceDecision) -> None:
        """Write the decision after a fold, in place of an earlier one.

        It comes after the fold trial's record, but before that of a trial which it stops.
        """
        folder = self.trial_folder(decision.candidate, decision.fold)
        self.files.write(f"{folder}/{_DECISION}", record_json(decision))

    def decisions(self) -> dict[str, list[RaceDecision]]:
        """Candidate -> its decisions, in the order in which they were made.

        A damaged one counts as none, with a warning in the log: the race decides again.
        """
        made: dict[str, list[RaceDecision]] = defaultdict(list)
        for candidate, fold in self._fold_folders():
            name = f"{self.trial_folder(candidate, fold)}/{_DECISION}"
            decision = sound_record(self.files, name, RaceDecision)
            if decision is not None:
                made[candidate].append(decision)
        return {name: sorted(listed, key=lambda d: d.number) for name, listed in made.items()}

    # -- states to resume from

    def save_resume_state(self, candidate: str, fold: int, data: bytes | memoryview) -> None:
        """Write the state of a trial under way, a safetensors file, in place of an older one."""
        self.files.write(f"{self.trial_folder(candidate, fold)}/{_RESUME_STATE}", data)

    def resume_state(self, candidate: str, fold: int) -> bytes | None:
        """The state that an interrupted fold trial goes on from, or None."""
        name = f"{self.trial_folder(candidate, fold)}/{_RESUME_STATE}"
        return self.files.read(name) if self.files.exists(name) else None

    def resume_state_bytes(self, candidate: str, fold: int) -> int:
        """Size of the state that a fold trial goes on from; 0 where there is none."""
        name = f"{self.trial_folder(candidate, fold)}/{_RESUME_STATE}"
        return self.files.size(name) if self.files.exists(name) else 0

    def forget_resume_state(self, candidate: str, fold: int) -> None:
        """Remove the state of one fold: its next attempt begins anew."""
        self.files.delete(f"{self.trial_folder(candidate, fold)}/{_RESUME_STATE}")

    def forget_resume_states(self, candidate: str) -> None:
        """Remove the states of all folds of a candidate that is settled."""
        for fold in range(self.fold_count):
            self.forget_resume_state(candidate, fold)

    # -- weights

    def weights(self, candidate: str, fold: int, variant: str) -> bytes:
        """The safetensors file of a variant."""
        return self.files.read(weights_name(candidate, fold, variant))

    def has_weights(self, candidate: str, variant: str) -> bool:
        """True where the weights of all folds are there."""
        return all(self.files.exists(name) for name in self._weights_names(candidate, variant))

    def weight_bytes(self, candidate: str, variant: str) -> int:
        """Size of the weight files of all folds together, in bytes."""
        return sum(self.files.size(name) for name in self._weights_names(candidate, variant))

    def remove_weights(self, candidate: str, variant: str) -> None:
        """Remove the weights of all folds; probabilities and records stay."""
        for name in self._weights_names(candidate, variant):
            self.files.delete(name)

    def _weights_names(self, candidate: str, variant: str) -> list[str]:
        return [weights_name(candidate, fold, variant) for fold in range(self.fold_count)]

    # -- OOF

    def oof_log_prob(
        self, candidate: str, variant: str, folds: Iterable[int] | None = None
    ) -> NDArray[np.float32]:
        """(N, C) natural-log probabilities of a complete candidate on `scored_rows`.

        They are in the order of these rows, as rounded to float16; of some folds: (n, C) on the
        rows of these folds. RunFolderError where rows are missing or damaged.
        """
        return self._pooled(candidate, f"oof{suffix(variant)}.npy", folds).astype(np.float32)

    def oof(self, candidate: str, variant: str) -> NDArray[np.float32]:
        """(N, C) probabilities of a complete candidate, see `oof_log_prob`."""
        return np.exp(self.oof_log_prob(candidate, variant))

    def true_prob(self, candidate: str, variant: str) -> NDArray[np.float32]:
        """(N,) probability of the true class on `scored_rows`, in their order."""
        return self._pooled(candidate, f"true_prob{suffix(variant)}.npy")

    def save_calibrated(
        self, summary: CandidateSummary, columns: Mapping[str, NDArray[np.float32]]
    ) -> None:
        """Write what the race derived from a complete candidate's OOF, for the next `resume`.

        `columns`: variant -> (N,) true-class probabilities at a temperature of its own.
        """
        self.files.write(_columns_name(summary), columns_file(summary.trials, columns))

    def calibrated(self, summary: CandidateSummary) -> dict[str, NDArray[np.float32]] | None:
        """The columns that `save_calibrated` wrote for exactly these trials, or None."""
        try:
            data = self.files.read(_columns_name(summary))
        except OSError:
            return None
        return read_columns(data, summary.trials, summary.own_variants, len(self.scored_rows()))

    def _pooled(
        self, candidate: str, name: str, folds: Iterable[int] | None = None
    ) -> NDArray[np.float32]:
        wanted = range(self.fold_count) if folds is None else folds
        folders = {fold: self.trial_folder(candidate, fold) for fold in wanted}
        return pooled(self.files, folders, name, self.folds())


def suffix(variant: str) -> str:
    """Part of a file's name that tells the variant; empty for the raw one."""
    return "" if variant == RAW else f"_{variant}"


def weights_name(candidate: str, fold: int, variant: str) -> str:
    """Name of a variant's weights, relative to the run folder."""
    return f"{TrialFiles.trial_folder(candidate, fold)}/best{suffix(variant)}.safetensors"


def _columns_name(summary: CandidateSummary) -> str:
    return f"trials/{summary.candidate.candidate}/race.safetensors"
