"""Ray Tune's part of a sweep without Ray: asks a searcher for fold trials and ends them.

Takes a searcher and a `Learner`, gives how long each call took. Time is that of the pretended
trials: the one that ends first is ended next.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pretend_learner import EPOCHS, REPORTS, Learner

from foldrace.run_folder.records import CandidateRecord
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.ray.fold_searcher import BACKBONE, CANDIDATE, FOLD, PARAMS, FoldSearcher

_IDLE = 1000
"""Questions in vain with nothing in flight, after which the searcher is stuck."""


@dataclass
class Trial:
    """What a searcher reads of a Tune trial."""

    trial_id: str
    candidate: CandidateRecord
    fold: int
    status: str = "RUNNING"


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


class PretendTune:
    """One session."""

    def __init__(
        self,
        store: RunStore,
        searcher: FoldSearcher,
        look: Callable[[list[Trial]], None],
        learner: Learner,
        slots: int,
    ) -> None:
        self._store, self._searcher, self._look = store, searcher, look
        self._learner, self._slots = learner, slots
        self._hash = store.folds().hash
        self._all: list[Trial] = []  # as Tune's: it only grows
        self._ending: list[tuple[float, int]] = []  # (when, index in _all)
        self._finished = False
        self.now = self.busy = 0.0  # seconds of pretended time; of all slots together
        self.candidates = 0
        self.calls = Calls()

    def run(self) -> None:
        """Until the searcher is finished and nothing runs."""
        idle = 0
        while not self._finished or self._ending:
            self._timed(self.calls.look, lambda: self._look(self._all))
            self._fill()
            idle = 0 if self._ending else idle + 1
            assert idle < _IDLE, "the searcher gives nothing, waits for nothing, is not finished"
            if self._ending:
                self._end(*heapq.heappop(self._ending))

    def _fill(self) -> None:
        while not self._finished and len(self._ending) < self._slots:
            if not self._ask():
                return

    def _ask(self) -> bool:
        trial_id = f"t{len(self._all)}"
        mark, cpu = time.perf_counter(), time.process_time()
        given = self._searcher.suggest(trial_id)
        call = Call(time.perf_counter() - mark, time.process_time() - cpu, self.candidates)
        if not isinstance(given, dict):
            self._finished = given is not None
            self.calls.nothing.append(call)
            return False
        record = CandidateRecord(
            candidate=given[CANDIDATE], backbone=given[BACKBONE], params=given[PARAMS]
        )
        new = int(record.candidate[1:]) >= self.candidates
        (self.calls.new_candidate if new else self.calls.next_fold).append(call)
        self.candidates += new
        seconds = self._learner.seconds(record, given[FOLD])
        heapq.heappush(self._ending, (self.now + seconds, len(self._all)))
        self._all.append(Trial(trial_id, record, given[FOLD]))
        self.busy += seconds
        return True

    def _end(self, when: float, index: int) -> None:
        self.now, trial = when, self._all[index]
        ending = self._learner.ending(trial.candidate, trial.fold, self._hash)
        best = ending.record.best
        loss = ending.record.variants[best].val_logloss if best else 9.9
        for report in range(1, REPORTS + 1) if best else ():
            told = {"epoch": report * EPOCHS // REPORTS - 1, "val_logloss": loss * 2 / report}
            self._timed(
                self.calls.result,
                lambda told=told: self._searcher.on_trial_result(trial.trial_id, told),
            )
        ending.write(self._store)
        trial.status = "TERMINATED"
        self._timed(
            self.calls.complete, lambda: self._searcher.on_trial_complete(trial.trial_id, {}, False)
        )

    def _timed(self, calls: list[Call], function: Callable[[], None]) -> None:
        mark, cpu = time.perf_counter(), time.process_time()
        function()
        calls.append(Call(time.perf_counter() - mark, time.process_time() - cpu, self.candidates))
