"""The sums of a sweep, against what a walk over all candidates gives."""

from __future__ import annotations

import timeit
from collections import Counter
from typing import Literal

import numpy as np
import pytest

from foldrace.config.schema import PointConfig, ResourcesConfig, SearchConfig
from foldrace.run_folder.progress import Progress, RunningTrial
from foldrace.run_folder.records import (
    CandidateRecord,
    CandidateSummary,
    RaceDecision,
    TrialRecord,
    TrialStatus,
    VariantScore,
)
from foldrace.run_folder.store import summarise
from foldrace.run_folder.tables import ranked
from foldrace.scheduling.budget import Spent
from foldrace.scheduling.progress import Tally

FOLDS = 3


def _trial(candidate: str, fold: int, loss: float, status: TrialStatus = "finished") -> TrialRecord:
    score = VariantScore(rows=10, val_logloss=loss, val_acc=0.8, best_epoch=1)
    return TrialRecord(
        candidate=candidate, fold=fold, status=status, backbone="b", params={"epochs": 4},
        folds_hash="h", seed=0, seconds=2.0, epochs_trained=4,
        variants={"raw": score} if status == "finished" else {},
    )  # fmt: skip


Action = Literal["continue", "stop", "complete"]


def _decision(number: int, candidate: str, fold: int, action: Action) -> RaceDecision:
    return RaceDecision(
        number=number, candidate=candidate, fold=fold, rule="gain", action=action,
        folds_done=fold + 1, rows=10, gain=0.01 * number, gain_se=0.001, complete=0,
        blend_logloss=1.0 / (number + 1), epochs_trained=4, reason="a reason",
    )  # fmt: skip


class _Sweep:
    """A random race, one fold trial after the other; some of it told before, as after `resume`."""

    def __init__(self, tally: Tally, seed: int) -> None:
        self._tally, self._rng = tally, np.random.default_rng(seed)
        self.summaries: list[CandidateSummary] = []
        self._decisions = 0

    def candidate(self, folds: int, told: bool) -> None:
        """One that gets `folds` fold trials; it stays open where they were not all."""
        name, trials, decisions = f"c{len(self.summaries):04d}", [], []
        record = CandidateRecord(candidate=name, backbone="b", params={"epochs": 4})
        stops = bool(self._rng.random() < 0.5)
        for fold in range(folds):
            status: TrialStatus = "diverged" if self._rng.random() < 0.1 else "finished"
            trials.append(_trial(name, fold, float(self._rng.uniform(0.1, 2.0)), status))
            if told:
                self._tally.trial(trials[-1])
            if status == "diverged":
                break
            last = fold == FOLDS - 1
            action: Action = (
                "complete" if last else "stop" if stops and fold == folds - 1 else "continue"
            )
            decisions.append(_decision(self._decisions, name, fold, action))
            self._decisions += 1
            if told:
                self._tally.decide(decisions[-1])
        summary = summarise(record, trials, FOLDS, True, decisions)
        self.summaries.append(summary)
        if told and summary.status != "running":
            self._tally.settle(summary)


def _tally(**search: int) -> Tally:
    config = SearchConfig(backbones=("b",), **{"candidates": 100, **search})  # type: ignore[arg-type]
    return Tally(config, ResourcesConfig(gpu_hours=2.0), FOLDS, 1.0)


def _progress(tally: Tally, candidates: int, *running: RunningTrial) -> Progress:
    spent = Spent(candidates, tally.trials_ended + len(running), tally.device_seconds, None)
    return tally.progress(running, spent, slots=2, elapsed_s=7.0)


@pytest.mark.parametrize("seed", range(10))
def test_sums_are_those_of_a_walk(seed: int) -> None:
    tally = _tally()
    sweep = _Sweep(tally, seed)
    folds = np.random.default_rng(seed).integers(1, FOLDS + 1, size=40)
    for count in folds[:15]:
        sweep.candidate(int(count), told=False)
    tally.replay(sweep.summaries)
    for count in folds[15:]:
        sweep.candidate(int(count), told=True)
    found, summaries = _progress(tally, len(sweep.summaries)), sweep.summaries
    trials = [t for s in summaries for t in s.trials]
    assert found.trials_done == len(trials)
    assert found.failed == sum(t.status == "diverged" for t in trials)
    assert found.counts == Counter(s.status for s in summaries)
    complete = [s for s in ranked(summaries) if s.status == "complete"]
    assert found.leaders[: min(8, len(complete))] == tuple(complete[:8])
    assert len(found.leaders) == 8
    assert found.best_logloss == complete[0].pooled_logloss("raw")
    decisions = sorted((d for s in summaries for d in s.decisions), key=lambda d: d.number)
    assert found.decisions == tuple(decisions[-3:])
    assert found.blend_logloss == decisions[-1].blend_logloss
    told = [s for s in summaries[15:] if s.status != "running"]
    assert [e for e in found.events if isinstance(e, CandidateSummary)] == told
    assert tally.device_seconds == pytest.approx(2.0 * len(trials))


def test_open_candidates_are_shown_after_the_complete_ones() -> None:
    tally = _tally()
    tally.trial(_trial("c0001", 1, 0.4))
    tally.trial(_trial("c0001", 0, 0.2))
    tally.decide(_decision(0, "c0001", 0, "continue"))
    [leader] = _progress(tally, 1).leaders
    assert leader.status == "running"
    assert leader.pooled_logloss("raw") == pytest.approx(0.3)
    assert [trial.fold for trial in leader.trials] == [0, 1] and leader.gain == 0.0
    later = [_decision(1, "c0001", 1, "continue"), _decision(2, "c0001", 0, "continue")]
    for decision in later:
        tally.decide(decision)
    [leader] = _progress(tally, 1).leaders
    assert leader.decisions == tuple(later)


def test_expected_fold_trials_and_time() -> None:
    tally = _tally(candidates=10)
    tally.trial(_trial("c0000", 0, 0.4))
    found = _progress(tally, 2, RunningTrial("c0001", "b", 0, 1, 4, 0.5))
    assert (found.trials_done, found.trials_total) == (1, 30)
    # 8 new candidates, 2 folds of the first, 2 more of the second and 3/4 of its running one.
    assert found.eta_s == pytest.approx(2.0 * (24 + 2 + 2 + 0.75) / 2 + 2.0 / 3)


def test_no_fold_is_expected_after_one_that_did_not_finish() -> None:
    """Between such a fold trial and the end of its candidate too."""
    tally = _tally(candidates=2)
    for fold in range(FOLDS):
        tally.trial(_trial("c0000", fold, 0.4))
    tally.trial(_trial("c0001", 0, 0.4, "stopped"))
    assert _progress(tally, 2).trials_total == 4
    other = RunningTrial("c0001", "b", 1, 1, 4, 0.5)
    assert _progress(tally, 2, other).trials_total == 5


def test_of_a_list_no_more_than_its_points_is_expected() -> None:
    points = (PointConfig(backbone="b"), PointConfig(backbone="b", params={"lr": 0.01}))
    config = SearchConfig(backbones=("b",), candidates=100, sampler="list", points=points)
    tally = Tally(config, ResourcesConfig(), FOLDS, 1.0)
    tally.trial(_trial("c0000", 0, 0.4))
    assert _progress(tally, 1).trials_total == 2 * FOLDS


def test_the_budget_is_told_and_bounds_what_is_expected() -> None:
    tally = _tally(candidates=10, fold_trials=7)
    tally.trial(_trial("c0000", 0, 0.4))
    found = _progress(tally, 1)
    assert found.trials_total == 7
    assert [(u.used, u.limit, u.unit) for u in found.budget] == [
        (1, 10, "candidates"),
        (1, 7, "fold trials"),
        (pytest.approx(2 / 3600), 2.0, "GPU-hours"),
    ]


def test_ten_thousand_candidates_cost_no_more_than_ten() -> None:
    tally = _tally(candidates=20_000)
    sweep = _Sweep(tally, 0)
    for _ in range(10_000):
        sweep.candidate(1, told=False)
    settled = [s for s in sweep.summaries if s.status != "running"]
    assert len(settled) > 4_000
    tally.replay(settled)
    assert min(timeit.repeat(lambda: _progress(tally, len(settled)), number=1, repeat=20)) < 0.005
