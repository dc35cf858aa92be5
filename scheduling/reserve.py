"""What of a time budget is kept for the end of a run: blend, submission, report.

Takes sizes of the data and the seconds of the fold trials so far, gives seconds. Pure: no clock of
its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from experiment.records import CandidateSummary, TrialRecord

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
