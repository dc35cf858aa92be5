"""What happened between two `Progress` records, as plain lines of text.

For output that is no terminal: a log file, a batch job, a pipe.
"""

from __future__ import annotations

import time

from experiment.progress import Event, Progress
from experiment.records import CandidateSummary, RaceDecision, TrialRecord
from reporting.markup import difference, duration, number


class EventLines:
    """One line for each fold trial that ended, each candidate that the race stopped and each one
    that was settled since the last `Progress`. What had ended before the session, as after
    `resume`, is one line together."""

    def __init__(self) -> None:
        self._told = 0  # of the session's events
        self._started = False

    def new(self, progress: Progress) -> list[str]:
        fresh = progress.events[self._told :]
        lines = [line for event in fresh if (line := _line(event)) is not None]
        before = progress.trials_done - sum(isinstance(e, TrialRecord) for e in fresh)
        if not self._started and before > 0:
            lines.insert(0, f"{before} ended before")
        self._told, self._started = len(progress.events), True
        now = time.strftime("%H:%M:%S")
        done = f"{progress.trials_done}/{progress.trials_total} fold trials"
        eta = f"  ETA {duration(progress.eta_s)}" if progress.eta_s is not None else ""
        return [printable(f"{now}  {done}  {line}{eta}") for line in lines]


def printable(text: str) -> str:
    """Without line ends, escape sequences and other control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


def _line(event: Event) -> str | None:
    """None for what another event tells."""
    if isinstance(event, TrialRecord):
        return _trial_event(event)
    if isinstance(event, RaceDecision):
        return event.line if event.action == "stop" else None
    stopped = any(decision.action == "stop" for decision in event.decisions)
    return None if stopped else _candidate_event(event)


def _trial_event(trial: TrialRecord) -> str:
    head = f"{trial.candidate} fold{trial.fold} {trial.status}"
    if trial.best is not None:
        return f"{head}: log loss {number(trial.variants[trial.best].val_logloss)}"
    lines = (trial.error or "").strip().splitlines()
    return f"{head}: {lines[0]}" if lines else head


def _candidate_event(summary: CandidateSummary) -> str:
    head = f"{summary.candidate.candidate} {summary.status}"
    if summary.best is None:
        return head
    loss = f"OOF log loss {number(summary.pooled_logloss(summary.best))}"
    folds = "" if summary.status == "complete" else f" on {len(summary.finished)} fold(s)"
    if summary.gain is not None:
        loss += f", gain {difference(summary.gain)}"
    return f"{head}: {loss}{folds} ({summary.candidate.backbone})"
