"""What of a time budget is kept for the end of a run: blend, submission, report.

Takes sizes of the data and the seconds of the fold trials so far, gives seconds. Pure: no clock of
its own.

How far a sweep may go: candidates, fold trials, hours of its devices, wall time.

Takes counts and seconds, says what may still start. Pure: no Ray, no clock of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from foldrace.config.schema import ResourcesConfig, SearchConfig, SweepConfig
from foldrace.core.errors import Problem
from foldrace.run_folder.records import CandidateSummary, TrialRecord

_HOUR = 3600.0
_OVERRUN = 0.5
"""Part of one fold trial by which the expected end may lie beyond a limit: expectations are often
too long, since patience ends trials early, and idle devices bring nothing."""


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
    """What may still start. A fold trial is started only if its candidate can be complete within
    every limit, to half a fold trial: fewer folds would bring the blend nothing."""

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
        return left > 0 and left >= (need.folds - _OVERRUN) * need.fold_seconds * need.devices


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
    return left > 0 and left >= (rounds - _OVERRUN) * need.fold_seconds


_FIXED = 10.0
"""Seconds: ending the workers and Ray, imports, the report, the end of the process. It was 5.2 s on
an idle machine of two cores."""
_PER_BACKBONE = 3.0
"""Seconds: a model is read and timed, once for each architecture."""
_PER_PROBABILITY = 1.5e-7
"""Seconds of one OOF probability of one member: temperatures of the folds, each fitted in several
passes over the (N, C) array."""
_PER_TEST_IMAGE = 0.005
"""Seconds: it is read and decoded once, for all models."""
_MEMBERS = 12
"""That a blend has. Ours had 6 to 25 of 64 to 1,000, most weight on few."""
_PASSES = 2.0
"""What a training row costs in an epoch, in forward passes: three with the backward pass, but fewer
where the input is what takes the time."""
_MOST = 1 / 3
"""Of the budget: with less than two thirds for the sweep there would be little to blend."""


@dataclass(frozen=True)
class Ending:
    """What the end of a run works on."""

    rows: int
    """Of folds.csv."""
    classes: int
    folds: int
    test_images: int
    """That the blend will predict: test set and held-out rows."""
    backbones: int
    max_members: int | None = None
    max_ms_per_image: float | None = None
    """Limits of the blend, as in the config."""


class Deadline:
    """Seconds left for fold trials, so that the whole command ends within its budget. What is kept
    for the end follows what fold trials take: it grows and falls while the sweep runs."""

    def __init__(self, budget: float, started: float, ending: Ending) -> None:
        """`budget` in seconds; `started`: when the command began, on the clock that `seconds_left`
        is asked with."""
        self._budget, self._started, self._ending = budget, started, ending
        self._passes = 0.0  # forward passes of one image
        self._trained = 0.0  # seconds that they took
        self._variants = 0  # of complete candidates: what may be a member

    def add(self, trial: TrialRecord) -> None:
        """A fold trial that ended."""
        if trial.status == "finished" and trial.epochs_trained:
            self._passes += _PASSES * trial.epochs_trained * self._ending.rows
            self._trained += trial.seconds

    def settle(self, summary: CandidateSummary) -> None:
        """A candidate that ended; a complete one may be in the blend."""
        if summary.status == "complete":
            self._variants += len(summary.variants)

    def seconds_left(self, now: float) -> float:
        """For fold trials, from `now` on; below 0 after the deadline."""
        return self._started + self._budget - self.reserved - now

    @property
    def reserved(self) -> float:
        """Seconds for the end of the run: what it is expected to take, a third of the budget at
        most."""
        return min(self.expected, _MOST * self._budget)

    @property
    def expected(self) -> float:
        """Seconds that the end of the run will take, however large the budget is."""
        end = self._ending
        blend = _PER_PROBABILITY * end.rows * end.classes * self._variants
        return _FIXED + _PER_BACKBONE * end.backbones + blend + self._submission()

    def _submission(self) -> float:
        """Fold models × test images × seconds of one forward pass, as fold trials had them."""
        end = self._ending
        members = min(self._variants, end.max_members or _MEMBERS, _MEMBERS)
        each = self._trained / self._passes if self._passes else 0.0
        models = members * end.folds * each
        if end.max_ms_per_image is not None:
            models = min(models, end.max_ms_per_image / 1000)
        return end.test_images * (_PER_TEST_IMAGE + models)
