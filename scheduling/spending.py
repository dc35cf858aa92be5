"""The use of a sweep's budget, its commitments, and the check of what may still start.

Takes the state and what runs, asks `Budget`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean

from foldrace.config.schema import SweepConfig
from foldrace.run_folder.records import RaceDecision
from foldrace.scheduling.budget import Budget, CompletionCost, SweepUsage
from foldrace.scheduling.room import Place, Room
from foldrace.scheduling.state import CandidateState, FoldTask, SweepState
from foldrace.trainables.spec import Pace


@dataclass
class RunningFold:
    """A fold trial that runs."""

    task: FoldTask
    judged: bool
    """True where it may be parked at a rung."""
    place: Place = field(default_factory=Place)
    """What it has reserved."""
    before: float = 0.0
    """Seconds that it had trained when it was parked."""
    started: float = field(default_factory=time.monotonic)
    last_sign: float = field(default_factory=time.monotonic)
    """When it began or its last epoch ended."""
    epoch: int = 0
    """Epochs that have ended."""
    val_logloss: float | None = None
    """Log loss of the last epoch that ended."""
    killed: str | None = None
    """Why the sweep has ended its worker, or None."""
    pace: Pace | None = None
    """How fast that epoch was trained, where it is known."""
    park: RaceDecision | None = None
    """The decision by which it is to leave in mid-training, or None."""

    @property
    def seconds(self) -> float:
        """Seconds since it was given out."""
        return time.monotonic() - self.started

    @property
    def device_seconds(self) -> float:
        """Those that it has trained, times its devices."""
        return (self.before + self.seconds) * self.place.devices


class Spending:
    """The limits of a sweep against what it has begun and promised."""

    def __init__(
        self,
        config: SweepConfig,
        state: SweepState,
        running: Mapping[str, RunningFold],
        room: Room,
        seconds_left: Callable[[], float | None],
    ) -> None:
        """`seconds_left()` until the deadline, or None."""
        self._search = config.search
        self._budget = Budget(config.search, config.resources)
        self._state, self._running = state, running
        self._room, self._seconds_left = room, seconds_left

    @property
    def usage(self) -> SweepUsage:
        """Usage of all sessions, running fold trials up to now included."""
        running = sum(r.device_seconds for r in self._running.values())
        return SweepUsage(
            candidates=len(self._state),
            fold_trials=self._state.trials_started,
            device_seconds=self._state.device_seconds + running,
            seconds_left=self._seconds_left(),
        )

    @property
    def has_candidates(self) -> bool:
        """True while not all candidates of the budget have started."""
        return len(self._state) < self._search.candidates

    @property
    def exhausted_limit(self) -> str | None:
        """The limit that lets no candidate of the first backbone be completed, or None."""
        first = next(iter(self._state.started), self._search.backbones[0])
        return self._budget.exhausted_limit(self.usage, self._cost(first, self._state.folds))

    @property
    def has_deadline(self) -> bool:
        """True where the wall time is limited."""
        return self._seconds_left() is not None

    def admits(self, state: CandidateState, any_time: bool = False) -> bool:
        """True where a started candidate may go on: all its folds fit into the budget.

        `any_time`: whatever wall time is left is enough.
        """
        parked = state.parked_epoch is not None  # it has been counted as started
        cost = self._cost(state.record.backbone, len(state.waiting) - parked, any_time)
        own = len(state.waiting) if state.granted else 0
        return self._budget.admits_fold(self._committed(own), cost)

    def admits_candidate(self, backbone: str, any_time: bool = False) -> bool:
        """True where a new candidate may start; `any_time` as in `admits`."""
        cost = self._cost(backbone, self._state.folds, any_time)
        return self._budget.admits_candidate(self._committed(0), cost)

    def fold_costs(self) -> dict[str, float]:
        """Backbone -> mean device-seconds of a fold trial."""
        return {b: s * self._state.devices(b) for b, s in self._state.fold_seconds().items()}

    def _committed(self, own: int) -> SweepUsage:
        """`usage`, with what running trials are expected to take, and other candidates' folds.

        Otherwise as many as there are slots would be started for the same last hour, and more
        candidates would be granted all their folds than there are fold trials left. `own`: folds
        of the candidate that asks.
        """
        usage, seconds, ahead = self.usage, self._state.fold_seconds(), 0.0
        mean = fmean(seconds.values()) if seconds else 0.0
        for running in self._running.values():
            expected = seconds.get(running.task.candidate.backbone, mean)
            left = max(0.0, expected - running.before - running.seconds)
            ahead += left * running.place.devices
        return replace(
            usage,
            fold_trials=usage.fold_trials + self._state.trials_promised - own,
            device_seconds=usage.device_seconds + ahead,
        )

    def _cost(self, backbone: str, folds: int, any_time: bool = False) -> CompletionCost:
        seconds = self._state.fold_seconds()
        mean = fmean(seconds.values()) if seconds else None
        expected, devices = seconds.get(backbone, mean), self._state.devices(backbone)
        return CompletionCost(folds, expected, self._room.slots(backbone), devices, any_time)
