"""Records of fold trials that were stopped in mid-training, and so wrote none themselves.

Takes the run folder, the candidate and the decision, gives the `TrialRecord`; writes the one that a
kill between a decision and its record has prevented.
"""

from __future__ import annotations

from dataclasses import replace

from foldrace.run_folder.records import CandidateRecord, CandidateSummary, RaceDecision, TrialRecord
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.trial_record import trial_record
from foldrace.scheduling.rungs import seconds_of


def stopped_trial(
    store: RunStore,
    candidate: CandidateRecord,
    decision: RaceDecision,
    seconds: float,
    ended_at: float = 0.0,
) -> TrialRecord:
    """The record of a fold trial that was stopped after `decision.epoch` epochs.

    `ended_at` is in Unix seconds; 0: it is not known.
    """
    return trial_record(
        store,
        candidate,
        decision.fold,
        "stopped",
        epochs_trained=decision.epoch or 0,
        seconds=seconds,
        started_at=ended_at - seconds if ended_at else 0.0,
        ended_at=ended_at,
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
