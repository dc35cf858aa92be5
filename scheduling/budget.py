"""Limits of a sweep: candidates, fold trials, hours of its devices, and the wall time that is left.

Takes counts and seconds, says what may still start. Pure: no Ray, no clock of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from foldrace.config.schema import ResourcesConfig, SearchConfig, SweepConfig
from foldrace.core.errors import Problem

_HOUR = 3600.0


@dataclass(frozen=True)
class SweepUsage:
    """Usage of the limits by a sweep, in all sessions, running fold trials included."""

    candidates: int
    """Candidates that have started."""
    fold_trials: int
    """Fold trials that have started."""
    device_seconds: float
    """Seconds of fold trials × devices of each; those of running ones up to now."""
    seconds_left: float | None = None
    """Seconds until the sweep's deadline, or None."""


@dataclass(frozen=True)
class CompletionCost:
    """Expected cost of completing a candidate from where it is."""

    folds: int = 1
    """Fold trials that have not started yet."""
    fold_seconds: float | None = None
    """Expected seconds of one of them; None before any has been measured."""
    slots: int = 1
    """Fold trials that run at a time."""
    devices: float = 1.0
    """Devices of one fold trial; without GPUs one for each of its processes."""
    fits_any_time: bool = False
    """True where nothing else fits: what the deadline ends costs no more than an idle slot."""


_ONE_FOLD = CompletionCost()


class Budget:
    """The limits of a sweep, and what may still start within them.

    A fold trial may start only if its candidate can be complete within every limit, since the blend
    takes complete candidates alone.
    """

    def __init__(self, search: SearchConfig, resources: ResourcesConfig) -> None:
        self._search, self._resources = search, resources

    def has_candidates(self, usage: SweepUsage) -> bool:
        """True while not all candidates have started."""
        return usage.candidates < self._search.candidates

    def admits_candidate(self, usage: SweepUsage, cost: CompletionCost = _ONE_FOLD) -> bool:
        """True where a new candidate may start."""
        return self.has_candidates(usage) and self.admits_fold(usage, cost)

    def admits_fold(self, usage: SweepUsage, cost: CompletionCost = _ONE_FOLD) -> bool:
        """True where the next fold of a started candidate may start."""
        return self.exhausted_limit(usage, cost) is None

    def fold_trials_left(self, usage: SweepUsage, cost: CompletionCost = _ONE_FOLD) -> float:
        """Fold trials like those of `cost` that the limits of fold trials and hours still allow.

        Infinite without such limits.
        """
        hours = self._device_seconds_left(usage)
        if cost.fold_seconds:
            hours /= cost.fold_seconds * cost.devices
        elif hours > 0:
            hours = math.inf
        return max(0.0, min(self._fold_trials_left(usage), hours))

    def exhausted_limit(self, usage: SweepUsage, cost: CompletionCost = _ONE_FOLD) -> str | None:
        """The limit that `cost` would exceed, in one line for people, or None.

        That the number of candidates is reached is an end like any other, and no limit here.
        """
        if cost.folds > self._fold_trials_left(usage):
            return f"search.fold_trials: {usage.fold_trials} of {self._search.fold_trials} started"
        if not self._fits_hours(usage, cost):
            hours = f"{usage.device_seconds / _HOUR:.3g} of {self._resources.gpu_hours:g}"
            return f"resources.gpu_hours: {hours} are spent"
        if not _fits_time(usage.seconds_left, cost):
            left = f"{max(0.0, usage.seconds_left or 0.0):.0f} s of it"
            return f"resources.time_budget: {left} are left for fold trials"
        return None

    def _fold_trials_left(self, usage: SweepUsage) -> float:
        limit = self._search.fold_trials
        return math.inf if limit is None else limit - usage.fold_trials

    def _device_seconds_left(self, usage: SweepUsage) -> float:
        hours = self._resources.gpu_hours
        return math.inf if hours is None else hours * _HOUR - usage.device_seconds

    def _fits_hours(self, usage: SweepUsage, cost: CompletionCost) -> bool:
        left = self._device_seconds_left(usage)
        if cost.fold_seconds is None:
            return left > 0
        return left > 0 and left >= cost.folds * cost.fold_seconds * cost.devices


def devices_of_a_trial(resources: ResourcesConfig, gpus: float) -> float:
    """Devices of one fold trial, by which its seconds are multiplied.

    `gpus`: those of each of its processes; without GPUs a process counts as one device.
    """
    return resources.devices_per_trial * (gpus if gpus > 0 else 1.0)


def budget_problems(config: SweepConfig) -> list[Problem]:
    """Problems of limits with which no candidate could ever be complete."""
    limit, folds = config.search.fold_trials, config.folds.trials
    if limit is None or limit >= folds:
        return []
    keys = "folds.k" if config.folds.repeats == 1 else "folds.k × folds.repeats"
    message = f"is {limit}, but a candidate is complete with {keys} = {folds} fold trials"
    return [Problem("search.fold_trials", f"{message}; allowed: at least {folds}")]


def _fits_time(left: float | None, cost: CompletionCost) -> bool:
    """True where the folds, in rounds of as many as there are slots, end within `left` seconds."""
    if left is None:
        return True
    if cost.fold_seconds is None or cost.fits_any_time:
        return left > 0
    rounds = math.ceil(cost.folds / max(1, cost.slots))
    return left > 0 and left >= rounds * cost.fold_seconds


@dataclass(frozen=True)
class UpdateCost:
    """What updates of the result while the sweep ran tell of the one at its end."""

    seconds: float
    """Seconds that the longest took: one that leaves a better blend is short."""
    pending: int
    """Candidates that have improved the race's blend since: their models have not seen the test set
    yet."""


_MOST_FINISHING_PART = 1 / 3  # with less than two thirds for the sweep there is little to blend
_SPARE_PART = 0.02  # of the budget: what is kept beside what is expected
_LEAST_REPORT, _MOST_REPORT = 5.0, 30.0  # seconds: ends of Ray and process, the report
_REPORT_PART = 0.8  # of the time that start and imports took on this machine, as busy as it is
_FULL_SEARCH = 2.0  # the last blend takes so many updates: all methods, measured times
_PER_CANDIDATE = 0.5  # of an update: not every candidate enters the blend


@dataclass(frozen=True)
class Deadline:
    """The moment by which fold trials end, so that the whole command ends within its budget."""

    budget: float
    """Seconds of wall time for the whole command."""
    started: float
    """When the command began, on the clock that `seconds_left` is asked with."""
    startup: float = 0.0
    """Seconds from there to the sweep: imports, checks, Ray's start."""

    def finishing_time(self, update: UpdateCost | None = None) -> float:
        """Seconds kept for blend, submission and report.

        The report by what the start has taken, the rest by an update of the result. Before there
        was one nothing is complete, and a first candidate is worth more than the last seconds.
        Never more than a third of the budget.
        """
        wanted = min(max(_LEAST_REPORT, _REPORT_PART * self.startup), _MOST_REPORT)
        wanted += _SPARE_PART * self.budget
        if update is not None:
            wanted += (_FULL_SEARCH + _PER_CANDIDATE * update.pending) * update.seconds
        return min(wanted, _MOST_FINISHING_PART * self.budget)

    def seconds_left(self, now: float, update: UpdateCost | None = None) -> float:
        """Seconds for fold trials from `now` on; below 0 after the deadline.

        `update` as in `finishing_time`.
        """
        return self.started + self.budget - self.finishing_time(update) - now
