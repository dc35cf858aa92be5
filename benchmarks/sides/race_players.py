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
from typing import Any, Protocol

from race_table import Key, RaceTable
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Repeater, Searcher
from ray.tune.search.repeater import TRIAL_INDEX

from foldrace.config.hyperparameters import TrialParams
from foldrace.config.schema import PointConfig, RaceConfig, SweepConfig
from foldrace.run_folder.records import TrialRecord
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.budget import Budget
from foldrace.scheduling.ledger import Ledger
from foldrace.scheduling.race import Race
from foldrace.scheduling.ray.fold_asha import FoldASHA
from foldrace.scheduling.ray.fold_searcher import CANDIDATE, FOLD, FoldSearcher
from foldrace.scheduling.ray.fold_trial import RUNG
from foldrace.scheduling.rungs import RungReport, rungs_of
from foldrace.scheduling.search.backbone_allocation import BackboneAllocation
from foldrace.scheduling.search.study import CandidateStudy
from foldrace.search_spaces.space import build_space

_METRIC = "val_logloss"


@dataclass
class _Trial:
    """What a scheduler reads of a Tune trial."""

    trial_id: str
    config: dict[str, Any]
    key: Key
    """Of the recorded fold trial."""
    last_result: dict[str, Any] = field(default_factory=dict)


class _Scheduler(Protocol):
    """What is called of a Tune scheduler; there is no Tune that it could call back."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None: ...
    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str: ...
    def on_trial_complete(
        self, tune_controller: Any, trial: Any, result: dict[str, Any]
    ) -> None: ...


class Foldrace:
    """The product's searcher in a run folder of its own, with FoldASHA where the race has it, or
    with Ray's ASHA over all fold trials alike."""

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
        judge = Race(self._store, config.race)
        self._searcher = _searcher(table, config, self._store, judge, slots)
        self._scheduler: _Scheduler | None = None
        if mixing_asha:
            self._scheduler = _plain_asha(table, config.race)
        elif self._race.stops_epochs:
            self._scheduler = FoldASHA(self._store, judge, self._race, self._searcher)

    def suggest(self, trial_id: str) -> Key | None:
        config = self._searcher.suggest(trial_id)
        if not isinstance(config, dict):
            return None
        asked = self._store.candidate(config[CANDIDATE])
        # Those that are newer than the recording are at their defaults.
        params = {k: v for k, v in asked.params.items() if k in self._table.candidates[0].params}
        key = self._recorded[_identity(asked.backbone, params)], int(config[FOLD])
        trial = self._trials[trial_id] = _Trial(trial_id, config, key)
        if self._scheduler is not None:
            self._scheduler.on_trial_add(None, trial)
        return key

    def report(self, trial_id: str, epochs: int) -> bool:
        trial = self._trials[trial_id]
        result = trial.last_result = self._result(trial, epochs)
        if (
            self._scheduler is not None
            and self._scheduler.on_trial_result(None, trial, result) == TrialScheduler.STOP
        ):
            return True
        self._searcher.on_trial_result(trial_id, result)
        return False

    def end(self, trial_id: str, stopped: bool) -> None:
        trial = self._trials.pop(trial_id)
        if not stopped:
            self._write(trial)
        elif not self._race.stops_epochs:
            self._write_stopped(trial)
        if self._scheduler is not None:
            self._scheduler.on_trial_complete(None, trial, trial.last_result)
        self._searcher.on_trial_complete(trial_id, trial.last_result)

    def _result(self, trial: _Trial, epochs: int) -> dict[str, Any]:
        """What Tune hands over of an epoch."""
        result = self._table.epoch(trial.key, epochs) | {"training_iteration": epochs}
        if trial.key[1] == 0 and epochs in self._rungs(trial):
            log = "\n".join(self._table.logs[trial.key].split("\n")[: epochs + 1]) + "\n"
            result[RUNG] = RungReport(log, self._table.rung_columns(trial.key[0], epochs))
        return result

    def _rungs(self, trial: _Trial) -> set[int]:
        if not self._race.stops_epochs:
            return set()
        asked = self._store.candidate(trial.config[CANDIDATE])
        rungs = rungs_of(self._race, TrialParams.from_dict(asked.params))
        return {rung.epoch for rung in rungs}

    def _write(self, trial: _Trial) -> None:
        """As the fold trial left it, under the candidate's number of this run."""
        recorded = self._table.trials[trial.key]
        record = recorded.model_copy(update={"candidate": trial.config[CANDIDATE]})
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
                candidate=trial.config[CANDIDATE],
                fold=trial.key[1],
                status="stopped",
                backbone=recorded.backbone,
                params=recorded.params,
                folds_hash=recorded.folds_hash,
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

    def suggest(self, trial_id: str) -> Key | None:
        config = self._repeater.suggest(trial_id)
        if not isinstance(config, dict):
            return None
        self._keys[trial_id] = config[CANDIDATE], config[TRIAL_INDEX]
        return self._keys[trial_id]

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
        return Searcher.FINISHED if name is None else {CANDIDATE: name}

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


def _searcher(
    table: RaceTable, config: SweepConfig, store: RunStore, judge: Race, slots: int
) -> FoldSearcher:
    search = config.search
    space, _ = build_space(config, "")
    stops = config.race.rule != "none"
    return FoldSearcher(
        store,
        CandidateStudy(space, search, len(table.classes), None, judge.gains),
        Ledger(table.fold_count, 0, config.race.min_complete if stops else None),
        judge,
        Budget(search, config.resources),
        BackboneAllocation(search.backbones, search.candidates, search.min_share, search.seed),
        lambda: slots,
    )


def _plain_asha(table: RaceTable, race: RaceConfig) -> ASHAScheduler:
    """With FoldASHA's grace and reduction, over the fold trials of all folds together."""
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
