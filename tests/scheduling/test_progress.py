"""The counts of a sweep, against what a walk over all candidates gives, and its ETA."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest

from foldrace.config.schema import PointConfig, ResourcesConfig, SearchConfig
from foldrace.run_folder.progress import Progress, RunningTrial
from foldrace.run_folder.records import (
    CandidateRecord,
    CandidateSummary,
    RaceAction,
    RaceDecision,
    TrialRecord,
    TrialStatus,
    VariantScore,
    summarise,
)
from foldrace.scheduling.budget import SweepUsage
from foldrace.scheduling.progress import SessionEvents, sweep_progress

FOLDS = 3


def trial(
    candidate: str,
    fold: int,
    loss: float = 0.4,
    status: TrialStatus = "finished",
    seconds: float = 2.0,
    backbone: str = "b",
) -> TrialRecord:
    score = VariantScore(rows=10, val_logloss=loss, calibrated_logloss=loss, val_acc=0.8, epoch=1)
    return TrialRecord(
        candidate=candidate, fold=fold, status=status, backbone=backbone, params={"epochs": 4},
        folds_hash="h", seed=0, seconds=seconds, epochs_trained=4,
        variants={"raw": score} if status == "finished" else {},
    )  # fmt: skip


def decision(
    number: int, candidate: str, fold: int, action: RaceAction, epoch: int | None = None
) -> RaceDecision:
    return RaceDecision(
        number=number, candidate=candidate, fold=fold, epoch=epoch, rule="gain", action=action,
        folds_done=fold + 1, rows=10, gain=0.01 * number, gain_se=0.001, complete=0,
        blend_logloss=1.0 / (number + 1), epochs_trained=4, reason="a reason",
    )  # fmt: skip


def candidate(
    number: int, trials: Sequence[TrialRecord] = (), decisions: Sequence[RaceDecision] = ()
) -> CandidateSummary:
    name = f"c{number:04d}"
    record = CandidateRecord(candidate=name, backbone="b", params={"epochs": 4})
    return summarise(record, trials, FOLDS, True, decisions)


def finished(number: int, folds: int, **others: Any) -> CandidateSummary:
    """One with so many finished folds."""
    return candidate(number, [trial(f"c{number:04d}", fold, **others) for fold in range(folds)])


def stopped(number: int, folds: int) -> CandidateSummary:
    """One that the race has stopped after so many finished folds."""
    name = f"c{number:04d}"
    last = decision(number, name, folds - 1, "stop")
    return candidate(number, [trial(name, fold) for fold in range(folds)], [last])


def running(number: int, fold: int = 0, epoch: int = 1) -> RunningTrial:
    return RunningTrial(f"c{number:04d}", "b", fold, epoch, 4, 0.5)


def progress(
    summaries: Sequence[CandidateSummary],
    *trials: RunningTrial,
    search: SearchConfig | None = None,
    resources: ResourcesConfig | None = None,
    slots: int = 2,
    elapsed_s: float = 7.0,
    seconds_left: float | None = None,
    **others: Any,
) -> Progress:
    ended = [t for s in summaries for t in s.trials]
    usage = SweepUsage(
        candidates=len({s.candidate.candidate for s in summaries} | {t.candidate for t in trials}),
        fold_trials=len(ended) + len(trials),
        device_seconds=sum(t.seconds for t in ended),
        seconds_left=seconds_left,
    )
    return sweep_progress(
        summaries, search or limits(), resources or ResourcesConfig(), folds=FOLDS, usage=usage,
        slots=slots, devices=1.0, elapsed_s=elapsed_s, running=trials, **others,
    )  # fmt: skip


def limits(**search: Any) -> SearchConfig:
    return SearchConfig(**{"backbones": ("b",), "candidates": 100} | search)


# -- sums


def random_candidate(number: int, rng: np.random.Generator, first: int) -> CandidateSummary:
    """One that has been raced for some folds; `first` is the number of its first decision."""
    name, trials, decisions = f"c{number:04d}", [], []
    last_action: RaceAction = rng.choice(["park", "stop", "continue"])  # type: ignore[assignment]
    if rng.random() < 0.2:
        parked = decision(first, name, 0, "park", epoch=1)
        return candidate(number, [], [parked])
    for fold in range(last := int(rng.integers(1, FOLDS + 1))):
        status: TrialStatus = "diverged" if rng.random() < 0.1 else "finished"
        trials.append(trial(name, fold, float(rng.uniform(0.1, 2.0)), status))
        if status == "diverged":
            break
        action: RaceAction = "continue" if fold < last - 1 else last_action
        action = "complete" if fold == FOLDS - 1 else action
        decisions.append(decision(first + fold, name, fold, action))
    return candidate(number, trials, decisions)


@pytest.mark.parametrize("seed", range(10))
def test_sums_are_those_of_a_walk(seed: int) -> None:
    rng = np.random.default_rng(seed)
    summaries = [random_candidate(number, rng, FOLDS * number) for number in range(40)]
    statuses = [status_by_hand(summary) for summary in summaries]
    found = progress(summaries)
    trials = [t for s in summaries for t in s.trials]
    assert found.trials_done == len(trials)
    assert found.failed == sum(t.status == "diverged" for t in trials)
    assert found.counts == Counter(statuses) and found.counts["parked"] > 3
    pairs = zip(summaries, statuses, strict=True)
    complete = sorted(
        (float(np.mean([t.variants["raw"].calibrated_logloss for t in s.trials])), number)
        for number, (s, status) in enumerate(pairs)
        if status == "complete"
    )
    order = [number for _, number in complete[:8]]
    pairs = zip(summaries, statuses, strict=True)
    begun = [
        number
        for number, (s, status) in enumerate(pairs)
        if s.trials and status in ("running", "parked")
    ]
    assert found.leaders == tuple(summaries[n] for n in (*order, *begun)[:8])
    assert found.best_logloss == pytest.approx(complete[0][0])
    decisions = sorted((d for s in summaries for d in s.decisions), key=lambda d: d.number)
    assert found.decisions == tuple(decisions[-3:])
    assert found.blend_logloss == decisions[-1].blend_logloss


def status_by_hand(summary: CandidateSummary) -> str:
    actions = [d.action for d in summary.decisions]
    if "stop" in actions:
        return "stopped"
    if any(t.status == "diverged" for t in summary.trials):
        return "diverged"
    if "complete" in actions:
        return "complete"
    return "parked" if actions[-1] == "park" else "running"


def test_who_runs_is_not_parked() -> None:
    """A candidate whose second fold goes on after the first was parked; one that has returned."""
    between = candidate(0, [trial("c0000", 0)], [decision(0, "c0000", 0, "park")])
    waiting = candidate(1, [trial("c0001", 0)], [decision(1, "c0001", 0, "park")])
    in_training = candidate(2, [], [decision(2, "c0002", 0, "park", epoch=1)])
    back = candidate(3, [], [decision(3, "c0003", 0, "continue", epoch=1)])
    summaries = [between, waiting, in_training, back]
    assert progress(summaries, running(3)).counts == {"parked": 3, "running": 1}
    found = progress(summaries, running(0, 1), running(0, 2), running(3))
    assert found.counts == {"parked": 2, "running": 2}
    alone = progress([between], running(0, 1))
    assert alone.counts == {"running": 1}


def test_a_sweep_that_has_not_begun() -> None:
    found = progress([], resources=ResourcesConfig(gpu_hours=2.0))
    assert (found.trials_done, found.trials_total, found.failed) == (0, 300, 0)
    assert (found.eta_s, found.best_logloss, found.blend_logloss) == (None, None, None)
    assert not found.counts and not found.leaders and not found.decisions


def test_open_candidates_are_shown_after_the_complete_ones() -> None:
    half, whole = finished(0, 2, loss=0.1), finished(1, 3, loss=0.9)
    lost = candidate(2, [trial("c0002", 0, status="failed")])
    unborn = candidate(3)
    assert progress([half, whole, lost, unborn]).leaders == (whole, half)


def test_events_of_a_session_come_in_order() -> None:
    heard, whole = SessionEvents(), finished(0, 3)
    first, last = whole.trials[0], decision(0, "c0000", 0, "continue")
    heard.candidate_started(whole.candidate)
    heard.trial_ended(first, whole)
    heard.decided(last, whole)
    heard.settled(whole)
    found = progress([whole], events=heard.events, notes=["a note"])
    assert list(found.events) == [first, last, whole] and found.notes == ("a note",)


# -- what the race has saved


def test_epochs_that_were_not_trained_cost_what_others_of_their_backbone_have() -> None:
    """Four epochs a fold, three folds: each candidate has 12."""
    whole = finished(0, 3, seconds=8.0)  # 12 epochs in 24 s
    after_a_fold = stopped(1, 1)  # 4 epochs in 2 s; 8 left
    in_training = candidate(2, [], [parked_at(2, "c0002", 3, seconds=7.0)])  # 3 in 7 s; 9 left
    an_epoch = (24 + 2 + 7) / (12 + 4 + 3)
    found = progress([whole, after_a_fold, in_training])
    assert found.saved_device_seconds == pytest.approx((8 + 9) * an_epoch)
    goes_on = progress([whole, after_a_fold, in_training], running(2))
    assert goes_on.saved_device_seconds == pytest.approx(8 * an_epoch)
    assert progress([whole]).saved_device_seconds == 0.0
    assert found.device_seconds == 26.0
    assert goes_on.trial_counts == {"finished": 4, "running": 1}


def test_backbones_have_their_own_costs() -> None:
    def of(number: int, backbone: str, seconds: float) -> CandidateSummary:
        name = f"c{number:04d}"
        record = CandidateRecord(candidate=name, backbone=backbone, params={"epochs": 4})
        first = trial(name, 0, seconds=seconds, backbone=backbone)
        return summarise(record, [first], FOLDS, True, [decision(number, name, 0, "park")])

    both = progress([of(0, "slow", 40.0), of(1, "fast", 4.0)])
    assert both.saved_device_seconds == pytest.approx(8 * 10.0 + 8 * 1.0)


def parked_at(number: int, name: str, epoch: int, seconds: float) -> RaceDecision:
    return decision(number, name, 0, "park", epoch).model_copy(update={"seconds": seconds})


# -- what is left


def test_expected_fold_trials_and_time() -> None:
    found = progress([finished(0, 1), candidate(1)], running(1), search=limits(candidates=10))
    assert (found.trials_done, found.trials_total) == (1, 30)
    # 8 new candidates, 2 folds of the first, 2 more of the second and 3/4 of its running one.
    assert found.eta_s == pytest.approx(2.0 * (24 + 2 + 2 + 0.75) / 2)


def test_candidates_to_come_take_as_many_folds_as_those_that_are_settled() -> None:
    """Two settled candidates, one stopped after its first of three folds: 4 of 6."""
    found = progress([finished(0, 3), stopped(1, 1)], search=limits(candidates=5))
    assert found.trials_total == 4 + 3 * 3 * 4 / 6
    assert found.eta_s == pytest.approx(6 * 2.0 / 2)


def test_folds_of_parked_candidates_are_yet_to_come() -> None:
    """Those of a trial that is parked in mid-training too."""
    parked = candidate(0, [], [decision(0, "c0000", 0, "park", epoch=1)])
    waiting = candidate(1, [trial("c0001", 0)], [decision(1, "c0001", 0, "park")])
    found = progress([parked, waiting], search=limits(candidates=2))
    assert (found.trials_done, found.trials_total, found.eta_s) == (1, 6, 5.0)


def test_the_eta_is_unknown_before_a_fold_trial_has_finished() -> None:
    search = limits(candidates=4)
    assert progress([], search=search).eta_s is None
    failed = candidate(0, [trial("c0000", 0, status="failed")])
    assert progress([failed, candidate(1)], running(1), search=search).eta_s is None
    assert progress([failed, finished(1, 1)], search=search).eta_s is not None


def test_the_eta_of_the_last_trials_is_what_is_left_of_the_longest() -> None:
    both = [trial("c0000", 0, seconds=10.0), trial("c0000", 1, seconds=30.0)]
    search = limits(candidates=1)
    found = [
        progress([candidate(0, both)], running(0, 2, epoch), search=search).eta_s
        for epoch in range(5)
    ]
    assert found == [20.0, 15.0, 10.0, 5.0, 0.0]
    done = candidate(0, [*both, trial("c0000", 2)])
    assert progress([done], search=search).eta_s == 0.0


def test_a_running_trial_takes_as_long_as_others_of_its_backbone() -> None:
    """Of a backbone that nothing is known of: as all."""
    trials = [
        trial("c0000", fold, seconds=seconds, backbone=backbone)
        for fold, (backbone, seconds) in enumerate((("a", 10.0), ("a", 20.0), ("b", 60.0)))
    ]
    done, search = candidate(0, trials), limits(candidates=2, fold_trials=4)
    etas = []
    for backbone in "abc":
        trial_of = replace(running(1, epoch=0), backbone=backbone)
        etas.append(progress([done, candidate(1)], trial_of, search=search).eta_s)
    assert etas == [15.0, 60.0, 30.0]


def test_the_deadline_bounds_the_eta() -> None:
    search = limits(candidates=11)

    def at(seconds_left: float, *trials: RunningTrial) -> tuple[int, float | None]:
        found = progress([finished(0, 3)], *trials, search=search, seconds_left=seconds_left)
        return found.trials_total, found.eta_s

    assert at(1e6) == (33, 30.0)  # 30 fold trials of 2 s
    assert at(15.0) == (18, 15.0)
    assert at(-1.0) == (3, 0.0)
    assert at(-1.0, running(1)) == (4, 0.0)


@pytest.mark.parametrize("status", ["stopped", "diverged", "failed"])
def test_no_fold_is_expected_after_one_that_did_not_finish(status: TrialStatus) -> None:
    """Between such a fold trial and the end of its candidate too."""
    summaries = [finished(0, 3), candidate(1, [trial("c0001", 0, status=status)])]
    search = limits(candidates=2)
    assert progress(summaries, search=search).trials_total == 4
    assert progress(summaries, running(1, 1), search=search).trials_total == 5


def test_of_a_list_no_more_than_its_points_is_expected() -> None:
    points = (PointConfig(backbone="b"), PointConfig(backbone="b", params={"lr": 0.01}))
    search = limits(sampler="list", points=points)
    assert progress([finished(0, 1)], search=search).trials_total == 2 * FOLDS


# -- the budget


def test_every_limit_that_is_set_has_a_line() -> None:
    search, resources = limits(candidates=10, fold_trials=7), ResourcesConfig(gpu_hours=2.0)
    found = progress([finished(0, 1)], search=search, resources=resources, seconds_left=13.0)
    assert [(u.used, u.limit, u.unit) for u in found.budget] == [
        (1, 10, "candidates"),
        (1, 7, "fold trials"),
        (pytest.approx(2 / 3600), 2.0, "GPU-hours"),
        (7.0, 20.0, "s"),
    ]
    [only] = progress([finished(0, 1)]).budget
    assert (only.used, only.limit, only.unit) == (1, 100, "candidates")
    late = progress([finished(0, 1)], seconds_left=-3.0).budget[-1]
    assert (late.used, late.limit) == (7.0, 7.0)


@pytest.mark.parametrize(
    ("search", "hours", "expected"),
    [
        ({"fold_trials": 7}, None, 7),
        ({}, 10.0 / 3600, 5),  # of 2 s each
        ({"fold_trials": 7}, 10.0 / 3600, 5),
        ({"fold_trials": 1}, None, 1),
    ],
)
def test_no_more_is_expected_than_the_budget_allows(
    search: dict[str, int], hours: float | None, expected: int
) -> None:
    resources = ResourcesConfig(gpu_hours=hours)
    found = progress([finished(0, 1)], search=limits(**search), resources=resources)
    assert found.trials_total == expected


# -- whole sweeps


def simulated_etas(slots: int, seed: int) -> list[tuple[float, float]]:
    """(moment, ETA) after each fold trial of a race in which every second fold is the last."""
    rng, candidates, now = np.random.default_rng(seed), 120, 0.0
    waiting, trials = list(range(candidates)), defaultdict[int, list[TrialRecord]](list)
    summaries: dict[int, CandidateSummary] = {}
    busy: list[tuple[float, float, int]] = []  # end, seconds, candidate
    etas = []
    while waiting or busy:
        while waiting and len(busy) < slots:
            seconds, number = float(rng.uniform(0.5, 1.5)), waiting.pop(0)
            summaries.setdefault(number, candidate(number))
            heapq.heappush(busy, (now + seconds, seconds, number))
        now, seconds, number = heapq.heappop(busy)
        done, name = trials[number], f"c{number:04d}"
        done.append(trial(name, len(done), seconds=seconds))
        action: Literal["continue", "stop"] = "continue"
        if len(done) < FOLDS and rng.random() < 0.5:
            waiting.insert(0, number)
        elif len(done) < FOLDS:
            action = "stop"
        summaries[number] = candidate(number, done, [decision(0, name, 0, action)])
        now_running = [
            RunningTrial(f"c{n:04d}", "b", len(trials[n]), int(100 * (1 - left / s)), 100, 0.5)
            for left, s, n in ((end - now, s, n) for end, s, n in busy)
        ]
        found = progress(
            list(summaries.values()), *now_running, search=limits(candidates=candidates),
            slots=slots, elapsed_s=now,
        )  # fmt: skip
        assert found.eta_s is not None
        etas.append((now, found.eta_s))
    return etas


@pytest.mark.parametrize("slots", [1, 4])
def test_the_eta_of_simulated_sweeps(slots: int) -> None:
    """It shrinks to 0, and from a fifth of the sweep on it is right to a third."""
    ratios = []
    for seed in range(10):
        etas = simulated_etas(slots, seed)
        end = etas[-1][0]
        told = [next(t for t in etas if t[0] >= part * end) for part in (0.2, 0.5, 0.8)]
        assert told[0][1] > told[1][1] > told[2][1] > etas[-1][1] == 0.0
        ratios += [eta / (end - moment) for moment, eta in told]
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.15)
    assert np.quantile(np.abs(np.array(ratios) - 1), 0.9) < 1 / 3
