"""What happened between two `Progress` records, as plain lines of text.

For output that is no terminal: a log file, a batch job, a pipe.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from experiment.progress import Progress
from experiment.records import CandidateSummary, TrialRecord
from reporting.markup import duration, number


class EventLines:
    """One line for each fold trial that ended and each candidate that was settled since the last
    `Progress`. What had ended before the first one, as after `resume`, is one line together."""

    def __init__(self) -> None:
        self._trials: set[tuple[str, int, str, float]] = set()
        self._settled: set[str] = set()
        self._started = False

    def new(self, progress: Progress) -> list[str]:
        events = list(self._events(progress.finished))
        if not self._started and events:
            events = [f"{len(self._trials)} ended before"]
        self._started = True
        now = time.strftime("%H:%M:%S")
        done = f"{progress.trials_done}/{progress.trials_total} fold trials"
        eta = f"  ETA {duration(progress.eta_s)}" if progress.eta_s is not None else ""
        return [printable(f"{now}  {done}  {event}{eta}") for event in events]

    def _events(self, summaries: Sequence[CandidateSummary]) -> Iterator[str]:
        for summary in summaries:
            yield from (_trial_event(t) for t in summary.trials if self._is_new(t))
            name = summary.candidate.candidate
            if summary.status == "running":
                self._settled.discard(name)
            elif name not in self._settled:
                self._settled.add(name)
                yield _candidate_event(summary)

    def _is_new(self, trial: TrialRecord) -> bool:
        """A fold trial that failed may end a second time."""
        key = (trial.candidate, trial.fold, trial.status, trial.seconds)
        known = key in self._trials
        self._trials.add(key)
        return not known


def printable(text: str) -> str:
    """Without line ends, escape sequences and other control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


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
    return f"{head}: {loss}{folds} ({summary.candidate.backbone})"
