"""The fold trials of a run: their arrays, weights and states to resume from.

Takes and gives records and arrays; checks that a candidate's OOF rows are complete, and are those
that its trials wrote, before anyone blends them. `foldrace.run_folder.store.RunStore` is the door
to it. No pickle is ever read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from foldrace.core.files import read_text, record_json, to_bytes
from foldrace.run_folder.candidates import DECISION, CandidateFiles
from foldrace.run_folder.oof import (
    NOT_OF_THIS_TRIAL,
    columns_file,
    digest,
    mean_log_prob,
    npy,
    pooled,
    read_columns,
)
from foldrace.run_folder.records import CandidateSummary, Oof, TrialRecord
from foldrace.run_folder.variants import RAW

_RESUME_STATE, _TRAIN_LOG = "resume.pt", "train_log.csv"
_RUNG = "rung"  # and the number of epochs trained by then
_log = logging.getLogger("foldrace")


class TrialFiles(CandidateFiles):
    """The candidates and fold trials of one run folder, with the folds that they are of."""

    def save_trial(
        self,
        record: TrialRecord,
        oof: Mapping[str, Oof] | None = None,
        rows: NDArray[np.int64] | None = None,
        weights: Mapping[str, bytes] | None = None,
        log: str | None = None,
    ) -> TrialRecord:
        """Write a fold trial, `trial.json` last; the record that is there then.

        `weights` are safetensors files by variant, `log` is the text of train_log.csv. A failed
        trial's resume state stays, for the next attempt.

        Two attempts may write into one folder: a node that was given up for lost may go on beside
        the next attempt. A trial that another attempt has finished is left as it is. An attempt
        that finishes while this one writes its arrays loses: all of them are written again, and
        this record takes its place. Where both records come after both's arrays, which are written
        in seconds, nothing without locks can keep them apart: the digests in trial.json then tell
        readers that an array is of the other one. All of it holds for an object store as well.
        """
        there = self._finished_by_another(record)
        if there is not None:
            name = f"{record.candidate} fold{record.fold}"
            _log.warning("%s: another attempt has finished, this one's result is left out", name)
            return there
        folder = self.trial_folder(record.candidate, record.fold)
        if log is not None:
            self.save_train_log(record.candidate, record.fold, log)
        contents: dict[str, bytes] = {} if rows is None else {"rows.npy": npy(rows)}
        for variant, prob in (oof or {}).items():
            contents[f"oof{suffix(variant)}.npy"] = npy(prob.log_prob)
            contents[f"true_prob{suffix(variant)}.npy"] = npy(prob.true_prob)
        for variant, data in (weights or {}).items():
            contents[_weights_file(variant)] = data
        digests = {name: digest(data) for name, data in contents.items()}
        written = record.model_copy(update={"digests": record.digests | digests})
        self._write_all(folder, contents)
        if self._finished_by_another(record) is not None:
            self._write_all(folder, contents)
        self.files.write(f"{folder}/trial.json", record_json(written))
        if record.status != "failed":
            self.files.delete(f"{folder}/{_RESUME_STATE}")
        return written

    def _write_all(self, folder: str, contents: Mapping[str, bytes]) -> None:
        for name, data in contents.items():
            self.files.write(f"{folder}/{name}", data)

    def _finished_by_another(self, record: TrialRecord) -> TrialRecord | None:
        """The record of another attempt that has finished the trial."""
        there = self.stored_trial(record.candidate, record.fold)
        other = there is not None and there.attempt != record.attempt
        return there if other and there is not None and there.status == "finished" else None

    def forget_trial(self, candidate: str, fold: int) -> None:
        """Remove what a fold trial left, so that it runs anew."""
        self.files.delete(self.trial_folder(candidate, fold))

    def clear_trial(self, candidate: str, fold: int) -> None:
        """Remove what an attempt left, but not what the next one goes on from: its resume state.

        The decisions about it and what it had at its rungs stay with that. A trial that has
        finished stays whole.
        """
        there = self.stored_trial(candidate, fold)
        if there is not None and there.status == "finished":
            return
        folder = self.trial_folder(candidate, fold)
        self.files.delete_parts(folder)
        for name in self.files.names(folder):
            if name not in (_RESUME_STATE, _TRAIN_LOG, DECISION) and not name.startswith(_RUNG):
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
        """The safetensors file of a variant; ValueError where trial.json has another digest."""
        data = self.files.read(weights_name(candidate, fold, variant))
        expected = self._digests(candidate, fold).get(_weights_file(variant))
        if expected is not None and digest(data) != expected:
            raise ValueError(NOT_OF_THIS_TRIAL)
        return data

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

        They are in the order of these rows, of a single repeat as rounded to float16, of several
        their means (`mean_log_prob`). Of some folds: (n, C) on the rows of these folds, one repeat
        after the other. RunFolderError where rows are missing or damaged.
        """
        name = f"oof{suffix(variant)}.npy"
        if folds is not None:
            return self._pooled(candidate, name, folds).astype(np.float32)
        table = self.folds()
        parts = (table.folds_of(repeat) for repeat in range(table.repeats))
        return mean_log_prob([self.oof_log_prob(candidate, variant, part) for part in parts])

    def oof(
        self, candidate: str, variant: str, repeats: Iterable[int] | None = None
    ) -> NDArray[np.float32]:
        """(N, C) probabilities of a complete candidate, see `oof_log_prob`.

        `repeats`: the mean over these alone, which a stopped candidate may have, too.
        """
        if repeats is None:
            return np.exp(self.oof_log_prob(candidate, variant))
        parts = (self.folds().folds_of(repeat) for repeat in repeats)
        found = [self.oof_log_prob(candidate, variant, part) for part in parts]
        return np.exp(mean_log_prob(found))

    def true_prob(
        self, candidate: str, variant: str, folds: Iterable[int] | None = None
    ) -> NDArray[np.float32]:
        """(N,) probability of the true class on `scored_rows`, in their order.

        The mean over the repeats; of some folds as `oof_log_prob` has it.
        """
        found = self._pooled(candidate, f"true_prob{suffix(variant)}.npy", folds)
        repeats = self.folds().repeats
        if folds is not None or repeats == 1:
            return found
        return np.asarray(found.reshape(repeats, -1).mean(axis=0))

    def save_calibrated(
        self, summary: CandidateSummary, columns: Mapping[str, NDArray[np.float32]]
    ) -> None:
        """Write what the race derived from a complete candidate's OOF, for the next `resume`.

        `columns`: variant -> (R·N,) true-class probabilities at a temperature of its own, one
        repeat after the other.
        """
        self.files.write(_columns_name(summary), columns_file(summary.trials, columns))

    def calibrated(self, summary: CandidateSummary) -> dict[str, NDArray[np.float32]] | None:
        """The columns that `save_calibrated` wrote for exactly these trials, or None."""
        try:
            data = self.files.read(_columns_name(summary))
        except OSError:
            return None
        rows = self.folds().repeats * len(self.scored_rows())
        return read_columns(data, summary.trials, summary.own_variants, rows)

    def _pooled(
        self, candidate: str, name: str, folds: Iterable[int] | None = None
    ) -> NDArray[np.float32]:
        wanted = range(self.fold_count) if folds is None else folds
        folders = {fold: self.trial_folder(candidate, fold) for fold in wanted}
        digests = {fold: self._digests(candidate, fold) for fold in folders}
        return pooled(self.files, folders, name, self.folds(), digests)

    def _digests(self, candidate: str, fold: int) -> Mapping[str, str]:
        """File of a fold trial -> digest, as its record has them; empty without a record."""
        record = self.stored_trial(candidate, fold)
        return {} if record is None else record.digests


def suffix(variant: str) -> str:
    """Part of a file's name that tells the variant; empty for the raw one."""
    return "" if variant == RAW else f"_{variant}"


def weights_name(candidate: str, fold: int, variant: str) -> str:
    """Name of a variant's weights, relative to the run folder."""
    return f"{TrialFiles.trial_folder(candidate, fold)}/{_weights_file(variant)}"


def _weights_file(variant: str) -> str:
    return f"best{suffix(variant)}.safetensors"


def _columns_name(summary: CandidateSummary) -> str:
    return f"trials/{summary.candidate.candidate}/race.safetensors"
