"""How long a sweep will still take, from what its fold trials have taken so far.

Takes fold trials that ended and candidates that are settled, gives seconds. Pure: no clock.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from experiment.records import CandidateSummary, TrialRecord


class Pace:
    """Seconds of a fold trial, by backbone, and fold trials of a candidate. Grows by one record at
    a time: nothing is walked again.

    The fold trials are the product-limit estimate of Kaplan and Meier (1958), in which candidates
    that are not settled count too: a mean over the settled ones would be of those that were
    stopped soon."""

    def __init__(self, folds: int) -> None:
        self.folds = folds
        self._seconds: dict[str, _Mean] = defaultdict(_Mean)  # by backbone
        self._any = _Mean()
        self._finished: Counter[str] = Counter()  # fold trials of a candidate
        self._reached = [0] * (folds + 1)  # candidates with so many finished ones or more
        self._ended = [0] * (folds + 1)  # candidates that were settled with so many
        self._broken = [_Mean() for _ in range(folds + 1)]  # parts of what was trained beyond them

    def add(self, trial: TrialRecord) -> None:
        """A fold trial that ended. One that did not finish says nothing about a whole one."""
        if trial.status == "finished":
            self._seconds[trial.backbone].add(trial.seconds)
            self._any.add(trial.seconds)
            self._finished[trial.candidate] += 1
            self._reached[self._finished[trial.candidate]] += 1

    def settle(self, summary: CandidateSummary) -> None:
        """A candidate that gets no further fold, after its fold trials were added. One that was
        stopped counts as the part of its epochs that it has trained."""
        finished = len(summary.finished)
        self._finished.pop(summary.candidate.candidate, None)
        broken = [_part(trial) for trial in summary.trials if trial.status != "finished"]
        if broken:
            self._broken[finished].add(sum(broken))
        else:
            self._ended[finished] += 1

    def fold_seconds(self, backbone: str) -> float | None:
        """Mean of the backbone's finished fold trials, else of everybody's; None without any."""
        own = self._seconds.get(backbone)
        return own.value if own is not None else self._any.value

    @property
    def seconds(self) -> float | None:
        """Mean of all finished fold trials."""
        return self._any.value

    @property
    def longest(self) -> float | None:
        """Of the backbones' means."""
        return max((m.value for m in self._seconds.values() if m.value is not None), default=None)

    def further_folds(self, done: int) -> float:
        """Fold trials that a candidate with `done` finished ones will still take, if it gets one
        more."""
        expected = 0.0
        for level in reversed(range(done, self.folds)):
            expected = self._expected(level, expected)
        return expected

    def _expected(self, level: int, after: float) -> float:
        """`after`: of a candidate that goes on from `level` + 1."""
        reached, broken = self._reached[level + 1], self._broken[level]
        goes_on = 1 - self._ended[level + 1] / reached if reached else 1.0
        if level + 1 == self.folds:
            goes_on = 0.0
        whole = reached / (reached + broken.count) if reached + broken.count else 1.0
        return whole * (1 + goes_on * after) + (1 - whole) * (broken.value or 0.0)


@dataclass(frozen=True)
class OpenCandidate:
    """A started candidate that is not settled."""

    backbone: str
    done: int
    """Finished fold trials."""
    running: Sequence[float]
    """Of each running fold trial the part that is trained, 0 to 1."""


@dataclass(frozen=True)
class Ahead:
    """What a sweep has before it."""

    new: int
    """Candidates that have not started."""
    open: Sequence[OpenCandidate]
    slots: int
    """Fold trials that run at a time."""
    fold_trials_left: float = math.inf
    """That the budget lets start."""
    seconds_left: float | None = None
    """Until the sweep's deadline; None: there is none."""


@dataclass(frozen=True)
class Outlook:
    """What is expected."""

    fold_trials: float
    """That have not ended yet, running ones included."""
    seconds: float | None
    """None while no fold trial has finished."""


def outlook(pace: Pace, ahead: Ahead) -> Outlook:
    """Expected fold trials × their seconds / slots, and the time when slots have no work at the
    end; within the limits of the budget."""
    waiting = [max(0.0, _further(pace, c) - len(c.running)) for c in ahead.open]
    new = ahead.new * pace.further_folds(0)
    to_start = sum(waiting) + new
    share = min(1.0, ahead.fold_trials_left / to_start) if to_start else 0.0
    fold_trials = share * to_start + sum(len(c.running) for c in ahead.open)
    mean = pace.seconds
    if mean is None:
        return Outlook(fold_trials, None)
    each = [pace.fold_seconds(c.backbone) or mean for c in ahead.open]
    unstarted = share * (new * mean + sum(n * s for n, s in zip(waiting, each, strict=True)))
    rests = [s * (1 - part) for c, s in zip(ahead.open, each, strict=True) for part in c.running]
    slots = max(1, ahead.slots)
    # The last of so many that end evenly within one fold trial is half a one later than their mean;
    # as much again, since folds of one candidate wait for each other's decisions.
    tail = (pace.longest or mean) * (slots - 1) / (slots + 1) if unstarted else 0.0
    seconds = max((unstarted + sum(rests)) / slots + tail, max(rests, default=0.0))
    return Outlook(fold_trials, _within(seconds, ahead.seconds_left))


class _Mean:
    """Of what was added."""

    def __init__(self) -> None:
        self._sum, self.count = 0.0, 0

    def add(self, value: float) -> None:
        self._sum += value
        self.count += 1

    @property
    def value(self) -> float | None:
        return self._sum / self.count if self.count else None


def _further(pace: Pace, candidate: OpenCandidate) -> float:
    """At least those that run, at most those that there are."""
    expected = max(pace.further_folds(candidate.done), float(len(candidate.running)))
    return min(expected, float(pace.folds - candidate.done))


def _part(trial: TrialRecord) -> float:
    if trial.status != "stopped":
        return 1.0
    epochs = float(trial.params.get("epochs", 0))
    return min(1.0, trial.epochs_trained / epochs) if epochs else 1.0


def _within(seconds: float, limit: float | None) -> float:
    return seconds if limit is None else max(0.0, min(seconds, limit))
