"""A sweep under the pretended Ray Tune of the tests, in which each call of the searcher is timed.

Takes searcher and scheduler and a `Learner`, gives how long each call took. Time is that of the
pretended trials: the one that would end first, if it is not parked, is played next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pretend_learner import EPOCHS, REPORTED, RUNG, Learner

from foldrace.run_folder.records import CandidateRecord
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.ray.fold_trial import CANDIDATE, FOLD, JUDGED
from foldrace.scheduling.ray.fold_trial import RUNG as AT_RUNG
from foldrace.scheduling.ray.tune_adapter import RungScheduler, SweepSearcher
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
    parked: list[Call] = field(default_factory=list)  # suggest gave the rest of a parked one
    nothing: list[Call] = field(default_factory=list)  # suggest gave none
    result: list[Call] = field(default_factory=list)
    rung: list[Call] = field(default_factory=list)  # the scheduler heard of a rung
    complete: list[Call] = field(default_factory=list)
    look: list[Call] = field(default_factory=list)  # what the sweep does at each step of Tune


class TimedTune:
    """One session; it stands between Tune and the searcher, and Tune and the scheduler."""

    def __init__(
        self,
        store: RunStore,
        searcher: SweepSearcher,
        scheduler: RungScheduler,
        look: Callable[[Sequence[Trial]], None],
        learner: Learner,
        slots: int,
    ) -> None:
        self._store, self._searcher, self._look, self._learner = store, searcher, look, learner
        self._scheduler = scheduler
        self._hash = store.folds().hash
        self.tune = PretendTune(
            self, self._train, slots, self._step, _TimedScheduler(self), seconds=self._seconds
        )
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
        others = self.calls.parked if self._epochs_before(given) else self.calls.next_fold
        (self.calls.new_candidate if new else others).append(call)
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

    def reached(self, trial: Trial, result: dict[str, Any]) -> str:
        """The scheduler's word about an epoch."""
        word, call = self._timed(lambda: self._scheduler.on_trial_result(None, trial, result))
        if result.get(AT_RUNG) and not result.get("done"):
            self.calls.rung.append(call)
        return word

    def _step(self, trials: Sequence[Trial]) -> None:
        _, call = self._timed(lambda: self._look(trials))
        self.calls.look.append(call)

    # -- what a trial does

    def _seconds(self, config: dict[str, Any]) -> float:
        whole = self._learner.seconds(self._candidate(config), config[FOLD])
        return whole * (1 - self._epochs_before(config) / EPOCHS)

    def _epochs_before(self, config: dict[str, Any]) -> int:
        """Epochs that the fold trial had trained when it was parked."""
        return RUNG if self._store.resume_state_bytes(config[CANDIDATE], config[FOLD]) else 0

    def _train(self, config: dict[str, Any]) -> None:
        """As `run_trial`: a parked trial first reports the epoch that it has come to."""
        ending = self._learner.ending(self._candidate(config), config[FOLD], self._hash)
        before = self._epochs_before(config)
        for epochs in REPORTED:
            if not before <= epochs <= ending.record.epochs_trained:
                continue
            at_rung = config[JUDGED] and before < epochs == RUNG
            if at_rung:
                ending.write_rung(self._store)
            self.tune.report(asdict(ending.log[epochs - 1]) | ({AT_RUNG: True} if at_rung else {}))
        ending.write(self._store)

    def _candidate(self, config: dict[str, Any]) -> CandidateRecord:
        return self._store.candidate(config[CANDIDATE])

    def _timed(self, function: Callable[[], Any]) -> tuple[Any, Call]:
        mark, cpu = time.perf_counter(), time.process_time()
        given = function()
        wall, used = time.perf_counter() - mark, time.process_time() - cpu
        return given, Call(wall, used, self.candidates)


class _TimedScheduler:
    """What the pretended Tune calls of a scheduler."""

    def __init__(self, timed: TimedTune) -> None:
        self._timed = timed

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """An epoch for the scheduler."""
        return self._timed.reached(trial, result)

    def on_trial_complete(self, controller: Any, trial: Trial, result: Any) -> None:
        """Nothing: the product's does nothing either."""

    def on_trial_error(self, controller: Any, trial: Trial) -> None:
        """Nothing, likewise."""
