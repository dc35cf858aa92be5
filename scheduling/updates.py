"""When a sweep under way writes its blend and its submission: whenever the blend has improved.

Takes the race's decisions, the clock and what updates have cost; says when the next one is due and
books how it ends. The first comes with the first complete candidate; all together may take a fixed
part of the time so far. An update runs in a slot like a fold trial, so that no trial's memory or
cores are taken; its cost is that slot's seconds, shared by all slots.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Literal

from foldrace.run_folder.blend_records import ResultUpdate
from foldrace.run_folder.records import CandidateSummary, RaceDecision
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.budget import UpdateCost
from foldrace.scheduling.events import SweepListener

UPDATE: Literal["update"] = "update"
"""Given in place of a fold trial: blend and submission are to be written with what is complete."""
_PART = 0.02
"""Part of the elapsed time that updates may cost."""
_VISIBLE = 1e-5
"""Nats by which the race's blend improves at least: it is known to no more."""
_log = logging.getLogger("foldrace")


class ResultUpdates(SweepListener):
    """The updates of one session."""

    def __init__(
        self,
        store: RunStore,
        slots: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._slots, self._clock = store, slots, clock
        self._began = clock()
        self._spent = 0.0  # seconds of the whole sweep
        self._tried, self._pending = False, 0
        self._blend: float | None = None  # log loss of the race's blend
        last = store.last_update()
        self._written = None if last is None else last.blend_logloss
        self._seconds = None if last is None else last.seconds
        self.longest = self._seconds or 0.0
        """Seconds of the longest update so far."""
        self.submission = store.submission()
        """The submission that lies in the run folder, or None."""
        self._running: tuple[str, float, float] | None = None  # trial id, begin, the blend's loss
        self._outcome: str | None = None

    @property
    def cost(self) -> UpdateCost | None:
        """What updates tell of the result's cost at the end; None before the first."""
        return None if self._seconds is None else UpdateCost(self.longest, self._pending)

    @property
    def running(self) -> str | None:
        """Trial id of the update that runs, or None."""
        return None if self._running is None else self._running[0]

    @property
    def running_seconds(self) -> float:
        """Seconds since the update that runs was given out; 0 without one."""
        return 0.0 if self._running is None else self._clock() - self._running[1]

    @property
    def has_ended(self) -> bool:
        """True where the update that runs has said how it ended."""
        return self._outcome is not None

    def decided(self, decision: RaceDecision, summary: CandidateSummary) -> None:
        """Note the race's blend with another complete candidate."""
        if decision.action == "complete" and decision.blend_logloss is not None:
            self._blend = decision.blend_logloss
            self._pending += self._is_better

    def is_due(self, seconds_left: float | None) -> bool:
        """True where the blend is better than the one that was written, and the time allows it.

        `seconds_left` for fold trials, or None.
        """
        if self._running is not None or not self._is_better:
            return False
        if self._seconds is None and not self._tried:
            return True
        expected = self._seconds or 0.0
        if seconds_left is not None and expected > seconds_left:
            return False
        cost = self._spent + expected / max(1, self._slots())
        return cost <= _PART * (self._clock() - self._began)

    @property
    def _is_better(self) -> bool:
        """True where the race's blend is visibly better than when it was last written."""
        if self._blend is None:
            return False
        return self._written is None or self._blend <= self._written - _VISIBLE

    def start(self, trial_id: str) -> None:
        """Note that an update has been given out."""
        assert self._blend is not None
        self._running = trial_id, self._clock(), self._blend
        self._outcome, self._tried, self._pending = None, True, 0

    def tell(self, trial_id: str, error: str) -> None:
        """Take the word of the update that runs: what went wrong; empty for nothing."""
        if trial_id == self.running:
            self._outcome = error

    def end(self) -> bool:
        """Book the end of the update that runs; False where it failed.

        That one waits for a better blend.
        """
        assert self._running is not None
        _, began, self._written = self._running
        self._running = None
        self._seconds = self._clock() - began
        self.longest = max(self.longest, self._seconds)
        self._spent += self._seconds / max(1, self._slots())
        error = "its worker ended without a result" if self._outcome is None else self._outcome
        if error:
            _log.warning("blend and submission so far were not written: %s", error)
            return False
        self.submission = self._store.submission()
        _log.info("blend and submission so far written in %.1f s", self._seconds)
        record = ResultUpdate(seconds=self._seconds, blend_logloss=self._written)
        try:
            self._store.save_update(record)
        except OSError as problem:
            _log.warning("what the result so far took is not kept for `resume`: %s", problem)
        return True
