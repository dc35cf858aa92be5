"""Rungs at which a first fold may be parked in mid-training, and the losses that reached them.

Takes the race's settings, hyperparameters and losses by epoch, gives rungs and the cut of each.
Pure: no Ray, no files. Source: Li et al., A System for Massively Parallel Hyperparameter Tuning,
MLSys 2020 (ASHA); here a rung is a fraction of the trial's own schedule, and of one fold.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from foldrace.config.hyperparameters import TrialParams
from foldrace.config.schema import RaceConfig

_ROUNDING = 1e-9  # 0.1 * 30 is a little more than 3


@dataclass(frozen=True)
class Rung:
    """A fraction of a trial's own schedule, and the epochs trained by then."""

    fraction: float
    epoch: int


def fractions(race: RaceConfig) -> tuple[float, ...]:
    """The rungs' fractions of a schedule: grace, grace * reduction, ... below 1."""
    found = []
    fraction = race.grace
    while fraction < 1 - _ROUNDING:
        found.append(fraction)
        fraction *= race.reduction
    return tuple(found)


@dataclass(frozen=True)
class Place:
    """Where a trial stands among those that have reached the same rung of the same fold."""

    loss: float
    """Its loss at the rung's epoch."""
    cut: float | None
    """The worst loss of the best 1/reduction; None with fewer than `reduction` trials."""
    count: int
    """Number of trials that have reached the rung."""
    rank: float
    """Part of them that is better, in (0, 1)."""

    @property
    def is_among_best(self) -> bool:
        """True where it goes on by its loss alone, or nothing can be said yet."""
        return self.cut is None or self.loss <= self.cut


def rungs_of(race: RaceConfig, params: TrialParams) -> tuple[Rung, ...]:
    """The rungs of one trial, by epoch.

    For each fraction the first epoch at or after it, and never the last one; an epoch that serves
    several fractions is of the largest. Learning curves that cross are left alone for longer: with
    warm restarts only the ends of cycles count, since within a cycle the loss rises and falls with
    the rate; with frozen epochs there is no rung before the grace's length after the last of them,
    since until then the head alone is judged.
    """
    ends = _comparable(params)
    frozen = params.freeze_epochs + params.unfreeze_epochs
    grace = _epochs_at(race.grace, params.epochs)
    earliest = frozen + grace if frozen else 1
    found: dict[int, float] = {}
    for fraction in fractions(race):
        least = _epochs_at(fraction, params.epochs)
        epoch = next((end for end in ends if end >= least), params.epochs)
        if earliest <= epoch < params.epochs:
            found[epoch] = fraction
    return tuple(Rung(fraction, epoch) for epoch, fraction in found.items())


def _epochs_at(fraction: float, epochs: int) -> int:
    return max(1, math.ceil(fraction * epochs - _ROUNDING))


def _comparable(params: TrialParams) -> Sequence[int]:
    """Numbers of trained epochs at which trials can be compared."""
    if params.cycles == 1:
        return range(1, params.epochs + 1)
    from foldrace.trainables.schedules import cycle_ends  # heavy

    return [end + 1 for end in cycle_ends(params.epochs, min(params.cycles, params.epochs))]


def losses_of(log: str) -> list[float]:
    """Calibrated log loss of the better variant by epoch, from the text of a train_log.csv.

    ValueError where it is none.
    """
    lines = csv.DictReader(io.StringIO(log))
    try:
        return [
            _better(line["val_calibrated_logloss"], line["ema_val_calibrated_logloss"])
            for line in lines
        ]
    except (KeyError, TypeError, csv.Error) as error:
        raise ValueError(f"no train_log.csv: {error!r}") from error


def seconds_of(log: str) -> float:
    """Seconds of all epochs, from the text of a train_log.csv; 0 where it is damaged."""
    lines = csv.DictReader(io.StringIO(log))
    with contextlib.suppress(ValueError, TypeError, csv.Error):
        return math.fsum(float(line.get("seconds") or 0.0) for line in lines)
    return 0.0


def _better(raw: str, ema: str) -> float:
    losses = [loss for loss in (float(raw), float(ema)) if not math.isnan(loss)]
    return min(losses, default=math.inf)


class RungRecords:
    """The loss of each trial at the epoch of each rung of its fold that it has reached."""

    def __init__(self) -> None:
        self._losses: defaultdict[tuple[int, float], dict[str, float]] = defaultdict(dict)
        self._ordered: dict[tuple[int, float], list[float]] = {}  # until there is another one

    def add(
        self, candidate: str, fold: int, rungs: Sequence[Rung], losses: Sequence[float]
    ) -> None:
        """Record a trial's losses by epoch so far at each rung that it has reached, anew."""
        for rung in rungs:
            if rung.epoch <= len(losses):
                self._losses[fold, rung.fraction][candidate] = losses[rung.epoch - 1]
                self._ordered.pop((fold, rung.fraction), None)

    def has(self, candidate: str, fold: int, fraction: float) -> bool:
        """True where a trial has reached the rung."""
        return candidate in self._losses[fold, fraction]

    def place(self, candidate: str, fold: int, fraction: float, reduction: int) -> Place:
        """Where a trial stands at a rung that it has reached."""
        losses = self._losses[fold, fraction]
        if (fold, fraction) not in self._ordered:
            self._ordered[fold, fraction] = sorted(losses.values())
        ordered, own = self._ordered[fold, fraction], losses[candidate]
        best = len(ordered) // reduction
        rank = (bisect_left(ordered, own) + 0.5) / len(ordered)
        return Place(own, ordered[best - 1] if best else None, len(ordered), rank)
