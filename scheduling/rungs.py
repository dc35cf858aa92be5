"""Rungs at which a first fold may be judged in mid-training, and the losses that reached them.

Takes the race's settings, hyperparameters and losses by epoch, gives rungs and the cut of each.
Pure: no Ray, no files. Source: Li et al., A System for Massively Parallel Hyperparameter Tuning,
MLSys 2020 (ASHA); here a rung is a fraction of the trial's own schedule, and of one fold.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foldrace.config.schema import RaceConfig
from foldrace.search_spaces.hyperparameters import TrialParams

_ROUNDING = 1e-9
"""0.1 * 30 is a little more than 3."""


@dataclass(frozen=True)
class Rung:
    """A fraction of a trial's own schedule, and the epochs that it has trained by then."""

    fraction: float
    epoch: int


@dataclass(frozen=True, eq=False)
class RungReport:
    """What a trial hands over at a rung, beside its usual report."""

    log: str
    """The text of train_log.csv up to this epoch."""
    columns: dict[str, NDArray[np.float32]]
    """Variant -> (n,) calibrated probability of the true class on the fold's rows, ascending; empty
    from a trial that goes on from a saved state: it is not judged anew."""


def fractions(race: RaceConfig) -> tuple[float, ...]:
    """grace, grace * reduction, ... below 1."""
    found = []
    fraction = race.grace
    while fraction < 1 - _ROUNDING:
        found.append(fraction)
        fraction *= race.reduction
    return tuple(found)


def rungs_of(race: RaceConfig, params: TrialParams) -> tuple[Rung, ...]:
    """The rungs of one trial, by epoch: for each fraction the first epoch at or after it, and never
    the last one. An epoch that serves several fractions is of the largest.

    Learning curves that cross are left alone for longer. With warm restarts only the ends of cycles
    count: within a cycle the loss rises and falls with the rate. With frozen epochs there is no
    rung before the grace's length after the last of them: until then the head alone is judged.
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
    """Epochs trained at which trials can be compared."""
    if params.cycles == 1:
        return range(1, params.epochs + 1)
    from foldrace.trainables.schedules import cycle_ends  # heavy

    return [end + 1 for end in cycle_ends(params.epochs, min(params.cycles, params.epochs))]


def losses_of(log: str) -> list[float]:
    """From the text of a train_log.csv the validation log loss of the better variant, by epoch.
    ValueError where it is none."""
    lines = csv.DictReader(io.StringIO(log))
    try:
        return [_better(line["val_logloss"], line["ema_val_logloss"]) for line in lines]
    except (KeyError, TypeError, csv.Error) as error:
        raise ValueError(f"no train_log.csv: {error!r}") from error


def seconds_of(log: str) -> float:
    """From the text of a train_log.csv the seconds of its epochs; 0 where it is damaged."""
    lines = csv.DictReader(io.StringIO(log))
    with contextlib.suppress(ValueError, TypeError, csv.Error):
        return math.fsum(float(line.get("seconds") or 0.0) for line in lines)
    return 0.0


def _better(raw: str, ema: str) -> float:
    losses = [loss for loss in (float(raw), float(ema)) if not math.isnan(loss)]
    return min(losses, default=math.inf)


class RungRecords:
    """The least loss that each trial had reached at each rung of its fold."""

    def __init__(self) -> None:
        self._of_candidate: dict[tuple[int, float], dict[str, float]] = {}
        self._sorted: dict[tuple[int, float], list[float]] = {}

    def add(
        self, candidate: str, fold: int, rungs: Sequence[Rung], losses: Sequence[float]
    ) -> None:
        """A trial's losses by epoch so far: at each rung that it has reached. What it had there
        already is replaced."""
        for rung in rungs:
            if rung.epoch <= len(losses):
                self._put((fold, rung.fraction), candidate, min(losses[: rung.epoch]))

    def score(self, candidate: str, fold: int, fraction: float) -> float:
        """The least loss of a trial that has reached the rung."""
        return self._of_candidate[fold, fraction][candidate]

    def count(self, fold: int, fraction: float) -> int:
        """Trials that have reached the rung."""
        return len(self._sorted.get((fold, fraction), ()))

    def cut(self, fold: int, fraction: float, reduction: int) -> float | None:
        """The worst loss of the best 1/reduction of the rung; None with fewer than `reduction`
        trials there."""
        losses = self._sorted.get((fold, fraction), [])
        best = len(losses) // reduction
        return losses[best - 1] if best else None

    def _put(self, place: tuple[int, float], candidate: str, loss: float) -> None:
        known, losses = self._of_candidate.setdefault(place, {}), self._sorted.setdefault(place, [])
        if candidate in known:
            del losses[bisect_left(losses, known[candidate])]
        known[candidate] = loss
        insort(losses, loss)
