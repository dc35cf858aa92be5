"""Fold trials that give no sign of life: a line for people, and in the end a new attempt elsewhere.

A sign of life is the end of an epoch. How long one takes is learned from the sweep's own epochs,
backbone by backbone. An update of the result that hangs is ended, too.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from statistics import median

import ray

from foldrace.config.schema import ResourcesConfig
from foldrace.scheduling.ray.tune_adapter import TuneTrial
from foldrace.scheduling.spending import RunningFold
from foldrace.scheduling.updates import ResultUpdates

_EVERY = 1.0  # seconds
_LATE = 10.0  # times the median epoch: a line
_EARLIEST_LINE = 60.0  # seconds
_HANGS = 20.0  # times the median epoch: a new attempt, where no `trial_timeout` is set
_EARLIEST_END = 1800.0  # seconds
_UNKNOWN_END = 12 * 3600.0  # seconds, before any epoch of the backbone has ended
_KEPT = 99  # epochs of a backbone that are remembered


class Watchdog:
    """Looks after the running fold trials of a session."""

    def __init__(self, resources: ResourcesConfig) -> None:
        self._limit = resources.trial_timeout
        self._looked = 0.0
        self._epochs: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_KEPT))
        self._seen: dict[str, tuple[int, float]] = {}  # trial id -> epochs, and when the last ended
        self._told: set[tuple[str, int]] = set()  # trial id and epochs

    def look(
        self, running: Mapping[str, RunningFold], trials: Sequence[TuneTrial]
    ) -> Iterator[str]:
        """Lines about trials that hang; those beyond the limit are ended, and so tried again."""
        now = time.monotonic()
        if now - self._looked < _EVERY:
            return
        self._looked = now
        self._seen = {name: seen for name, seen in self._seen.items() if name in running}
        for name, fold in running.items():
            self._learn(name, fold)
            epoch = self._epoch_of(fold)
            silent = now - fold.last_sign
            late = _UNKNOWN_END / 10 if epoch is None else max(_EARLIEST_LINE, _LATE * epoch)
            if silent > late and (name, fold.epoch) not in self._told:
                self._told.add((name, fold.epoch))
                usual = "" if epoch is None else f"; an epoch takes {epoch:.0f} s as a rule"
                yield f"{_name(fold)} has ended no epoch for {silent:.0f} s{usual}"
            if silent > self._end_after(epoch) and fold.killed is None and _end(name, trials):
                fold.killed = f"it hung: no epoch ended for {silent:.0f} s"
                yield f"{_name(fold)} is ended, to be tried again: {fold.killed}"

    def look_at_update(self, updates: ResultUpdates, trials: Sequence[TuneTrial]) -> Iterator[str]:
        """A line where an update of the result hangs, which is ended: its slot is needed."""
        if updates.running is None:
            return
        silent = updates.running_seconds
        limit = self._limit or max(_EARLIEST_END, _HANGS * updates.longest)
        if silent > limit and not updates.has_ended and _end(updates.running, trials):
            updates.tell(updates.running, f"it hung for {silent:.0f} s")
            yield f"writing the result so far has hung for {silent:.0f} s and is ended"

    def _learn(self, name: str, fold: RunningFold) -> None:
        epochs, ended = self._seen.get(name, (fold.epoch, fold.last_sign))
        if epochs and fold.epoch > epochs:  # not the first, which holds the start, too
            each = (fold.last_sign - ended) / (fold.epoch - epochs)
            self._epochs[fold.task.candidate.backbone].append(each)
        self._seen[name] = fold.epoch, fold.last_sign

    def _epoch_of(self, fold: RunningFold) -> float | None:
        """Median seconds of an epoch of its backbone, or None."""
        known = self._epochs.get(fold.task.candidate.backbone)
        return median(known) if known else None

    def _end_after(self, epoch: float | None) -> float:
        if self._limit is not None:
            return self._limit
        return _UNKNOWN_END if epoch is None else max(_EARLIEST_END, _HANGS * epoch)


def _end(name: str, trials: Sequence[TuneTrial]) -> bool:
    """End a trial's worker; False where it has none yet."""
    trial = next((t for t in reversed(trials) if t.trial_id == name), None)
    actor = getattr(getattr(trial, "temporary_state", None), "ray_actor", None)
    if actor is None:
        return False
    ray.kill(actor)
    return True


def _name(fold: RunningFold) -> str:
    return f"{fold.task.candidate.candidate} fold{fold.task.fold}"
