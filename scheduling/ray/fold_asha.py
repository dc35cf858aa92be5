"""Stopping in mid-training, by comparison at the same fraction of each trial's own schedule.

A trial is compared with trials of the same fold alone. Takes epoch reports, tells Tune which trials
to stop. The rungs are those of ASHA: Li et al., A System for Massively Parallel Hyperparameter
Tuning, 2020.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from foldrace.config.hyperparameters import TrialParams
from foldrace.config.schema import RaceConfig
from foldrace.core.files import warn_ignored
from foldrace.run_folder.records import CandidateSummary, RaceDecision
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.ledger import FoldTask, Ledger
from foldrace.scheduling.race import Race
from foldrace.scheduling.ray.fold_searcher import RunningFold, TuneTrial
from foldrace.scheduling.ray.fold_trial import RUNG
from foldrace.scheduling.rungs import Rung, RungRecords, RungReport, losses_of, rungs_of

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial


class RunningFolds(Protocol):
    """The part of the searcher that the scheduler uses."""

    @property
    def running_folds(self) -> Mapping[str, RunningFold]:
        """Tune's trial id -> the fold trial."""

    @property
    def ledger(self) -> Ledger:
        """The state of every candidate."""

    def request_stop(self, trial_id: str, decision: RaceDecision) -> None:
        """Note the decision by which the trial is being stopped."""


class FoldASHA(FIFOScheduler):
    """Tune scheduler that stops a candidate's first fold at a rung.

    It is stopped where its loss is not among the best 1/reduction and its gain over the race's
    blend is not above zero, z standard errors allowed. It needs no metric but the `RungReport`s of
    the trials; those of a candidate's lowest fold alone count, so that an earlier session's logs
    give the same records.
    """

    def __init__(
        self, store: RunStore, race: Race, config: RaceConfig, searcher: RunningFolds
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._store, self._race, self._config, self._searcher = store, race, config, searcher
        self._records = RungRecords()

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        """Nothing for Tune's state file: `resume` rebuilds everything from the run folder."""
        return object, ()

    def replay(self, summaries: Iterable[CandidateSummary]) -> None:
        """Record the rungs that the first folds of an earlier session have reached."""
        for summary in summaries:
            if not summary.trials:
                continue
            name, fold = summary.candidate.candidate, min(t.fold for t in summary.trials)
            log = self._store.train_log(name, fold)
            try:
                losses = losses_of(log) if log is not None else []
            except ValueError as error:
                folder = f"{self._store.root}/{self._store.trial_folder(name, fold)}"
                warn_ignored(f"{folder}/train_log.csv", str(error))
                continue
            self._records.add(name, fold, self._rungs(summary.candidate.params), losses)

    def on_trial_result(
        self, tune_controller: TuneController, trial: Trial | TuneTrial, result: dict[str, Any]
    ) -> str:
        """STOP where the report lets the trial be stopped, else CONTINUE."""
        running = self._searcher.running_folds.get(trial.trial_id)
        report: RungReport | None = result.get(RUNG)
        # A trial's end brings its last report once more, with `done`.
        if running is None or report is None or result.get("done"):
            return TrialScheduler.CONTINUE
        decision = self._judge(running.task, report)
        if decision is None:
            return TrialScheduler.CONTINUE
        self._store.save_train_log(decision.candidate, decision.fold, report.log)
        self._searcher.request_stop(trial.trial_id, decision)
        return TrialScheduler.STOP

    def on_trial_complete(
        self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]
    ) -> None:
        """Drop the columns from the last report, which Tune keeps of every trial."""
        trial.last_result.pop(RUNG, None)

    def _judge(self, task: FoldTask, report: RungReport) -> RaceDecision | None:
        """Record the report; the decision where it stops the trial, else None."""
        others = self._other_folds(task)
        if any(fold < task.fold for fold in others):
            return None
        name, rungs = task.candidate.candidate, self._rungs(task.candidate.params)
        losses = losses_of(report.log)
        self._records.add(name, task.fold, rungs, losses)
        here = [rung for rung in rungs if rung.epoch == len(losses)]
        if not here or not report.columns or others:
            return None
        return self._without_merit(task, here[0], report)

    def _other_folds(self, task: FoldTask) -> set[int]:
        """The candidate's other folds that have ended or are running."""
        name = task.candidate.candidate
        ended = {trial.fold for trial in self._searcher.ledger.summary(name).trials}
        tasks = [running.task for running in self._searcher.running_folds.values()]
        active = {other.fold for other in tasks if other.candidate.candidate == name}
        return (ended | active) - {task.fold}

    def _without_merit(self, task: FoldTask, rung: Rung, report: RungReport) -> RaceDecision | None:
        """The decision to stop where it is not among the best of its rung and has no gain."""
        name, reduction, z = task.candidate.candidate, self._config.reduction, self._config.z
        score = self._records.score(name, task.fold, rung.fraction)
        cut = self._records.cut(task.fold, rung.fraction, reduction)
        if cut is None or score <= cut:
            return None
        found = self._race.gain_of(task.fold, report.columns)
        if found is None:
            return None
        variant, gain = found
        if gain.mean + z * gain.se > 0:
            return None
        count = self._records.count(task.fold, rung.fraction)
        return RaceDecision(
            number=0,
            candidate=name,
            fold=task.fold,
            epoch=rung.epoch,
            rule="epoch",
            action="stop",
            variant=variant,
            folds_done=0,
            rows=gain.rows,
            gain=gain.mean,
            gain_se=gain.se,
            z=z,
            score=score,
            limit=cut,
            complete=0,
            epochs_trained=0,
            reason=f"gain {gain.mean:.4f} ± {gain.se:.4f}, and log loss {score:.4f} is above "
            f"{cut:.4f}, the cut for the best 1/{reduction} of {count} trials at "
            f"{rung.fraction:.0%} of their epochs",
        )

    def _rungs(self, params: Mapping[str, int | float | str]) -> tuple[Rung, ...]:
        return rungs_of(self._config, TrialParams.from_dict(params))
