"""The run folder: the only code that knows its files.

Takes and gives records and arrays; checks that a candidate's OOF rows are complete before anyone
blends them. No pickle is ever read.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import ValidationError

from foldrace.config.load import to_yaml
from foldrace.config.schema import SweepConfig
from foldrace.core.errors import RunFolderError, listing
from foldrace.core.files import (
    Files,
    LocalFiles,
    open_files,
    read_record,
    read_text,
    record_json,
    to_bytes,
)
from foldrace.core.plugin_files import PluginFile
from foldrace.dataset.folds import FoldTable, read_folds
from foldrace.run_folder.ensemble_folder import EnsembleFolder
from foldrace.run_folder.oof import columns_file, npy, pooled, read_columns
from foldrace.run_folder.records import (
    RAW,
    CandidateRecord,
    CandidateStatus,
    CandidateSummary,
    Oof,
    RaceDecision,
    TrialRecord,
)
from foldrace.run_folder.tables import decisions_csv, leaderboard_csv, trials_csv

_CONFIG, _FOLDS, _CLASSES = "sweep.yaml", "folds.csv", "classes.json"
_PLUGINS = "plugins"
_RESUME_STATE = "resume.safetensors"
_DECISION = "decision.json"
_FOLD_FOLDER = re.compile(r"fold(\d+)")


class RunStore:
    """One run folder: a local path, or a URL such as s3://bucket/run."""

    def __init__(self, root: str | Path) -> None:
        self.files: Files = open_files(root)
        self.root = self.files.root
        self._folds: FoldTable | None = None

    @property
    def blend(self) -> EnsembleFolder:
        """What is kept of the blend."""
        return EnsembleFolder(self.files)

    # -- the run as a whole

    @property
    def exists(self) -> bool:
        return self.files.exists(_CONFIG)

    def create(
        self,
        config: SweepConfig,
        folds: str,
        classes: Sequence[str],
        plugins: Sequence[PluginFile] = (),
    ) -> None:
        """Lay the folder out. `folds` is the text of folds.csv; sweep.yaml comes last, so that
        a folder with it is a run."""
        try:
            self.files.delete(_PLUGINS)  # of a run that was not made
            for file in plugins:
                self.files.write(f"{_PLUGINS}/{file.module}.py", file.source)
            self.files.write(_FOLDS, to_bytes(folds))
            self.files.write(_CLASSES, to_bytes(json.dumps(list(classes), ensure_ascii=False)))
            self.save_config(config)
        except OSError as error:
            raise RunFolderError.single(self.root, f"cannot be written: {error}") from error
        self._folds = None

    @classmethod
    def open(cls, root: str | Path) -> RunStore:
        """An existing run; RunFolderError where there is none."""
        store = cls(root)
        if not store.exists:
            raise RunFolderError.single(
                store.root, f"is no run folder (it has no {_CONFIG}); `run CONFIG` makes one"
            )
        return store

    def config(self) -> SweepConfig:
        """The resolved config that the run was made with."""
        text = read_text(self.files, _CONFIG)
        try:
            return SweepConfig.model_validate_json(json.dumps(yaml.safe_load(text)))
        except (ValidationError, yaml.YAMLError) as error:
            raise RunFolderError.single(
                f"{self.root}/{_CONFIG}", f"is damaged, or of another version: {error}"
            ) from error

    def save_config(self, config: SweepConfig) -> None:
        self.files.write(_CONFIG, to_bytes(to_yaml(config)))

    def plugins(self) -> tuple[PluginFile, ...]:
        """The run's own copies of its plugins, in the order of their names."""
        names = [name for name in self.files.names(_PLUGINS) if name.endswith(".py")]
        return tuple(
            PluginFile(
                name.removesuffix(".py"),
                self.files.read(f"{_PLUGINS}/{name}"),
                f"{self.root}/{_PLUGINS}/{name}",
            )
            for name in sorted(names)
        )

    def classes(self) -> tuple[str, ...]:
        return tuple(json.loads(read_text(self.files, _CLASSES)))

    def folds(self) -> FoldTable:
        """folds.csv, read once."""
        if self._folds is None:
            self._folds = read_folds(read_text(self.files, _FOLDS))
        return self._folds

    def labels(self) -> NDArray[np.int64]:
        """(n,) class index of every row of folds.csv; RunFolderError where it is of no class."""
        index = {name: i for i, name in enumerate(self.classes())}
        targets = self.folds().targets
        strange = [i for i, target in enumerate(targets) if target not in index]
        if strange:
            first = f"line {strange[0] + 2} has the target {targets[strange[0]]!r}"
            raise RunFolderError.single(
                f"{self.root}/{_FOLDS}",
                f"{len(strange):,} rows are of no class of {_CLASSES}, for example {first}; "
                f"allowed: {listing(index)}",
            )
        return np.array([index[target] for target in targets], dtype=np.int64)

    def scored_rows(self) -> NDArray[np.int64]:
        """(N,) rows that some fold trial scores: all, or with k: 1 the validation rows."""
        return np.flatnonzero(self.folds().fold >= 0)

    # -- candidates and trials

    def save_candidate(self, record: CandidateRecord) -> None:
        self.files.write(f"trials/{record.candidate}/candidate.json", record_json(record))

    def candidates(self) -> list[CandidateRecord]:
        """Every candidate ever suggested, in the order of their numbers: c9999 before c10000."""
        names = sorted(self.files.names("trials"), key=lambda name: (len(name), name))
        paths = [f"trials/{name}/candidate.json" for name in names]
        return [read_record(self.files, p, CandidateRecord) for p in paths if self.files.exists(p)]

    def save_trial(
        self,
        record: TrialRecord,
        oof: Mapping[str, Oof] | None = None,
        rows: NDArray[np.int64] | None = None,
        weights: Mapping[str, bytes] | None = None,
        log: str | None = None,
    ) -> None:
        """Write a fold trial; `trial.json` last, so that a trial with it is whole.
        `weights` are safetensors files, `log` the text of train_log.csv. A failed trial's resume
        state stays, for the next attempt."""
        folder = self.trial_folder(record.candidate, record.fold)
        if log is not None:
            self.files.write(f"{folder}/train_log.csv", to_bytes(log))
        if rows is not None:
            self.files.write(f"{folder}/rows.npy", npy(rows))
        for variant, probabilities in (oof or {}).items():
            self.files.write(f"{folder}/oof{suffix(variant)}.npy", npy(probabilities.log_prob))
            self.files.write(
                f"{folder}/true_prob{suffix(variant)}.npy", npy(probabilities.true_prob)
            )
        for variant, data in (weights or {}).items():
            self.files.write(weights_name(record.candidate, record.fold, variant), data)
        self.files.write(f"{folder}/trial.json", record_json(record))
        if record.status != "failed":
            self.files.delete(f"{folder}/{_RESUME_STATE}")

    def trial(self, candidate: str, fold: int) -> TrialRecord | None:
        """The trial's record, or None while it has not ended. A damaged record, or one of other
        folds, is no record: the trial runs again."""
        name = f"{self.trial_folder(candidate, fold)}/trial.json"
        if not self.files.exists(name):
            return None
        try:
            record = TrialRecord.model_validate_json(self.files.read(name))
        except ValidationError:
            return None
        return record if record.folds_hash == self.folds().hash else None

    def trials(self) -> dict[tuple[str, int], TrialRecord]:
        """(candidate, fold) -> record, for every fold trial that ended."""
        found: dict[tuple[str, int], TrialRecord] = {}
        for candidate in self.files.names("trials"):
            for folder in self.files.names(f"trials/{candidate}"):
                match = _FOLD_FOLDER.fullmatch(folder)
                record = self.trial(candidate, int(match[1])) if match else None
                if record is not None:
                    found[candidate, record.fold] = record
        return found

    def save_decision(self, decision: RaceDecision) -> None:
        """Of a fold whose record is there, or whose trial is stopped in mid-training, then before
        its record; a later one takes its place."""
        folder = self.trial_folder(decision.candidate, decision.fold)
        self.files.write(f"{folder}/{_DECISION}", record_json(decision))

    def decisions(self) -> dict[str, list[RaceDecision]]:
        """Candidate -> its decisions, in the order in which they were made. A damaged one is none:
        the race decides again."""
        found: dict[str, list[RaceDecision]] = defaultdict(list)
        for candidate in self.files.names("trials"):
            for folder in self.files.names(f"trials/{candidate}"):
                name = f"trials/{candidate}/{folder}/{_DECISION}"
                if _FOLD_FOLDER.fullmatch(folder) and self.files.exists(name):
                    with contextlib.suppress(ValidationError):
                        found[candidate].append(
                            RaceDecision.model_validate_json(self.files.read(name))
                        )
        return {name: sorted(listed, key=lambda d: d.number) for name, listed in found.items()}

    def forget_trial(self, candidate: str, fold: int) -> None:
        """Remove what a fold trial left, so that it runs anew."""
        self.files.delete(self.trial_folder(candidate, fold))

    def clear_trial(self, candidate: str, fold: int) -> None:
        """Remove what an attempt left, but not its resume state: the next one goes on from it."""
        folder = self.trial_folder(candidate, fold)
        self.files.delete_parts(folder)
        for name in self.files.names(folder):
            if name != _RESUME_STATE:
                self.files.delete(f"{folder}/{name}")

    def save_resume_state(self, candidate: str, fold: int, data: bytes | memoryview) -> None:
        """`data` is a safetensors file; it takes the place of an older state."""
        self.files.write(f"{self.trial_folder(candidate, fold)}/{_RESUME_STATE}", data)

    def resume_state(self, candidate: str, fold: int) -> bytes | None:
        """What an interrupted fold trial goes on from."""
        name = f"{self.trial_folder(candidate, fold)}/{_RESUME_STATE}"
        return self.files.read(name) if self.files.exists(name) else None

    def forget_resume_states(self, candidate: str) -> None:
        """Those of a settled candidate's folds."""
        for fold in range(self.fold_count):
            self.files.delete(f"{self.trial_folder(candidate, fold)}/{_RESUME_STATE}")

    def train_log(self, candidate: str, fold: int) -> str | None:
        name = f"{self.trial_folder(candidate, fold)}/train_log.csv"
        return read_text(self.files, name) if self.files.exists(name) else None

    def save_train_log(self, candidate: str, fold: int, log: str) -> None:
        """Of a trial that is stopped in mid-training, before its record."""
        self.files.write(f"{self.trial_folder(candidate, fold)}/train_log.csv", to_bytes(log))

    def weights(self, candidate: str, fold: int, variant: str) -> bytes:
        """The safetensors file of a variant."""
        return self.files.read(weights_name(candidate, fold, variant))

    def has_weights(self, candidate: str, variant: str) -> bool:
        """Whether those of all folds are there."""
        names = (weights_name(candidate, fold, variant) for fold in range(self.fold_count))
        return all(self.files.exists(name) for name in names)

    def weight_bytes(self, candidate: str, variant: str) -> int:
        """Of all folds together."""
        names = (weights_name(candidate, fold, variant) for fold in range(self.fold_count))
        return sum(self.files.size(name) for name in names)

    def remove_weights(self, candidate: str, variant: str) -> None:
        """Those of all folds; probabilities and records stay."""
        for fold in range(self.fold_count):
            self.files.delete(weights_name(candidate, fold, variant))

    # -- OOF

    def oof_log_prob(
        self, candidate: str, variant: str, folds: Iterable[int] | None = None
    ) -> NDArray[np.float32]:
        """(N, C) natural-log probabilities of a complete candidate on `scored_rows`, in their
        order, as rounded to float16; of some folds: (n, C) on those rows that are theirs."""
        return self._pooled(candidate, f"oof{suffix(variant)}.npy", folds).astype(np.float32)

    def oof(self, candidate: str, variant: str) -> NDArray[np.float32]:
        """(N, C) probabilities, as `oof_log_prob`."""
        return np.exp(self.oof_log_prob(candidate, variant))

    def true_prob(self, candidate: str, variant: str) -> NDArray[np.float32]:
        """(N,) probability of the true class on `scored_rows`, in their order."""
        return self._pooled(candidate, f"true_prob{suffix(variant)}.npy")

    def save_calibrated(
        self, summary: CandidateSummary, columns: Mapping[str, NDArray[np.float32]]
    ) -> None:
        """Variant -> (N,) true-class probabilities of a complete candidate at a temperature of its
        own: derived from its OOF rows, for the next `resume`."""
        self.files.write(_columns_name(summary), columns_file(summary.trials, columns))

    def calibrated(self, summary: CandidateSummary) -> dict[str, NDArray[np.float32]] | None:
        """What `save_calibrated` wrote of exactly these trials; None where there is none."""
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

    # -- derived tables and results

    def summaries(self, running: bool = False) -> list[CandidateSummary]:
        """Every candidate with its status, from the files alone. `running`: the sweep goes on,
        so that incomplete candidates are `running` and not `unfinished`."""
        by_candidate: dict[str, list[TrialRecord]] = defaultdict(list)
        for (candidate, _), record in sorted(self.trials().items()):
            by_candidate[candidate].append(record)
        decided = self.decisions()
        return [
            summarise(
                record,
                by_candidate[record.candidate],
                self.fold_count,
                running,
                decided.get(record.candidate, ()),
            )
            for record in self.candidates()
        ]

    @property
    def fold_count(self) -> int:
        return int(self.folds().fold.max()) + 1

    def write_tables(self, summaries: Iterable[CandidateSummary]) -> None:
        """leaderboard.csv, trials.csv and decisions.csv."""
        listed = list(summaries)
        self.files.write("leaderboard.csv", to_bytes(leaderboard_csv(listed)))
        self.files.write("trials.csv", to_bytes(trials_csv(listed)))
        self.files.write("decisions.csv", to_bytes(decisions_csv(listed)))

    @staticmethod
    def trial_folder(candidate: str, fold: int) -> str:
        return f"trials/{candidate}/fold{fold}"

    def log_folder(self) -> Path | None:
        """Where log files go: they are appended to, which only a mounted folder can do."""
        return self.files.path / "logs" if isinstance(self.files, LocalFiles) else None


def summarise(
    candidate: CandidateRecord,
    trials: Sequence[TrialRecord],
    folds: int,
    running: bool,
    decisions: Sequence[RaceDecision] = (),
) -> CandidateSummary:
    """A candidate's one status: complete means that all K folds ended well. A decision to stop
    holds for ever, whatever else is there: another fold that was in flight, another rule."""
    statuses = {trial.status for trial in trials}
    status: CandidateStatus
    if "stopped" in statuses or any(d.action == "stop" for d in decisions):
        status = "stopped"
    elif "diverged" in statuses:
        status = "diverged"
    elif "failed" in statuses:
        status = "failed"
    elif len(trials) == folds:
        status = "complete"
    else:
        status = "running" if running else "unfinished"
    return CandidateSummary(candidate, status, tuple(trials), folds, tuple(decisions))


def suffix(variant: str) -> str:
    """File names of the raw variant have no suffix."""
    return "" if variant == RAW else f"_{variant}"


def _columns_name(summary: CandidateSummary) -> str:
    return f"trials/{summary.candidate.candidate}/race.safetensors"


def weights_name(candidate: str, fold: int, variant: str) -> str:
    return f"{RunStore.trial_folder(candidate, fold)}/best{suffix(variant)}.safetensors"


def differing_keys(old: SweepConfig, new: SweepConfig) -> list[str]:
    """Dotted keys in which two configs differ."""
    left, right = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    return sorted(k for k in left.keys() | right.keys() if left.get(k) != right.get(k))


def _flat(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
