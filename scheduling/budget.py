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
class Spent:
    """Of a sweep so far, all sessions and running fold trials included."""

    candidates: int
    fold_trials: int
    device_seconds: float
    """Seconds of fold trials × devices of each; those of running ones up to now."""
    seconds_left: float | None = None
    """Until the sweep's deadline; None: there is none."""


@dataclass(frozen=True)
class Need:
    """What it takes to complete a candidate from where it is."""

    folds: int = 1
    """Fold trials that have not started yet."""
    fold_seconds: float | None = None
    """Expected, of one of them; None: not measured yet."""
    slots: int = 1
    """Fold trials that run at a time."""
    devices: float = 1.0
    """Of one fold trial; without GPUs one for each of its processes."""


_ONE_FOLD = Need()


class Budget:
    """What may still start: a fold trial only if its candidate can be complete within every limit,
    since the blend takes complete candidates alone."""

    def __init__(self, search: SearchConfig, resources: ResourcesConfig) -> None:
        self._search, self._resources = search, resources

    def has_candidates(self, spent: Spent) -> bool:
        """Whether not all candidates have started."""
        return spent.candidates < self._search.candidates

    def admits_candidate(self, spent: Spent, need: Need = _ONE_FOLD) -> bool:
        """Whether a new candidate may start."""
        return self.has_candidates(spent) and self.admits_fold(spent, need)

    def admits_fold(self, spent: Spent, need: Need = _ONE_FOLD) -> bool:
        """Whether the next fold of a started candidate may start."""
        return (
            need.folds <= self._fold_trials_left(spent)
            and self._fits_hours(spent, need)
            and _fits_time(spent.seconds_left, need)
        )

    def fold_trials_left(self, spent: Spent, need: Need = _ONE_FOLD) -> float:
        """How many more fold trials like those of `need` the limits of fold trials and hours
        allow; infinite without such limits."""
        hours = self._device_seconds_left(spent)
        if need.fold_seconds:
            hours /= need.fold_seconds * need.devices
        elif hours > 0:
            hours = math.inf
        return max(0.0, min(self._fold_trials_left(spent), hours))

    def spent_up(self, spent: Spent, need: Need = _ONE_FOLD) -> str | None:
        """The limit that lets nothing more start that takes as much as `need`, in one line for
        people; None while none does. That the number of candidates is reached is an end like any
        other, and no limit here."""
        if need.folds > self._fold_trials_left(spent):
            return f"search.fold_trials: {spent.fold_trials} of {self._search.fold_trials} started"
        if not self._fits_hours(spent, need):
            hours = f"{spent.device_seconds / _HOUR:.3g} of {self._resources.gpu_hours:g}"
            return f"resources.gpu_hours: {hours} are spent"
        if not _fits_time(spent.seconds_left, need):
            left = f"{max(0.0, spent.seconds_left or 0.0):.0f} s of it"
            return f"resources.time_budget: {left} are left for fold trials"
        return None

    def _fold_trials_left(self, spent: Spent) -> float:
        limit = self._search.fold_trials
        return math.inf if limit is None else limit - spent.fold_trials

    def _device_seconds_left(self, spent: Spent) -> float:
        hours = self._resources.gpu_hours
        return math.inf if hours is None else hours * _HOUR - spent.device_seconds

    def _fits_hours(self, spent: Spent, need: Need) -> bool:
        left = self._device_seconds_left(spent)
        if need.fold_seconds is None:
            return left > 0
        return left > 0 and left >= need.folds * need.fold_seconds * need.devices


def devices_of_a_trial(resources: ResourcesConfig, gpus: float) -> float:
    """What a fold trial's seconds are multiplied by. `gpus`: of each of its processes; on a machine
    without GPUs a process counts as one device."""
    return resources.devices_per_trial * (gpus if gpus > 0 else 1.0)


def budget_problems(config: SweepConfig) -> list[Problem]:
    """Limits with which no candidate could ever be complete."""
    limit, folds = config.search.fold_trials, config.folds.k
    if limit is None or limit >= folds:
        return []
    message = f"is {limit}, but a candidate is complete with folds.k = {folds} fold trials"
    return [Problem("search.fold_trials", f"{message}; allowed: at least {folds}")]


def _fits_time(left: float | None, need: Need) -> bool:
    """The folds run in rounds of as many as there are slots."""
    if left is None:
        return True
    if need.fold_seconds is None:
        return left > 0
    rounds = math.ceil(need.folds / max(1, need.slots))
    return left > 0 and left >= rounds * need.fold_seconds


_LEAST_FINISHING = 60.0  # seconds
_FINISHING_PART = 0.1
_MOST_FINISHING_PART = 1 / 3  # with less than two thirds for the sweep there is little to blend


@dataclass(frozen=True)
class Deadline:
    """The moment by which fold trials end, so that the whole command ends within its budget."""

    budget: float
    """Seconds of wall time for the whole command."""
    started: float
    """When the command began, on the clock that `seconds_left` is asked with."""

    @property
    def finishing_time(self) -> float:
        """Seconds kept for blend, submission and report: 10 % of the budget, but at least 60 s,
        and never more than a third of it."""
        wanted = max(_LEAST_FINISHING, _FINISHING_PART * self.budget)
        return min(wanted, _MOST_FINISHING_PART * self.budget)

    def seconds_left(self, now: float) -> float:
        """Seconds for fold trials from `now` on; below 0 after the deadline."""
        return self.started + self.budget - self.finishing_time - now
