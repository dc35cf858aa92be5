"""The counts of a sweep, against what a walk over all candidates gives, and its ETA."""

from __future__ import annotations

import heapq
import timeit
from collections import Counter, defaultdict
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
    summarise,
)
from foldrace.run_folder.tables import ranked
from foldrace.scheduling.budget import CompletionCost, SweepUsage
from foldrace.scheduling.progress import ProgressCounts

FOLDS = 3


def _trial(candidate: str, fold: int, loss: float, status: TrialStatus = "finished") -> TrialRecord:
    score = VariantScore(rows=10, val_logloss=loss, calibrated_logloss=loss, val_acc=0.8, epoch=1)
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

    def __init__(self, counts: ProgressCounts, seed: int) -> None:
        self._counts, self._rng = counts, np.random.default_rng(seed)
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
                self._counts.add_trial(trials[-1])
            if status == "diverged":
                break
            last = fold == FOLDS - 1
            action: Action = (
                "complete" if last else "stop" if stops and fold == folds - 1 else "continue"
            )
            decisions.append(_decision(self._decisions, name, fold, action))
            self._decisions += 1
            if told:
                self._counts.add_decision(decisions[-1])
        summary = summarise(record, trials, FOLDS, True, decisions)
        self.summaries.append(summary)
        if told and summary.status != "running":
            self._counts.settle(summary)

    def settled(self, status: Literal["complete", "stopped"], folds: int) -> None:
        """A candidate that has ended with so many finished folds."""
        name = f"c{len(self.summaries):04d}"
        record = CandidateRecord(candidate=name, backbone="b", params={"epochs": 4})
        trials = tuple(_trial(name, fold, 0.5) for fold in range(folds))
        for trial in trials:
            self._counts.add_trial(trial)
        self.summaries.append(CandidateSummary(record, status, trials, FOLDS))
        self._counts.settle(self.summaries[-1])


def _counts(**search: int) -> ProgressCounts:
    config = SearchConfig(backbones=("b",), **{"candidates": 100, **search})  # type: ignore[arg-type]
    return ProgressCounts(config, ResourcesConfig(gpu_hours=2.0), FOLDS, 1.0)


def _progress(counts: ProgressCounts, candidates: int, *running: RunningTrial) -> Progress:
    usage = SweepUsage(candidates, counts.trials_ended + len(running), counts.device_seconds, None)
    return counts.progress(running, usage, slots=2, elapsed_s=7.0)


@pytest.mark.parametrize("seed", range(10))
def test_sums_are_those_of_a_walk(seed: int) -> None:
    counts = _counts()
    sweep = _Sweep(counts, seed)
    folds = np.random.default_rng(seed).integers(1, FOLDS + 1, size=40)
    for count in folds[:15]:
        sweep.candidate(int(count), told=False)
    counts.replay(sweep.summaries)
    for count in folds[15:]:
        sweep.candidate(int(count), told=True)
    found, summaries = _progress(counts, len(sweep.summaries)), sweep.summaries
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
    assert counts.device_seconds == pytest.approx(2.0 * len(trials))


def test_open_candidates_are_shown_after_the_complete_ones() -> None:
    counts = _counts()
    counts.add_trial(_trial("c0001", 1, 0.4))
    counts.add_trial(_trial("c0001", 0, 0.2))
    counts.add_decision(_decision(0, "c0001", 0, "continue"))
    [leader] = _progress(counts, 1).leaders
    assert leader.status == "running"
    assert leader.pooled_logloss("raw") == pytest.approx(0.3)
    assert [trial.fold for trial in leader.trials] == [0, 1] and leader.gain == 0.0
    later = [_decision(1, "c0001", 1, "continue"), _decision(2, "c0001", 0, "continue")]
    for decision in later:
        counts.add_decision(decision)
    [leader] = _progress(counts, 1).leaders
    assert leader.decisions == tuple(later)


def test_expected_fold_trials_and_time() -> None:
    counts = _counts(candidates=10)
    counts.add_trial(_trial("c0000", 0, 0.4))
    found = _progress(counts, 2, RunningTrial("c0001", "b", 0, 1, 4, 0.5))
    assert (found.trials_done, found.trials_total) == (1, 30)
    # 8 new candidates, 2 folds of the first, 2 more of the second and 3/4 of its running one.
    assert found.eta_s == pytest.approx(2.0 * (24 + 2 + 2 + 0.75) / 2)


def test_candidates_to_come_take_as_many_folds_as_those_that_are_settled() -> None:
    """Two settled candidates, one stopped after its first of three folds: 4 of 6."""
    counts = _counts(candidates=5)
    sweep = _Sweep(counts, 0)
    sweep.settled("complete", 3)
    sweep.settled("stopped", 1)
    found = _progress(counts, 2)
    assert found.trials_total == 4 + 3 * 3 * 4 / 6
    assert found.eta_s == pytest.approx(6 * 2.0 / 2)


def test_the_eta_is_unknown_before_a_fold_trial_has_finished() -> None:
    counts = _counts(candidates=4)
    assert _progress(counts, 0).eta_s is None
    counts.add_trial(_trial("c0000", 0, 0.4, "failed"))
    assert _progress(counts, 1, RunningTrial("c0001", "b", 0, 0, 4, None)).eta_s is None
    counts.add_trial(_trial("c0001", 0, 0.4))
    assert _progress(counts, 2).eta_s is not None


def test_the_eta_of_the_last_trials_is_what_is_left_of_the_longest() -> None:
    counts = _counts(candidates=1)
    for fold, seconds in enumerate((10.0, 30.0)):
        trial = _trial("c0000", fold, 0.4).model_copy(update={"seconds": seconds})
        counts.add_trial(trial)
    last = [RunningTrial("c0000", "b", 2, epoch, 4, 0.5) for epoch in range(5)]
    assert [_progress(counts, 1, trial).eta_s for trial in last] == [20.0, 15.0, 10.0, 5.0, 0.0]
    counts.add_trial(_trial("c0000", 2, 0.4))
    assert _progress(counts, 1).eta_s == 0.0


def test_seconds_of_an_unknown_backbone_are_those_of_all() -> None:
    counts = _counts()
    assert counts.fold_seconds("b") is None
    for backbone, seconds in (("a", 10.0), ("a", 20.0), ("b", 60.0)):
        update = {"backbone": backbone, "seconds": seconds}
        counts.add_trial(_trial("c0000", 0, 0.4).model_copy(update=update))
    counts.add_trial(_trial("c0001", 0, 0.4, "failed"))  # says nothing about a whole one
    found = [counts.fold_seconds(backbone) for backbone in "abc"]
    assert found == [15.0, 60.0, 30.0]
    assert counts.cost("b", folds=2, slots=4) == CompletionCost(2, 60.0, 4, 1.0)


def test_the_deadline_bounds_the_eta() -> None:
    counts = _counts(candidates=11)
    for fold in range(FOLDS):
        counts.add_trial(_trial("c0000", fold, 0.4))

    def at(seconds_left: float, *running: RunningTrial) -> tuple[int, float | None]:
        usage = SweepUsage(1, 3 + len(running), 6.0, seconds_left)
        found = counts.progress(running, usage, slots=2, elapsed_s=6.0)
        return found.trials_total, found.eta_s

    assert at(1e6) == (33, 30.0)  # 30 fold trials of 2 s
    assert at(15.0) == (18, 15.0)
    assert at(-1.0) == (3, 0.0)
    running = RunningTrial("c0001", "b", 0, 1, 4, 0.5)
    assert at(-1.0, running) == (4, 0.0)


def test_no_fold_is_expected_after_one_that_did_not_finish() -> None:
    """Between such a fold trial and the end of its candidate too."""
    counts = _counts(candidates=2)
    for fold in range(FOLDS):
        counts.add_trial(_trial("c0000", fold, 0.4))
    counts.add_trial(_trial("c0001", 0, 0.4, "stopped"))
    assert _progress(counts, 2).trials_total == 4
    other = RunningTrial("c0001", "b", 1, 1, 4, 0.5)
    assert _progress(counts, 2, other).trials_total == 5


def test_of_a_list_no_more_than_its_points_is_expected() -> None:
    points = (PointConfig(backbone="b"), PointConfig(backbone="b", params={"lr": 0.01}))
    config = SearchConfig(backbones=("b",), candidates=100, sampler="list", points=points)
    counts = ProgressCounts(config, ResourcesConfig(), FOLDS, 1.0)
    counts.add_trial(_trial("c0000", 0, 0.4))
    assert _progress(counts, 1).trials_total == 2 * FOLDS


def test_the_budget_is_told_and_bounds_what_is_expected() -> None:
    counts = _counts(candidates=10, fold_trials=7)
    counts.add_trial(_trial("c0000", 0, 0.4))
    found = _progress(counts, 1)
    assert found.trials_total == 7
    assert [(u.used, u.limit, u.unit) for u in found.budget] == [
        (1, 10, "candidates"),
        (1, 7, "fold trials"),
        (pytest.approx(2 / 3600), 2.0, "GPU-hours"),
    ]


def test_ten_thousand_candidates_cost_no_more_than_ten() -> None:
    counts = _counts(candidates=20_000)
    sweep = _Sweep(counts, 0)
    for _ in range(10_000):
        sweep.candidate(1, told=False)
    settled = [s for s in sweep.summaries if s.status != "running"]
    assert len(settled) > 4_000
    counts.replay(settled)
    assert min(timeit.repeat(lambda: _progress(counts, len(settled)), number=1, repeat=20)) < 0.005


def _simulated_etas(slots: int, seed: int) -> list[tuple[float, float]]:
    """(moment, ETA) after each fold trial of a race in which every second fold is the last."""
    rng, candidates, now = np.random.default_rng(seed), 120, 0.0
    counts = _counts(candidates=candidates)
    waiting, trials = list(range(candidates)), defaultdict[int, list[TrialRecord]](list)
    running: list[tuple[float, float, int]] = []  # end, seconds, candidate
    etas = []
    while waiting or running:
        while waiting and len(running) < slots:
            seconds = float(rng.uniform(0.5, 1.5))
            heapq.heappush(running, (now + seconds, seconds, waiting.pop(0)))
        now, seconds, number = heapq.heappop(running)
        done = trials[number]
        record = _trial(f"c{number:04d}", len(done), 0.5).model_copy(update={"seconds": seconds})
        done.append(record)
        counts.add_trial(record)
        if len(done) < FOLDS and rng.random() < 0.5:
            waiting.insert(0, number)
        else:
            status = "complete" if len(done) == FOLDS else "stopped"
            candidate = CandidateRecord(candidate=record.candidate, backbone="b", params={})
            counts.settle(CandidateSummary(candidate, status, tuple(done), FOLDS))  # type: ignore[arg-type]
        now_running = [
            RunningTrial(
                f"c{n:04d}", "b", len(trials.get(n, ())), int(100 * (1 - left / s)), 100, 0.5
            )
            for left, s, n in ((end - now, s, n) for end, s, n in running)
        ]
        started = candidates - sum(not trials[n] for n in waiting)
        usage = SweepUsage(started, counts.trials_ended + len(running), 0.0)
        eta = counts.progress(now_running, usage, slots, now).eta_s
        assert eta is not None
        etas.append((now, eta))
    return etas


@pytest.mark.parametrize("slots", [1, 4])
def test_the_eta_of_simulated_sweeps(slots: int) -> None:
    """It shrinks to 0, and from a fifth of the sweep on it is right to a third."""
    ratios = []
    for seed in range(20):
        etas = _simulated_etas(slots, seed)
        end = etas[-1][0]
        told = [next(t for t in etas if t[0] >= part * end) for part in (0.2, 0.5, 0.8)]
        assert told[0][1] > told[1][1] > told[2][1] > etas[-1][1] == 0.0
        ratios += [eta / (end - moment) for moment, eta in told]
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.15)
    assert np.quantile(np.abs(np.array(ratios) - 1), 0.9) < 1 / 3
