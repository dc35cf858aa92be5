"""Learning-rate schedules by name, and the size of the training images in each epoch.

Takes an optimiser and the hyperparameters, gives a `Schedule` that is told of updates and epochs
and sets every group's rate, relative to its own. All but plateau are functions of the number of
updates alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch

from foldrace.config.hyperparameters import TrialParams
from foldrace.core.plugins import NO_PARTS, Parts, Table


def training_size(epoch: int, epochs: int, image_size: int, size_start: float) -> int:
    """Side, in pixels, of the square training images in `epoch` (from 0).

    From `size_start` of `image_size`, linearly to the whole after two thirds of the epochs, so that
    the last third (and a single epoch) trains at the size of scoring. Rounded to 32 pixels, below
    128 pixels to 8. Tan and Le, EfficientNetV2: Smaller Models and Faster Training, ICML 2021.
    """
    growing = 2 * epochs // 3  # epochs
    if epoch >= growing or size_start >= 1.0:
        return image_size
    side = image_size * (size_start + (1.0 - size_start) * epoch / growing)
    step = 32 if image_size >= 128 else 8
    return min(max(step, step * int(side / step + 0.5)), image_size)


_LOW = 0.01  # of the peak: where a warm-up starts and a cosine ends
_ONE_CYCLE_START = 1 / 25  # of the peak
_ONE_CYCLE_END = _ONE_CYCLE_START * 1e-4
_ONE_CYCLE_RISE = 0.3  # of all updates, where no warm-up is given


@dataclass(frozen=True)
class TrainingPlan:
    """The hyperparameters and the length of a training."""

    params: TrialParams
    updates_per_epoch: int
    epochs: int

    @property
    def updates(self) -> int:
        """Optimiser steps of the whole training."""
        return self.updates_per_epoch * self.epochs

    @property
    def warmup(self) -> int:
        """Optimiser steps of the warm-up; at least one is left after it."""
        return min(round(self.params.warmup * self.updates), self.updates - 1)


@dataclass(frozen=True)
class ScheduleRow:
    """One row of the table."""

    name: str
    doc: str
    source: str
    factor: Callable[[int, TrainingPlan, int], float]
    """(updates done, plan, stalls of the loss) -> rate of the next update relative to the peak."""
    warms_up: bool = True
    """True: the linear warm-up comes before it; False: the row rises by itself."""


def cycle_ends(epochs: int, cycles: int) -> list[int]:
    """The last epoch (from 0) of each of `cycles` cycles, as even as whole epochs allow."""
    return [(epochs * i + cycles // 2) // cycles - 1 for i in range(1, cycles + 1)]


def _cosine(done: int, plan: TrainingPlan, stalls: int) -> float:
    """Half a cosine from 1 to 1 % in each cycle; the first begins where the warm-up ends."""
    start = 0  # update of the cycle
    for last in cycle_ends(plan.epochs, min(plan.params.cycles, plan.epochs)):
        start, end = max(start, plan.warmup), (last + 1) * plan.updates_per_epoch
        if done < end:
            return _between(1.0, _LOW, (done - start) / (end - start))
        start = end
    return _LOW


def _one_cycle(done: int, plan: TrainingPlan, stalls: int) -> float:
    """Up to the peak in the share `warmup` of all updates, then down to 4e-6, both as cosines."""
    peak = (plan.params.warmup or _ONE_CYCLE_RISE) * plan.updates - 1
    if done < peak:
        return _between(_ONE_CYCLE_START, 1.0, done / peak)
    fall = plan.updates - 1 - max(peak, 0.0)
    return _between(1.0, _ONE_CYCLE_END, min((done - max(peak, 0.0)) / fall, 1.0) if fall else 1.0)


def _between(start: float, end: float, progress: float) -> float:
    """Along half a cosine; progress 0 is the start, 1 the end."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def _step(done: int, plan: TrainingPlan, stalls: int) -> float:
    """Times `lr_factor` every `lr_patience` epochs from the end of the warm-up on."""
    length = plan.updates_per_epoch * plan.params.lr_patience
    return plan.params.lr_factor ** ((done - plan.warmup) // length)


def _plateau(done: int, plan: TrainingPlan, stalls: int) -> float:
    return plan.params.lr_factor**stalls


def _constant(done: int, plan: TrainingPlan, stalls: int) -> float:
    return 1.0


SCHEDULES = Table(
    ScheduleRow,
    "schedule",
    (
        ScheduleRow(
            "cosine", "half a cosine down to 1 %, in `cycles` warm restarts",
            "Loshchilov and Hutter, SGDR, ICLR 2017", _cosine,
        ),
        ScheduleRow(
            "one_cycle", "up in the share `warmup` of all updates (0: 0.3), then down to nothing",
            "Smith and Topin, Super-Convergence, 2018", _one_cycle, warms_up=False,
        ),
        ScheduleRow(
            "step", "times lr_factor every lr_patience epochs after the warm-up",
            "He, Zhang, Ren and Sun, Deep Residual Learning for Image Recognition, CVPR 2016",
            _step,
        ),
        ScheduleRow(
            "plateau", "times lr_factor after lr_patience epochs without a lower validation loss",
            "He, Zhang, Ren and Sun, Deep Residual Learning for Image Recognition, CVPR 2016",
            _plateau,
        ),
        ScheduleRow("constant", "the peak rate after the warm-up", "", _constant),
    ),
)  # fmt: skip


@dataclass
class _Progress:
    """Updates so far, and what the schedule remembers of the validation losses."""

    done: int = 0  # updates
    best: float | None = None
    waited: int = 0  # epochs since the best, or since the last stall
    stalls: int = 0


class Schedule:
    """Sets the rate of every parameter group: its own `initial_lr` times the schedule's factor."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, plan: TrainingPlan, parts: Parts = NO_PARTS
    ) -> None:
        self._optimizer, self._plan = optimizer, plan
        self._row = parts[SCHEDULES][plan.params.schedule]
        self._progress = _Progress()
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self._set_rates()

    def step_update(self, done: int) -> None:
        """Set the rates of the next update, after `done` of all epochs together."""
        self._progress.done = done
        self._set_rates()

    def epoch_done(self, logloss: float) -> None:
        """Note an epoch's score; a loss that is not a number counts as no better.

        Nothing is waited for in the warm-up, so that the peak is reached.
        """
        seen = self._progress
        if logloss < (math.inf if seen.best is None else seen.best):
            seen.best, seen.waited = logloss, 0
            return
        if self._row.warms_up and seen.done <= self._plan.warmup:
            return
        seen.waited += 1
        if seen.waited >= self._plan.params.lr_patience:
            seen.waited, seen.stalls = 0, seen.stalls + 1
        self._set_rates()

    def state_dict(self) -> dict[str, float | int | None]:
        """Everything that a resumed schedule needs, as plain numbers."""
        return asdict(self._progress)

    def load_state_dict(self, state: Mapping[str, float | int | None]) -> None:
        """Go on from there; sets the rates."""
        self._progress = _Progress(**state)  # type: ignore[arg-type]
        self._set_rates()

    def _set_rates(self) -> None:
        factor = self._factor()
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def _factor(self) -> float:
        done, plan = self._progress.done, self._plan
        if self._row.warms_up and done < plan.warmup:
            return _LOW + (1 - _LOW) * done / plan.warmup
        return self._row.factor(done, plan, self._progress.stalls)


def build_schedule(
    optimizer: torch.optim.Optimizer,
    params: TrialParams,
    updates_per_epoch: int,
    epochs: int,
    parts: Parts = NO_PARTS,
) -> Schedule:
    """The schedule of `params.schedule`, set for the first update.

    Also for an optimiser whose state was loaded: its groups know their `initial_lr`.
    """
    return Schedule(optimizer, TrainingPlan(params, updates_per_epoch, epochs), parts)
