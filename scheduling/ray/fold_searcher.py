"""The fold race as a Ray Tune searcher: a candidate's K folds are K Tune trials.

Takes Tune's questions and reports, gives it fold trials; the race decides about the next ones. The
outcome of a trial is what its `trial.json` says, never what Tune reports.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from ray.tune.search import Searcher

from foldrace.core.errors import message_line
from foldrace.run_folder.records import CandidateSummary, RaceDecision, TrialRecord
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.trial_record import trial_record
from foldrace.scheduling.budget import Budget, CompletionCost, SweepUsage
from foldrace.scheduling.ledger import FoldTask, Ledger
from foldrace.scheduling.race import Race, is_decided
from foldrace.scheduling.ray.fold_trial import CANDIDATE, FOLD
from foldrace.scheduling.search.backbone_allocation import BackboneAllocation
from foldrace.scheduling.search.study import CandidateStudy
from foldrace.scheduling.unfinished_trials import stopped_trial, with_stopped_trial

_ENDED = frozenset({"TERMINATED", "ERROR"})
_log = logging.getLogger("foldrace")


class TuneTrial(Protocol):
    """The attributes of a Tune trial that the searcher reads."""

    trial_id: str
    status: str

    @property
    def error_file(self) -> str | None:
        """Path of the text of its errors, or None."""


@dataclass
class RunningFold:
    """A fold trial that Tune runs."""

    task: FoldTask
    started: float = field(default_factory=time.monotonic)
    epoch: int = 0
    """Epochs that have ended."""
    val_logloss: float | None = None
    """Log loss of the last epoch that ended."""
    stop: RaceDecision | None = None
    """The decision by which it is to be stopped in mid-training, or None."""

    @property
    def seconds(self) -> float:
        """Seconds since Tune has got it."""
        return time.monotonic() - self.started


class FoldSearcher(Searcher):
    """Suggests fold trials to Tune until every candidate of the budget is settled."""

    def __init__(
        self,
        store: RunStore,
        study: CandidateStudy,
        ledger: Ledger,
        race: Race,
        budget: Budget,
        allocation: BackboneAllocation,
        slots: Callable[[], int],
        on_trial_end: Callable[[TrialRecord], None] = lambda record: None,
        on_settled: Callable[[CandidateSummary], None] = lambda summary: None,
        on_decision: Callable[[RaceDecision], None] = lambda decision: None,
        devices: float = 1.0,
        cost: Callable[[str, int], CompletionCost] = lambda backbone, folds: CompletionCost(folds),
        seconds_left: Callable[[], float | None] = lambda: None,
    ) -> None:
        """Begin a sweep without candidates; `replay` takes in those of earlier sessions.

        `slots()`: trials that the cluster can run now; the `on_` functions are called after each
        event. For the budget: `devices` of a trial, `cost(backbone, folds)` of so many folds of a
        candidate, `seconds_left()` until the deadline.
        """
        super().__init__()  # no metric: Tune would end the sweep over a trial that reports none
        self._store, self._study, self.ledger = store, study, ledger
        self._race, self._budget, self._allocation = race, budget, allocation
        self._slots, self._devices = slots, devices
        self._cost, self._seconds_left = cost, seconds_left
        self._on_trial_end, self._on_settled = on_trial_end, on_settled
        self._on_decision = on_decision
        self.running_folds: dict[str, RunningFold] = {}
        self._tune_trials: dict[str, TuneTrial] = {}
        self._seen = 0
        self._nothing_to_ask = False
        self.stopped = False
        self.import_error: str | None = None
        """Python's words for what a worker could not import, which ends the sweep; or None."""

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        """Nothing for Tune's state file: `resume` rebuilds everything from the run folder."""
        return object, ()

    # -- what Tune calls

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The next fold trial; None while the slots are full or nothing can start yet."""
        self._reconcile()
        if self.stopped:
            return Searcher.FINISHED
        if len(self.running_folds) >= self._slots():
            return None
        task = self._next_task()
        if task is None:
            return None if self.running_folds else Searcher.FINISHED
        self.ledger.start(task)
        self.running_folds[trial_id] = RunningFold(task)
        return {CANDIDATE: task.candidate.candidate, FOLD: task.fold}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Note the epoch that a trial reports."""
        running = self.running_folds.get(trial_id)
        if running is not None and "epoch" in result:
            epoch, task = int(result["epoch"]) + 1, running.task
            if running.epoch == 0 and epoch > 1:
                _log.info(
                    "%s fold%d goes on from epoch %d", task.candidate.candidate, task.fold, epoch
                )
            running.epoch = epoch
            running.val_logloss = float(result["val_logloss"])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Book the outcome of a trial that has ended."""
        self._end(trial_id, silent=False)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: `resume` rebuilds everything from the run folder."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, likewise."""

    def get_state(self) -> dict[str, Any]:
        """Nothing, likewise."""
        return {}

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default", **_: Any) -> None:
        """Nothing, likewise."""

    # -- what the session and the scheduler call

    def watch(self, trials: Sequence[TuneTrial]) -> None:
        """Book trials that ended without a call of `on_trial_complete`, by Tune's own list.

        A trial whose worker could not be reset ends so, and would be waited for for ever. Tune's
        list only grows.
        """
        for trial in trials[self._seen :]:
            self._tune_trials[trial.trial_id] = trial
        self._seen = len(trials)
        self._reconcile()

    def replay(self, summaries: Sequence[CandidateSummary]) -> None:
        """Take in the candidates of earlier sessions; the `on_` functions are not called.

        A candidate whose last decision a kill has prevented is judged now, and a stopped trial
        without its record gets it.
        """
        whole = [with_stopped_trial(self._store, summary) for summary in summaries]
        self._race.replay(whole)
        for summary in whole:
            self.ledger.add(summary.candidate, summary.trials, summary.decisions)
        for summary in whole:
            candidate = summary.candidate.candidate
            if not is_decided(summary) and not self.ledger.is_hopeless(candidate):
                self._save_decision(self._race.judge(self.ledger.summary(candidate)))
        for summary in self.ledger.summaries():
            self._study.replay(summary)
            if summary.settled:
                self._store.forget_resume_states(summary.candidate.candidate)

    def request_stop(self, trial_id: str, decision: RaceDecision) -> None:
        """Note the decision by which Tune is stopping a trial in mid-training.

        It is booked when Tune says that the trial has ended, unless it has finished by then.
        """
        self.running_folds[trial_id].stop = decision
        self.ledger.expect_stop(decision.candidate, decision.fold)

    @property
    def usage(self) -> SweepUsage:
        """Usage of all sessions, running fold trials up to now included."""
        seconds = self.ledger.trained_seconds + sum(r.seconds for r in self.running_folds.values())
        return SweepUsage(
            candidates=len(self.ledger),
            fold_trials=self.ledger.trials_started,
            device_seconds=seconds * self._devices,
            seconds_left=self._seconds_left(),
        )

    @property
    def has_more_candidates(self) -> bool:
        """True while there are further candidates to ask for."""
        return not self._nothing_to_ask and self._budget.has_candidates(self.usage)

    @property
    def _committed(self) -> SweepUsage:
        """`usage`, with all the seconds that running fold trials are expected to take.

        Otherwise as many as there are slots would be started for the same last hour.
        """
        usage, running = self.usage, list(self.running_folds.values())
        backbones = {r.task.candidate.backbone for r in running}
        expected = {backbone: self._cost(backbone, 1).fold_seconds or 0.0 for backbone in backbones}
        ahead = sum(max(0.0, expected[r.task.candidate.backbone] - r.seconds) for r in running)
        return replace(usage, device_seconds=usage.device_seconds + ahead * self._devices)

    def _reconcile(self) -> None:
        for trial_id in list(self.running_folds):
            trial = self._tune_trials.get(trial_id)
            if trial is not None and trial.status in _ENDED:
                self._end(trial_id, silent=True)

    def _next_task(self) -> FoldTask | None:
        """A waiting fold, else a new candidate's first one, else whatever keeps a slot busy."""
        return self._next_fold() or self._new_candidate() or self._next_fold(spare=True)

    def _next_fold(self, spare: bool = False) -> FoldTask | None:
        """The next fold that the race grants, if the budget lets its candidate become complete."""
        while (task := self.ledger.next_task(spare)) is not None:
            candidate = task.candidate.candidate
            if self._race.is_stale(candidate) and not self.ledger.running_count(candidate):
                self._finish_settled(self._judge(candidate))
                continue
            cost = self._cost(task.candidate.backbone, self.ledger.folds_left(candidate))
            if self._budget.admits_fold(self._committed, cost):
                return task
            self.ledger.defer(candidate)
        return None

    def _new_candidate(self) -> FoldTask | None:
        if self._nothing_to_ask or not self._budget.admits_candidate(self.usage):
            return None
        number = self.ledger.next_number
        backbone = self._allocation.choose(number, self.ledger.started, self.ledger.gains())
        cost = self._cost(backbone, self.ledger.folds)
        if not self._budget.admits_candidate(self._committed, cost):
            return None
        record = self._study.ask(number, backbone)
        if record is None:
            self._nothing_to_ask = True
            return None
        self._store.save_candidate(record)
        self.ledger.add(record)
        return FoldTask(record, 0)

    def _judge(self, candidate: str) -> CandidateSummary | None:
        """Have the race judge the candidate; returns its summary when it is settled."""
        summary = self.ledger.summary(candidate)
        return self._decide(self._race.judge(summary, self.ledger.running_count(candidate)))

    def _decide(self, decision: RaceDecision) -> CandidateSummary | None:
        settled = self._save_decision(decision)
        self._on_decision(decision)
        return settled

    def _save_decision(self, decision: RaceDecision) -> CandidateSummary | None:
        self._store.save_decision(decision)
        _log.info("%s", decision.line)
        return self.ledger.decide(decision)

    def _end(self, trial_id: str, silent: bool) -> None:
        """Take a trial out of the running ones and book its outcome.

        `silent`: Tune ended it without a call; without a record it never ran, and is not to blame.
        """
        trial = self._tune_trials.pop(trial_id, None)
        running = self.running_folds.pop(trial_id, None)
        if running is None or self.stopped:
            return
        self.import_error = _import_error(trial) if self._is_without_record(running) else None
        if self.import_error is not None:
            self.stopped = True  # every other trial would meet the same
            return
        record = self._outcome(running, silent)
        if record is None:
            return
        candidate = record.candidate
        self._race.trial_ended(record)
        if record.status == "stopped" and running.stop is not None:
            # The decision first: a kill in between must not leave a stop without its reason.
            self._decide(self._race.numbered(running.stop))
            self._store.save_trial(record)
        self._on_trial_end(record)
        self.ledger.recall_deferred()
        settled = self.ledger.end(record)
        if not self.ledger.is_hopeless(candidate):
            settled = self._judge(candidate)
        self._finish_settled(settled)

    def _is_without_record(self, running: RunningFold) -> bool:
        return self._store.trial(running.task.candidate.candidate, running.task.fold) is None

    def _outcome(self, running: RunningFold, silent: bool) -> TrialRecord | None:
        """The record of a trial that Tune has ended; None where it has none and is tried again.

        That of a stopped one is not saved yet.
        """
        candidate, fold = running.task.candidate.candidate, running.task.fold
        record = self._store.trial(candidate, fold)
        if record is not None and record.status != "failed":
            return record
        if running.stop is not None:
            task = running.task
            seconds, now = running.seconds, time.time()
            return stopped_trial(self._store, task.candidate, running.stop, seconds, now)
        if self.ledger.is_stopped(candidate):
            self._store.forget_trial(candidate, fold)
            self._finish_settled(self.ledger.drop(candidate, fold))
            return None
        return self._failed_attempt(running.task, record, silent)

    def _failed_attempt(
        self, task: FoldTask, record: TrialRecord | None, silent: bool
    ) -> TrialRecord | None:
        candidate, fold = task.candidate.candidate, task.fold
        reason = record.error if record else None
        blameless = silent and record is None
        count = self.ledger.lose if blameless else self.ledger.fail
        again = count(candidate, fold)
        why = message_line(reason or "its worker ended without a result")
        consequence = "is tried again" if again else "fails its candidate"
        _log.warning("%s fold%d %s: %s", candidate, fold, consequence, why)
        if again:
            self._clear(candidate, fold)
            return None
        return self._failed(task, reason)

    def _finish_settled(self, settled: CandidateSummary | None) -> None:
        if settled is not None:
            self._store.forget_resume_states(settled.candidate.candidate)
            self._study.tell(settled)
            self._on_settled(settled)

    def _clear(self, candidate: str, fold: int) -> None:
        """Clear the trial's folder for the next attempt, which goes on from the saved state.

        The last of several attempts begins anew, in case that it is the state which breaks it.
        """
        if self.ledger.last_of_several(candidate, fold):
            self._store.forget_trial(candidate, fold)
        else:
            self._store.clear_trial(candidate, fold)

    def _failed(self, task: FoldTask, reason: str | None) -> TrialRecord:
        error = reason or (
            "the worker process ended without a result: killed, out of memory, or its node was lost"
        )
        record = trial_record(
            self._store, task.candidate, task.fold, "failed", error=error, ended_at=time.time()
        )
        self._store.save_trial(record)
        return record


def _import_error(trial: TuneTrial | None) -> str | None:
    """The last import error in what Tune has written down of a trial's failure, or None."""
    if trial is None or trial.error_file is None:
        return None
    try:
        text = Path(trial.error_file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.findall(r"(?:ModuleNotFound|Import)Error: (.+)", text)
    return found[-1].strip() if found else None
