"""The expected end of a sweep, against simulated ones."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from foldrace.run_folder.records import CandidateRecord, CandidateSummary, TrialRecord
from foldrace.scheduling.progress import Ahead, OpenCandidate, Pace, outlook

FOLDS = 5
SECONDS = {"a": 30.0, "b": 100.0, "c": 60.0}


def _trial(candidate: str, fold: int, backbone: str, seconds: float) -> TrialRecord:
    return TrialRecord(
        candidate=candidate, fold=fold, status="finished", backbone=backbone, params={"epochs": 8},
        folds_hash="h", seed=0, seconds=seconds, epochs_trained=8,
    )  # fmt: skip


def _settled(trials: Sequence[TrialRecord]) -> CandidateSummary:
    record = CandidateRecord(candidate=trials[0].candidate, backbone="a", params={})
    status = "complete" if len(trials) == FOLDS else "stopped"
    return CandidateSummary(record, status, tuple(trials), FOLDS)  # type: ignore[arg-type]


def test_before_anything_has_ended() -> None:
    found = outlook(Pace(FOLDS), Ahead(4, [OpenCandidate("a", 0, [0.5])], 2))
    assert (found.fold_trials, found.seconds) == (25.0, None)


def test_seconds_of_an_unknown_backbone_are_those_of_all() -> None:
    pace = Pace(FOLDS)
    for seconds in (10.0, 20.0):
        pace.add(_trial("c", 0, "a", seconds))
    pace.add(_trial("c", 0, "b", 60.0))
    pace.add(_trial("c", 0, "b", 1.0).model_copy(update={"status": "failed"}))
    assert (pace.fold_seconds("a"), pace.fold_seconds("b")) == (15.0, 60.0)
    assert pace.fold_seconds("c") == pace.seconds == 30.0


def test_fold_trials_of_a_candidate() -> None:
    """With all candidates settled the estimate is the plain mean of those that went on."""
    pace = Pace(FOLDS)
    assert [pace.further_folds(done) for done in range(6)] == [5, 4, 3, 2, 1, 0]
    for number, folds in enumerate((1, 1, 2, 5)):
        trials = [_trial(f"c{number}", k, "a", 1.0) for k in range(folds)]
        for trial in trials:
            pace.add(trial)
        pace.settle(_settled(trials))
    assert pace.further_folds(0) == pytest.approx((1 + 1 + 2 + 5) / 4)
    assert pace.further_folds(1) == pytest.approx((1 + 4) / 2)
    assert pace.further_folds(2) == 3
    assert pace.further_folds(5) == 0


def test_candidates_that_go_on_count_before_they_are_settled() -> None:
    """Of four with one fold one was stopped: a mean over the settled ones would be 1."""
    pace = Pace(2)
    trials = [_trial(f"c{i}", 0, "a", 1.0) for i in range(4)]
    for trial in trials:
        pace.add(trial)
    pace.settle(_settled(trials[:1]))
    assert pace.further_folds(0) == pytest.approx(1 + 3 / 4)


def test_a_fold_trial_that_was_stopped_counts_its_part() -> None:
    pace = Pace(FOLDS)
    stopped = _trial("c0", 0, "a", 1.0).model_copy(
        update={"status": "stopped", "epochs_trained": 2}
    )
    pace.add(stopped)
    pace.settle(_settled([stopped]))
    assert pace.further_folds(0) == 0.25
    pace.add(_trial("c1", 0, "a", 1.0))
    assert pace.further_folds(0) == pytest.approx(0.25 / 2 + 5 / 2)
    assert pace.further_folds(1) == 4


def _pace() -> Pace:
    pace = Pace(FOLDS)
    for backbone, seconds in SECONDS.items():
        pace.add(_trial("c", 0, backbone, seconds))
    return pace


def test_running_trials_alone_take_what_is_left_of_them() -> None:
    ahead = Ahead(0, [OpenCandidate("b", 4, [0.25]), OpenCandidate("a", 4, [0.0])], slots=2)
    assert outlook(_pace(), ahead).seconds == pytest.approx(75.0)


def test_the_budget_bounds_it() -> None:
    plain = outlook(_pace(), Ahead(10, [], 2))
    assert plain.fold_trials == 50
    assert plain.seconds == pytest.approx(50 * 190 / 3 / 2 + 100 / 3)
    few = outlook(_pace(), Ahead(10, [], 2, fold_trials_left=12.0))
    assert few.fold_trials == pytest.approx(12)
    assert few.seconds == pytest.approx(12 * 190 / 3 / 2 + 100 / 3)
    assert plain.seconds is not None
    half = outlook(_pace(), Ahead(10, [], 2, seconds_left=plain.seconds / 2))
    assert half.seconds == plain.seconds / 2
    assert half.fold_trials == pytest.approx(25)
    over = outlook(_pace(), Ahead(9, [OpenCandidate("a", 0, [0.5, 0.1])], 2, seconds_left=-1.0))
    assert (over.fold_trials, over.seconds) == (2.0, 0.0)  # those that run
    assert outlook(_pace(), Ahead(10, [], 2, seconds_left=1e6)) == plain


@dataclass
class _Candidate:
    backbone: str
    trials: list[TrialRecord] = field(default_factory=list)
    running: int = 0
    stopped: bool = False

    @property
    def waits(self) -> bool:
        return not self.stopped and len(self.trials) + self.running < FOLDS


class _Simulation:
    """A race on some slots: a fold stops its candidate with a chance of 1/2. One fold trial of a
    candidate at a time while other work waits, several where slots would be idle."""

    def __init__(self, candidates: int, slots: int, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._slots, self._left = slots, candidates
        self._pace = Pace(FOLDS)
        self._open: dict[str, _Candidate] = {}
        self._running: list[tuple[float, float, str]] = []  # end, seconds, candidate
        self.now = 0.0
        self.told: list[tuple[float, float]] = []  # moment, ETA

    def run(self) -> None:
        self._fill()
        while self._running:
            self.now, seconds, name = heapq.heappop(self._running)
            self._end(name, seconds)
            self._fill()
            found = outlook(self._pace, self._ahead()).seconds
            assert found is not None
            self.told.append((self.now, found))

    def _end(self, name: str, seconds: float) -> None:
        candidate = self._open[name]
        candidate.running -= 1
        trial = _trial(name, len(candidate.trials), candidate.backbone, seconds)
        candidate.trials.append(trial)
        self._pace.add(trial)
        candidate.stopped |= bool(self._rng.random() < 0.5)
        if not candidate.running and not candidate.waits:
            self._pace.settle(_settled(candidate.trials))
            del self._open[name]

    def _fill(self) -> None:
        while len(self._running) < self._slots and (name := self._next()) is not None:
            self._open[name].running += 1
            seconds = SECONDS[self._open[name].backbone] * self._rng.uniform(0.6, 1.4)
            heapq.heappush(self._running, (self.now + seconds, seconds, name))

    def _next(self) -> str | None:
        waiting = [name for name, c in self._open.items() if c.waits]
        alone = [name for name in waiting if not self._open[name].running]
        if alone:
            return alone[0]
        if not self._left:
            return waiting[0] if waiting else None
        self._left -= 1
        name = f"c{self._left:04d}"
        self._open[name] = _Candidate(str(self._rng.choice(list(SECONDS))))
        return name

    def _ahead(self) -> Ahead:
        parts: dict[str, list[float]] = {name: [] for name in self._open}
        for end, seconds, name in self._running:
            parts[name].append(1 - (end - self.now) / seconds)
        open_ = [OpenCandidate(c.backbone, len(c.trials), parts[n]) for n, c in self._open.items()]
        return Ahead(self._left, open_, self._slots)


@pytest.mark.parametrize("slots", [1, 4, 16])
def test_against_simulated_sweeps(slots: int) -> None:
    """From a fifth of the sweep on: the mean over sweeps is right, and each one nearly."""
    ratios = []
    for seed in range(40):
        simulation = _Simulation(120, slots, seed)
        simulation.run()
        for part in (0.2, 0.5, 0.8):
            moment, told = next(t for t in simulation.told if t[0] >= part * simulation.now)
            ratios.append(told / (simulation.now - moment))
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.15)
    assert np.quantile(np.abs(np.array(ratios) - 1), 0.9) < 0.4
