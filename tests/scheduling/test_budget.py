"""What may still start, limit by limit."""

from __future__ import annotations

import math

import pytest

from foldrace.config.schema import (
    DataConfig,
    FoldsConfig,
    ResourcesConfig,
    SearchConfig,
    SweepConfig,
)
from foldrace.scheduling.budget import (
    Budget,
    CompletionCost,
    Deadline,
    SweepUsage,
    UpdateCost,
    budget_problems,
    devices_of_a_trial,
)

_NONE = SweepUsage(0, 0, 0.0)


def _budget(
    candidates: int = 10,
    fold_trials: int | None = None,
    gpu_hours: float | None = None,
    time_budget: float | None = None,
) -> Budget:
    search = SearchConfig(backbones=("b",), candidates=candidates, fold_trials=fold_trials)
    return Budget(search, ResourcesConfig(gpu_hours=gpu_hours, time_budget=time_budget))


@pytest.mark.parametrize(
    ("budget", "usage", "candidate", "fold"),
    [
        (_budget(), _NONE, True, True),
        (_budget(), SweepUsage(9, 45, 1e9), True, True),
        (_budget(), SweepUsage(10, 45, 1e9), False, True),
        (_budget(fold_trials=46), SweepUsage(9, 45, 1e9), True, True),
        (_budget(fold_trials=45), SweepUsage(9, 45, 1e9), False, False),
        (_budget(gpu_hours=0.5), SweepUsage(1, 1, 1799.9), True, True),
        (_budget(gpu_hours=0.5), SweepUsage(1, 1, 1800.0), False, False),
        (_budget(), SweepUsage(1, 1, 0.0, seconds_left=0.1), True, True),
        (_budget(), SweepUsage(1, 1, 0.0, seconds_left=0.0), False, False),
    ],
)
def test_each_limit_alone(budget: Budget, usage: SweepUsage, candidate: bool, fold: bool) -> None:
    assert budget.admits_candidate(usage) is candidate
    assert budget.admits_fold(usage) is fold


def test_a_candidate_that_cannot_be_complete_is_not_started() -> None:
    budget = _budget(fold_trials=20)
    assert budget.admits_candidate(SweepUsage(3, 15, 0.0), CompletionCost(folds=5))
    assert not budget.admits_candidate(SweepUsage(4, 16, 0.0), CompletionCost(folds=5))
    assert budget.admits_fold(SweepUsage(4, 16, 0.0), CompletionCost(folds=4))


@pytest.mark.parametrize(
    ("left", "folds", "slots", "starts"),
    [
        (100.0, 1, 1, True),  # a fold trial takes 100 s
        (99.9, 1, 1, False),
        (500.0, 5, 1, True),
        (499.9, 5, 1, False),
        (300.0, 5, 2, True),  # three rounds of two at a time
        (299.9, 5, 2, False),
        (100.0, 5, 8, True),
    ],
)
def test_what_would_end_after_the_deadline_does_not_start(
    left: float, folds: int, slots: int, starts: bool
) -> None:
    cost = CompletionCost(folds, 100.0, slots)
    assert _budget().admits_fold(SweepUsage(1, 1, 0.0, left), cost) is starts
    assert _budget().admits_candidate(SweepUsage(1, 1, 0.0, left), cost) is starts


def test_hours_count_every_device_of_a_fold_trial() -> None:
    budget = _budget(gpu_hours=1.0)  # 3,600 device-seconds
    cost = CompletionCost(folds=5, fold_seconds=100.0, slots=2, devices=4.0)
    assert budget.admits_candidate(SweepUsage(1, 5, 1600.0), cost)  # 5 × 400 s are left
    assert not budget.admits_candidate(SweepUsage(1, 5, 1600.1), cost)
    assert budget.fold_trials_left(SweepUsage(1, 5, 1600.0), cost) == 5.0
    assert budget.fold_trials_left(SweepUsage(1, 5, 3700.0), cost) == 0.0


def test_fold_trials_left_without_limits_and_before_a_measurement() -> None:
    assert _budget().fold_trials_left(_NONE) == math.inf
    assert _budget(gpu_hours=1.0).fold_trials_left(_NONE) == math.inf
    assert _budget(gpu_hours=1.0).fold_trials_left(SweepUsage(1, 1, 3600.0)) == 0.0
    assert _budget(fold_trials=7, gpu_hours=1.0).fold_trials_left(SweepUsage(1, 5, 0.0)) == 2.0


def test_the_limit_that_ended_a_sweep_is_named() -> None:
    budget = _budget(fold_trials=6, gpu_hours=2.0, time_budget=60.0)
    assert budget.exhausted_limit(SweepUsage(10, 5, 10.0, 1.0)) is None
    assert (
        budget.exhausted_limit(SweepUsage(2, 6, 10.0, 1.0)) == "search.fold_trials: 6 of 6 started"
    )
    hours = "resources.gpu_hours: 2.5 of 2 are spent"
    assert budget.exhausted_limit(SweepUsage(2, 5, 9000.0, 1.0)) == hours
    over = "resources.time_budget: 0 s of it are left for fold trials"
    assert budget.exhausted_limit(SweepUsage(2, 5, 1.0, -3.0)) == over
    cost = CompletionCost(folds=5, fold_seconds=4.0, slots=2)
    assert (
        budget.exhausted_limit(SweepUsage(2, 3, 1.0, 9.0), cost)
        == "search.fold_trials: 3 of 6 started"
    )
    short = "resources.time_budget: 11 s of it are left for fold trials"
    assert budget.exhausted_limit(SweepUsage(2, 1, 1.0, 11.0), cost) == short
    assert budget.exhausted_limit(SweepUsage(2, 1, 1.0, 12.0), cost) is None


def test_devices_of_a_trial() -> None:
    assert devices_of_a_trial(ResourcesConfig(), gpus=0.0) == 1.0
    assert devices_of_a_trial(ResourcesConfig(), gpus=0.5) == 0.5
    assert devices_of_a_trial(ResourcesConfig(devices_per_trial=4), gpus=1.0) == 4.0
    assert devices_of_a_trial(ResourcesConfig(devices_per_trial=2), gpus=0.0) == 2.0


@pytest.mark.parametrize(("fold_trials", "wrong"), [(None, 0), (4, 1), (5, 0)])
def test_fewer_fold_trials_than_one_candidate_needs(fold_trials: int | None, wrong: int) -> None:
    search = SearchConfig(backbones=("b",), fold_trials=fold_trials)
    config = SweepConfig(
        name="x", data=DataConfig(train="t"), folds=FoldsConfig(k=5), search=search
    )
    problems = budget_problems(config)
    assert len(problems) == wrong
    for problem in problems:
        assert str(problem) == (
            "search.fold_trials: is 4, but a candidate is complete with folds.k = 5 fold trials; "
            "allowed: at least 5"
        )


@pytest.mark.parametrize(
    ("budget", "startup", "update", "kept"),
    [
        (8 * 3600.0, 5.0, None, 5 + 576.0),  # nothing is known but the start
        (600.0, 30.0, None, 24 + 12.0),
        (120.0, 8.0, None, 6.4 + 2.4),
        (30.0, 60.0, None, 10.0),  # at most a third
        (120.0, 5.0, UpdateCost(1.5, pending=0), 5 + 2.4 + 2 * 1.5),
        (120.0, 5.0, UpdateCost(1.5, pending=4), 5 + 2.4 + 4 * 1.5),
        (120.0, 15.0, UpdateCost(1.5, pending=4), 12 + 2.4 + 4 * 1.5),  # a busy machine
        (3600.0, 900.0, UpdateCost(60.0, pending=2), 30 + 72 + 3 * 60.0),  # much data to check
        (3600.0, 8.0, UpdateCost(900.0, pending=2), 1200.0),
    ],
)
def test_time_is_kept_for_what_follows_the_sweep(
    budget: float, startup: float, update: UpdateCost | None, kept: float
) -> None:
    deadline = Deadline(budget, 100.0, startup)
    assert deadline.finishing_time(update) == pytest.approx(kept)
    assert deadline.seconds_left(100.0, update) == pytest.approx(budget - kept)
    assert deadline.seconds_left(101.0 + budget - kept, update) == pytest.approx(-1.0)


def test_where_nothing_else_fits_any_time_is_enough() -> None:
    """But not more fold trials or hours."""
    cost = CompletionCost(folds=4, fold_seconds=60.0, slots=2, fits_any_time=True)
    assert _budget().admits_fold(SweepUsage(1, 1, 0.0, seconds_left=0.1), cost)
    assert not _budget().admits_fold(SweepUsage(1, 1, 0.0, seconds_left=0.0), cost)
    assert not _budget(fold_trials=4).admits_fold(SweepUsage(1, 1, 0.0, seconds_left=0.1), cost)
    assert not _budget(gpu_hours=0.06).admits_fold(SweepUsage(1, 1, 0.0, seconds_left=0.1), cost)
