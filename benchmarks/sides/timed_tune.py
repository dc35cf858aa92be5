"""A sweep under the pretended Ray Tune of the tests, in which each call of the searcher is timed.

Takes a searcher and a `Learner`, gives how long each call took. Time is that of the pretended
trials: the one that ends first is ended next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pretend_learner import EPOCHS, REPORTS, Learner

from foldrace.run_folder.records import CandidateRecord
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.ray.fold_searcher import CANDIDATE, FOLD, FoldSearcher
from tests.pretend_tune import PretendTune, Trial


@dataclass(frozen=True)
class Call:
    """One call of the searcher."""

    wall: float  # seconds
    cpu: float  # of this process
    candidates: int
    """Begun by then."""


@dataclass
class Calls:
    """Every call, by what it was for."""

    new_candidate: list[Call] = field(default_factory=list)  # suggest gave a first fold
    next_fold: list[Call] = field(default_factory=list)  # suggest gave another one
    nothing: list[Call] = field(default_factory=list)  # suggest gave none
    result: list[Call] = field(default_factory=list)
    complete: list[Call] = field(default_factory=list)
    look: list[Call] = field(default_factory=list)  # what the sweep does at each step of Tune


class TimedTune:
    """One session; it stands between Tune and the searcher."""

    def __init__(
        self,
        store: RunStore,
        searcher: FoldSearcher,
        look: Callable[[Sequence[Trial]], None],
        learner: Learner,
        slots: int,
    ) -> None:
        self._store, self._searcher, self._look, self._learner = store, searcher, look, learner
        self._hash = store.folds().hash
        self.tune = PretendTune(self, self._train, slots, self._step, seconds=self._seconds)
        self.candidates = 0
        self.calls = Calls()

    # -- what Tune calls

    def suggest(self, trial_id: str) -> Any:
        """The searcher's fold trial."""
        given, call = self._timed(lambda: self._searcher.suggest(trial_id))
        if not isinstance(given, dict):
            self.calls.nothing.append(call)
            return given
        new = int(given[CANDIDATE][1:]) >= self.candidates
        (self.calls.new_candidate if new else self.calls.next_fold).append(call)
        self.candidates += new
        return given

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """An epoch for the searcher."""
        _, call = self._timed(lambda: self._searcher.on_trial_result(trial_id, result))
        self.calls.result.append(call)

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """An end for the searcher."""
        _, call = self._timed(lambda: self._searcher.on_trial_complete(trial_id, result, error))
        self.calls.complete.append(call)

    def _step(self, trials: Sequence[Trial]) -> None:
        _, call = self._timed(lambda: self._look(trials))
        self.calls.look.append(call)

    # -- what a trial does

    def _seconds(self, config: dict[str, Any]) -> float:
        return self._learner.seconds(self._candidate(config), config[FOLD])

    def _train(self, config: dict[str, Any]) -> None:
        ending = self._learner.ending(self._candidate(config), config[FOLD], self._hash)
        best = ending.record.best
        loss = ending.record.variants[best].val_logloss if best else 9.9
        for report in range(1, REPORTS + 1) if best else ():
            epoch = report * EPOCHS // REPORTS - 1
            self.tune.report({"epoch": epoch, "val_logloss": loss * 2 / report})
        ending.write(self._store)

    def _candidate(self, config: dict[str, Any]) -> CandidateRecord:
        return self._store.candidate(config[CANDIDATE])

    def _timed(self, function: Callable[[], Any]) -> tuple[Any, Call]:
        mark, cpu = time.perf_counter(), time.process_time()
        given = function()
        wall, used = time.perf_counter() - mark, time.process_time() - cpu
        return given, Call(wall, used, self.candidates)
