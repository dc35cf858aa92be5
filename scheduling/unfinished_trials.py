"""Records of fold trials that were stopped in mid-training or failed, and so wrote none themselves.

Takes the run folder, the candidate and how its trial ended, gives the `TrialRecord`; writes the one
that a kill between a decision and its record has prevented.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from foldrace.run_folder.records import CandidateRecord, CandidateSummary, RaceDecision, TrialRecord
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.rungs import seconds_of
from foldrace.search_spaces.hyperparameters import TrialParams, fold_trial_seed


def unfinished_trial(
    store: RunStore,
    candidate: CandidateRecord,
    fold: int,
    status: Literal["failed", "stopped"],
    *,
    epochs_trained: int = 0,
    seconds: float = 0.0,
    error: str | None = None,
) -> TrialRecord:
    """The record of a fold trial without a result, with the seed that it trained with."""
    params = TrialParams.from_dict(candidate.params)
    return TrialRecord(
        candidate=candidate.candidate,
        fold=fold,
        status=status,
        backbone=candidate.backbone,
        params=candidate.params,
        folds_hash=store.folds().hash,
        seed=fold_trial_seed(store.config().search.seed, candidate.backbone, params, fold),
        epochs_trained=epochs_trained,
        seconds=seconds,
        error=error,
    )


def stopped_trial(
    store: RunStore, candidate: CandidateRecord, decision: RaceDecision, seconds: float
) -> TrialRecord:
    """The record of a fold trial that was stopped after `decision.epoch` epochs."""
    epochs = decision.epoch or 0
    return unfinished_trial(
        store, candidate, decision.fold, "stopped", epochs_trained=epochs, seconds=seconds
    )


def with_stopped_trial(store: RunStore, summary: CandidateSummary) -> CandidateSummary:
    """The summary with the record of a stopped trial that is missing, where one is.

    The driver was killed before it had written that record; it is written now, with the seconds of
    the epochs in its train_log.csv.
    """
    ended = {trial.fold for trial in summary.trials if trial.status != "failed"}
    for decision in summary.decisions:
        if decision.epoch is None or decision.action != "stop" or decision.fold in ended:
            continue
        log = store.train_log(summary.candidate.candidate, decision.fold)
        seconds = 0.0 if log is None else seconds_of(log)
        record = stopped_trial(store, summary.candidate, decision, seconds)
        store.save_trial(record)
        others = (trial for trial in summary.trials if trial.fold != decision.fold)
        trials = sorted([*others, record], key=lambda trial: trial.fold)
        return replace(summary, trials=tuple(trials))
    return summary
