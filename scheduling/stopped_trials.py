"""Records of fold trials that were stopped in mid-training, which only the driver can write.

Takes the decision that stopped one, gives its record; makes up for one that a kill has prevented.
"""

from __future__ import annotations

from dataclasses import replace

from experiment.records import CandidateRecord, CandidateSummary, RaceDecision, TrialRecord
from experiment.store import RunStore
from scheduling.rungs import seconds_of


def stopped_trial(
    candidate: CandidateRecord, decision: RaceDecision, folds_hash: str, seconds: float
) -> TrialRecord:
    """The record of a fold trial that was stopped after `decision.epoch` epochs."""
    return TrialRecord(
        candidate=candidate.candidate,
        fold=decision.fold,
        status="stopped",
        backbone=candidate.backbone,
        params=candidate.params,
        folds_hash=folds_hash,
        seed=0,
        epochs_trained=decision.epoch or 0,
        seconds=seconds,
    )


def with_stopped_trials(store: RunStore, summary: CandidateSummary) -> CandidateSummary:
    """As given, or with the record of a trial that the driver stopped but was killed before it had
    written that; it is written now, with the seconds of the epochs in its train_log.csv."""
    ended = {trial.fold for trial in summary.trials if trial.status != "failed"}
    for decision in summary.decisions:
        if decision.epoch is None or decision.action != "stop" or decision.fold in ended:
            continue
        log = store.train_log(summary.candidate.candidate, decision.fold)
        seconds = 0.0 if log is None else seconds_of(log)
        record = stopped_trial(summary.candidate, decision, store.folds().hash, seconds)
        store.save_trial(record)
        others = (trial for trial in summary.trials if trial.fold != decision.fold)
        trials = sorted([*others, record], key=lambda trial: trial.fold)
        return replace(summary, trials=tuple(trials))
    return summary
