"""The fold race as a Ray Tune searcher: a candidate's K folds are K Tune trials.

Takes Tune's questions and reports, gives it fold trials; the outcome of a trial is what its
`trial.json` says, never what Tune reports.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ray.tune.search import Searcher

from experiment.records import CandidateSummary, TrialRecord
from experiment.store import RunStore
from scheduling.ledger import FoldTask, Ledger
from scheduling.study import CandidateStudy

CANDIDATE, BACKBONE, PARAMS, FOLD = "candidate", "backbone", "params", "fold"
_ENDED = frozenset({"TERMINATED", "ERROR"})
_log = logging.getLogger("foldrace")


class TuneTrial(Protocol):
    """What is read of a Tune trial."""

    trial_id: str
    status: str


@dataclass
class Flight:
    """A fold trial that Tune has."""

    task: FoldTask
    epoch: int = 0
    val_logloss: float | None = None


class FoldSearcher(Searcher):
    """Suggests fold trials until every candidate of the budget is settled.

    `slots()` is how many trials the cluster can run now; `on_settled` hears of each candidate that
    ends.
    """

    def __init__(
        self,
        store: RunStore,
        study: CandidateStudy,
        ledger: Ledger,
        candidates: int,
        slots: Callable[[], int],
        on_trial_end: Callable[[TrialRecord], None] = lambda record: None,
        on_settled: Callable[[CandidateSummary], None] = lambda summary: None,
    ) -> None:
        super().__init__()  # no metric: Tune would end the sweep over a trial that reports none
        self._store, self._study, self.ledger = store, study, ledger
        self._candidates, self._slots = candidates, slots
        self._on_trial_end, self._on_settled = on_trial_end, on_settled
        self.flights: dict[str, Flight] = {}
        self._tune_trials: dict[str, TuneTrial] = {}
        self._seen = 0
        self.stopped = False

    # -- what Tune calls

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The next fold trial; None while the slots are full or nothing can start yet."""
        self._reconcile()
        if self.stopped:
            return Searcher.FINISHED
        if len(self.flights) >= self._slots():
            return None
        task = self.ledger.next_task() or self._new_candidate()
        if task is None:
            return None if self.flights else Searcher.FINISHED
        self.ledger.start(task)
        self.flights[trial_id] = Flight(task)
        return {
            CANDIDATE: task.candidate.candidate,
            BACKBONE: task.candidate.backbone,
            PARAMS: dict(task.candidate.params),
            FOLD: task.fold,
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        flight = self.flights.get(trial_id)
        if flight is not None and "epoch" in result:
            epoch, task = int(result["epoch"]) + 1, flight.task
            if flight.epoch == 0 and epoch > 1:
                _log.info(
                    "%s fold%d goes on from epoch %d", task.candidate.candidate, task.fold, epoch
                )
            flight.epoch = epoch
            flight.val_logloss = float(result["val_logloss"])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        self._settle(trial_id, silent=False)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: `resume` rebuilds everything from the run folder."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, likewise."""

    def get_state(self) -> dict[str, Any]:
        return {}

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default", **_: Any) -> None:
        """Nothing, likewise."""

    # -- what else happens

    def watch(self, trials: Sequence[TuneTrial]) -> None:
        """Look at Tune's own list: a trial whose worker could not be reset ends without a word
        to the searcher, which would wait for it for ever. Tune's list only grows."""
        for trial in trials[self._seen :]:
            self._tune_trials[trial.trial_id] = trial
        self._seen = len(trials)
        self._reconcile()

    def _reconcile(self) -> None:
        for trial_id in list(self.flights):
            trial = self._tune_trials.get(trial_id)
            if trial is not None and trial.status in _ENDED:
                self._settle(trial_id, silent=True)

    def _new_candidate(self) -> FoldTask | None:
        if len(self.ledger) >= self._candidates:
            return None
        record = self._study.ask(self.ledger.next_number)
        self._store.save_candidate(record)
        self.ledger.add(record)
        return FoldTask(record, 0)

    def _settle(self, trial_id: str, silent: bool) -> None:
        """Take a trial out of flight and book its outcome. `silent`: Tune ended it without
        telling; without a record it never ran, and is not to blame."""
        self._tune_trials.pop(trial_id, None)
        flight = self.flights.pop(trial_id, None)
        if flight is None or self.stopped:
            return
        candidate, fold = flight.task.candidate, flight.task.fold
        record = self._store.trial(candidate.candidate, fold)
        if record is None or record.status == "failed":
            reason = record.error if record else None
            again = (
                self.ledger.lose(candidate.candidate, fold)
                if silent and record is None
                else self.ledger.fail(candidate.candidate, fold)
            )
            last_line = (reason or "its worker ended without a result").strip().splitlines()[-1]
            consequence = "is tried again" if again else "fails its candidate"
            _log.warning("%s fold%d %s: %s", candidate.candidate, fold, consequence, last_line)
            if again:
                self._clear(candidate.candidate, fold)
                return
            record = self._failed(flight.task, reason)
        self._on_trial_end(record)
        settled = self.ledger.end(record)
        if settled is not None:
            self._store.forget_resume_states(settled.candidate.candidate)
            self._study.tell(settled)
            self._on_settled(settled)

    def _clear(self, candidate: str, fold: int) -> None:
        """For the next attempt, which goes on from the saved state; but the last of several begins
        anew, in case that it is the state which breaks the trial."""
        if self.ledger.last_of_several(candidate, fold):
            self._store.forget_trial(candidate, fold)
        else:
            self._store.clear_trial(candidate, fold)

    def _failed(self, task: FoldTask, reason: str | None) -> TrialRecord:
        record = TrialRecord(
            candidate=task.candidate.candidate,
            fold=task.fold,
            status="failed",
            backbone=task.candidate.backbone,
            params=task.candidate.params,
            folds_hash=self._store.folds().hash,
            seed=0,
            error=reason
            or "the worker process ended without a result: killed, out of memory, "
            "or its node was lost",
        )
        self._store.save_trial(record)
        return record
