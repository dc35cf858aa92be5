"""Who plays in the race's benchmark: Foldrace's own searcher, with its own stopping or with Ray's,
and Ray's Repeater.

Each takes a `RaceTable` and candidates in an order, and is asked and told as Tune asks and tells.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from race_table import Key, RaceTable
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Repeater, Searcher
from ray.tune.search.repeater import TRIAL_INDEX
from sides.race_replay import Start

from foldrace.config.hyperparameters import TrialParams
from foldrace.config.schema import PointConfig, RaceConfig, SweepConfig
from foldrace.run_folder.records import TrialRecord
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.room import Room
from foldrace.scheduling.rungs import rungs_of
from foldrace.scheduling.search.study import CandidateStudy
from foldrace.scheduling.state import FoldTask
from foldrace.scheduling.sweep import Sweep
from foldrace.search_spaces.space import build_space

_METRIC, _CANDIDATE = "val_logloss", "candidate"


@dataclass
class _Trial:
    """What a scheduler reads of a Tune trial."""

    trial_id: str
    task: FoldTask
    judged: bool
    key: Key
    """Of the recorded fold trial."""
    last_result: dict[str, Any] = field(default_factory=dict)

    @property
    def here(self) -> Key:
        """Candidate, by its number of this run, and fold."""
        return self.task.candidate.candidate, self.task.fold


class Foldrace:
    """The product's sweep in a run folder of its own; its trials may be ended by Ray's ASHA over
    all fold trials alike instead of being parked."""

    def __init__(
        self,
        table: RaceTable,
        config: SweepConfig,
        folder: Path,
        slots: int,
        mixing_asha: bool = False,
    ) -> None:
        """`config`: see `sweep_config`."""
        self._table, self._race = table, config.race
        self._store = RunStore(folder)
        self._store.create(config, table.folds_csv, table.classes)
        self._recorded = {_identity(c.backbone, c.params): c.candidate for c in table.candidates}
        self._trials: dict[str, _Trial] = {}
        self._left: dict[Key, int] = {}  # of parked fold trials, the epochs trained
        space, _ = build_space(config, "")
        study = CandidateStudy(space, config.search, len(table.classes))
        self._sweep = Sweep(self._store, config, study, Room(lambda: slots))
        self._asha = _plain_asha(table, config.race) if mixing_asha else None

    def suggest(self, trial_id: str) -> Start | None:
        task = self._sweep.suggest(trial_id)
        if not isinstance(task, FoldTask):
            return None
        record = task.candidate
        # Those that are newer than the recording are at their defaults.
        known = self._table.candidates[0].params
        params = {k: v for k, v in record.params.items() if k in known}
        key = self._recorded[_identity(record.backbone, params)], task.fold
        judged = self._sweep.running[trial_id].judged
        trial = self._trials[trial_id] = _Trial(trial_id, task, judged, key)
        if self._asha is not None:
            self._asha.on_trial_add(None, trial)
        return Start(key, self._left.pop(trial.here, 0))

    def report(self, trial_id: str, epochs: int) -> bool:
        trial = self._trials[trial_id]
        trial.last_result = self._table.epoch(trial.key, epochs) | {"training_iteration": epochs}
        if self._asha is not None:
            action = self._asha.on_trial_result(None, trial, trial.last_result)
            return bool(action == TrialScheduler.STOP)
        if not trial.judged or epochs not in self._rungs(trial):
            return False
        log = "\n".join(self._table.logs[trial.key].split("\n")[: epochs + 1]) + "\n"
        columns = self._table.rung_columns(trial.key[0], epochs)
        self._store.save_rung(*trial.here, epochs, log, columns)
        leaves = self._sweep.rung_reached(trial_id, epochs)
        if leaves:
            self._left[trial.here] = epochs
        return leaves

    def end(self, trial_id: str, stopped: bool) -> None:
        trial = self._trials.pop(trial_id)
        if not stopped:
            self._write(trial)
        elif self._asha is not None:
            self._write_stopped(trial)
        if self._asha is not None:
            self._asha.on_trial_complete(None, trial, trial.last_result)
        self._sweep.trial_over(trial_id)

    def _rungs(self, trial: _Trial) -> set[int]:
        params = TrialParams.from_dict(trial.task.candidate.params)
        return {rung.epoch for rung in rungs_of(self._race, params)}

    def _write(self, trial: _Trial) -> None:
        """As the fold trial left it, under the candidate's number of this run."""
        recorded = self._table.trials[trial.key]
        seconds = sum(self._table.seconds(trial.key))
        update = {
            "candidate": trial.here[0],
            "seconds": seconds,
            "folds_hash": self._store.folds().hash,  # of the first folds alone, perhaps
        }
        record = recorded.model_copy(update=update)
        log = self._table.logs[trial.key]
        if recorded.status != "finished":
            self._store.save_trial(record, log=log)
            return
        rows = (self._table.folds.fold == trial.key[1]).nonzero()[0]
        self._store.save_trial(record, oof=self._table.fold_oof(trial.key), rows=rows, log=log)

    def _write_stopped(self, trial: _Trial) -> None:
        """Ray's ASHA has stopped it: its candidate can never be complete."""
        recorded = self._table.trials[trial.key]
        self._store.save_trial(
            TrialRecord(
                candidate=trial.here[0],
                fold=trial.key[1],
                status="stopped",
                backbone=recorded.backbone,
                params=recorded.params,
                folds_hash=self._store.folds().hash,
                seed=recorded.seed,
                epochs_trained=int(trial.last_result["training_iteration"]),
            )
        )


class RepeaterOverList:
    """Ray's Repeater, whose inner searcher gives the candidates in their order."""

    def __init__(self, table: RaceTable, order: Sequence[str]) -> None:
        self._table = table
        self._repeater = Repeater(_Listed(order), repeat=table.fold_count)
        self._last: dict[str, dict[str, Any]] = {}
        self._keys: dict[str, Key] = {}

    def suggest(self, trial_id: str) -> Start | None:
        config = self._repeater.suggest(trial_id)
        if not isinstance(config, dict):
            return None
        self._keys[trial_id] = config[_CANDIDATE], config[TRIAL_INDEX]
        return Start(self._keys[trial_id])

    def report(self, trial_id: str, epochs: int) -> bool:
        self._last[trial_id] = self._table.epoch(self._keys[trial_id], epochs)
        self._repeater.on_trial_result(trial_id, self._last[trial_id])
        return False

    def end(self, trial_id: str, stopped: bool) -> None:
        self._repeater.on_trial_complete(trial_id, self._last.pop(trial_id))


class _Listed(Searcher):
    """A searcher without any search."""

    def __init__(self, order: Sequence[str]) -> None:
        super().__init__(metric=_METRIC, mode="min")
        self._left: Iterator[str] = iter(order)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]
        name = next(self._left, None)
        return Searcher.FINISHED if name is None else {_CANDIDATE: name}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing to learn."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to keep."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to read."""


def sweep_config(
    table: RaceTable, order: Sequence[str], race: RaceConfig, fold_trials: int | None
) -> SweepConfig:
    """The recorded sweep's, with the candidates as a fixed list; `fold_trials` is its budget."""
    by_name = {c.candidate: c for c in table.candidates}
    points = tuple(
        PointConfig(backbone=by_name[name].backbone, params=by_name[name].params) for name in order
    )
    search = table.config.search.model_copy(
        update={
            "sampler": "list",
            "points": points,
            "candidates": len(points),
            "fold_trials": fold_trials,
        }
    )
    return table.config.model_copy(update={"search": search, "race": race})


def _plain_asha(table: RaceTable, race: RaceConfig) -> ASHAScheduler:
    """With the race's grace and reduction, over the fold trials of all folds together."""
    epochs = int(table.candidates[0].params["epochs"])
    return ASHAScheduler(
        metric=_METRIC,
        mode="min",
        max_t=epochs,
        grace_period=math.ceil(race.grace * epochs),
        reduction_factor=race.reduction,
    )


def _identity(backbone: str, params: Mapping[str, object]) -> str:
    return json.dumps([backbone, dict(params)], sort_keys=True)
