"""The candidates of a run, the folds that they are of, how their fold trials ended, and decisions.

Takes and gives records; no array is read here. What is damaged costs one candidate, not the run: a
candidate's record is made anew from one of its fold trials, and what is ignored is said in the log.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from foldrace.core.errors import DataError, RunFolderError
from foldrace.core.files import (
    Files,
    open_files,
    read_record,
    read_text,
    record_json,
    sound_record,
    warn_ignored,
)
from foldrace.dataset.folds import FoldTable, read_folds
from foldrace.run_folder.records import (
    CandidateRecord,
    CandidateSummary,
    RaceDecision,
    TrialRecord,
    summarise,
)

FOLDS = "folds.csv"
DECISION = "decision.json"
_FOLD_FOLDER = re.compile(r"fold(0|[1-9][0-9]{0,2})")
_CANDIDATE_FOLDER = re.compile("c[0-9]{1,9}")

Record = TypeVar("Record", TrialRecord, RaceDecision)

Trials = Mapping[tuple[str, int], TrialRecord]
"""(candidate, fold) -> the record of its fold trial."""


class CandidateFiles:
    """The candidates of one run folder, with the folds that they are of and their decisions."""

    def __init__(self, root: str | Path) -> None:
        self.files: Files = open_files(root)
        self.root = self.files.root
        self._folds: FoldTable | None = None
        self._made_anew: dict[str, CandidateRecord] = {}
        self._left_out: set[str] = set()

    # -- folds

    def folds(self) -> FoldTable:
        """The table in folds.csv, read once; RunFolderError where it is damaged."""
        if self._folds is None:
            try:
                self._folds = read_folds(read_text(self.files, FOLDS))
            except DataError as error:
                raise RunFolderError.single(
                    f"{self.root}/{FOLDS}",
                    f"is damaged: {error.problems[0].message}; put a copy back, or remove it and "
                    f"make it anew from the same data: foldrace split {self.root}/sweep.yaml",
                ) from error
        return self._folds

    @property
    def fold_count(self) -> int:
        """Number of fold trials of a complete candidate."""
        return self.folds().count

    def scored_rows(self) -> NDArray[np.int64]:
        """(N,) rows that some fold trial scores: all, or with k: 1 the validation rows."""
        return np.flatnonzero(self.folds().fold >= 0)

    # -- candidates

    def save_candidate(self, record: CandidateRecord) -> None:
        """Write a candidate's record, when it is suggested.

        Of an earlier one of that name, which could not be read, nothing stays.
        """
        if record.candidate in self._left_out:
            self._left_out.discard(record.candidate)
            self.files.delete(f"trials/{record.candidate}")
        self.files.write(_record_name(record.candidate), record_json(record))

    def candidate(self, name: str) -> CandidateRecord:
        """One candidate's record; RunFolderError where the run has none of that name.

        A damaged one is made anew as in `candidates`.
        """
        record = self._candidate(name)
        if record is None:
            where = f"{self.root}/{_record_name(name)}"
            raise RunFolderError.single(
                where, f"is damaged, and no trial.json says what {name} is; remove trials/{name}"
            )
        return record

    def candidates(self) -> list[CandidateRecord]:
        """Every candidate ever suggested, in the order of their numbers: c9999 before c10000.

        Where candidate.json is damaged, backbone and hyperparameters are those of a fold trial;
        without any, the candidate is left out. Either way a warning in the log says so.
        """
        names = sorted(self._candidate_folders(), key=lambda name: (len(name), name))
        there = [name for name in names if self.files.exists(_record_name(name))]
        found = [self._candidate(name) for name in there]
        return [record for record in found if record is not None]

    def summaries(
        self, running: bool = False, stored: Trials | None = None
    ) -> list[CandidateSummary]:
        """Every candidate with its status, from the files alone.

        `running`: the sweep goes on, so that incomplete candidates are `running` and not
        `unfinished`. `stored`: what `stored_trials` gave, where that was asked already.
        """
        by_candidate: dict[str, list[TrialRecord]] = defaultdict(list)
        for (candidate, _), record in sorted(self.trials(stored).items()):
            by_candidate[candidate].append(record)
        decisions = self.decisions()
        return [
            summarise(
                record,
                by_candidate[record.candidate],
                self.fold_count,
                running,
                decisions.get(record.candidate, ()),
                self.folds().repeats,
            )
            for record in self.candidates()
        ]

    def mend(self) -> None:
        """Write damaged records anew, as far as the rest of the run tells what they held."""
        for record in self._made_anew.values():
            self.save_candidate(record)
        self._made_anew.clear()

    def _candidate(self, name: str) -> CandidateRecord | None:
        """The record as it is, or as its fold trials tell it; None where neither can be read."""
        file = _record_name(name)
        try:
            record = read_record(self.files, file, CandidateRecord)
            if record.candidate == name:
                return record
        except RunFolderError as error:
            if not isinstance(error.__cause__, ValidationError):
                raise
        trial = next(filter(None, (self.stored_trial(name, k) for k in self._folds_of(name))), None)
        if trial is None:
            self._left_out.add(name)
            reason = f"it is damaged, and no trial.json says what {name} is: {name} is left out"
            warn_ignored(f"{self.root}/{file}", reason)
            return None
        warn_ignored(
            f"{self.root}/{file}",
            f"it is damaged; {name} is what trial.json of its fold {trial.fold} says",
        )
        record = CandidateRecord(
            candidate=name, backbone=trial.backbone, params=trial.params, teacher=trial.teacher
        )
        self._made_anew[name] = record
        return record

    # -- how fold trials ended

    @staticmethod
    def trial_folder(candidate: str, fold: int) -> str:
        """Name of a fold trial's folder, relative to the run folder."""
        return f"trials/{candidate}/fold{fold}"

    def stored_trial(self, candidate: str, fold: int) -> TrialRecord | None:
        """The record in trial.json, of whatever folds; None where there is none.

        A damaged one counts as none, with a warning in the log: the trial runs again.
        """
        return self._of_fold(self._trial_name(candidate, fold), TrialRecord, candidate, fold)

    def _of_fold(self, name: str, kind: type[Record], candidate: str, fold: int) -> Record | None:
        """The record in a fold trial's folder; None where there is none that is of this trial."""
        record = sound_record(self.files, name, kind)
        if record is None or (record.candidate, record.fold) == (candidate, fold):
            return record
        other = f"{record.candidate} fold{record.fold}"
        warn_ignored(f"{self.root}/{name}", f"it is of another fold trial, {other}")
        return None

    def trial(self, candidate: str, fold: int) -> TrialRecord | None:
        """The trial's record, or None while it has not ended.

        One of other folds counts as none, with a warning in the log; see `belonging` for who
        refuses such a run.
        """
        record = self.stored_trial(candidate, fold)
        if record is None or record.folds_hash == self.folds().hash:
            return record
        name = self._trial_name(candidate, fold)
        warn_ignored(f"{self.root}/{name}", "it is of another folds.csv")
        return None

    def stored_trials(self) -> dict[tuple[str, int], TrialRecord]:
        """(candidate, fold) -> record, for every fold trial that ended, of whatever folds."""
        ended = ((key, self.stored_trial(*key)) for key in self._fold_folders())
        return {key: record for key, record in ended if record is not None}

    def trials(self, stored: Trials | None = None) -> dict[tuple[str, int], TrialRecord]:
        """(candidate, fold) -> record, for every fold trial of these folds that ended.

        `stored`: see `summaries`.
        """
        records = self.stored_trials() if stored is None else stored
        if not records:
            return {}
        own = self.folds().hash
        return {key: record for key, record in records.items() if record.folds_hash == own}

    def _trial_name(self, candidate: str, fold: int) -> str:
        return f"{self.trial_folder(candidate, fold)}/trial.json"

    def _fold_folders(self) -> Iterator[tuple[str, int]]:
        """(candidate, fold) of every fold trial that has a folder."""
        for candidate in self._candidate_folders():
            for fold in self._folds_of(candidate):
                yield candidate, fold

    def _candidate_folders(self) -> list[str]:
        return [name for name in self.files.names("trials") if _CANDIDATE_FOLDER.fullmatch(name)]

    def _folds_of(self, candidate: str) -> Iterator[int]:
        for folder in self.files.names(f"trials/{candidate}"):
            match = _FOLD_FOLDER.fullmatch(folder)
            if match is not None:
                yield int(match[1])

    # -- race decisions

    def save_decision(self, decision: RaceDecision) -> None:
        """Write the decision after a fold, in place of an earlier one.

        It comes after the fold trial's record, but before that of a trial which it stops.
        """
        folder = self.trial_folder(decision.candidate, decision.fold)
        self.files.write(f"{folder}/{DECISION}", record_json(decision))

    def decisions(self) -> dict[str, list[RaceDecision]]:
        """Candidate -> its decisions, in the order in which they were made.

        A damaged one counts as none, with a warning in the log: the race decides again.
        """
        made: dict[str, list[RaceDecision]] = defaultdict(list)
        for candidate, fold in self._fold_folders():
            name = f"{self.trial_folder(candidate, fold)}/{DECISION}"
            decision = self._of_fold(name, RaceDecision, candidate, fold)
            if decision is not None:
                made[candidate].append(decision)
        return {name: sorted(listed, key=lambda d: d.number) for name, listed in made.items()}


def _record_name(candidate: str) -> str:
    return f"trials/{candidate}/candidate.json"
