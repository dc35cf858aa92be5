"""Rates of every update by closed forms, torch and timm; sizes of every epoch as tables."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR

from foldrace.config.hyperparameters import TrialParams
from foldrace.trainables.schedules import (
    SCHEDULES,
    Schedule,
    ScheduleRow,
    build_schedule,
    cycle_ends,
    training_size,
)

each_row = pytest.mark.parametrize("row", SCHEDULES.values(), ids=SCHEDULES)


def sgd(*rates: float) -> torch.optim.SGD:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups, lr=1.0)


def learning_rates(params: TrialParams, per_epoch: int, losses: list[float]) -> list[float]:
    """What each update is made with; `losses` is the validation's of each epoch."""
    optimizer = sgd(params.lr)
    schedule = build_schedule(optimizer, params, per_epoch, len(losses))
    found, done = [], 0
    for loss in losses:
        for _ in range(per_epoch):
            found.append(optimizer.param_groups[0]["lr"])
            done += 1
            schedule.step_update(done)
        schedule.epoch_done(loss)
    return found


def params_of(name: str, **values: float) -> TrialParams:
    return TrialParams.from_dict({"schedule": name, "lr": 1.0, "warmup": 0.0, **values})


def cosine_by_hand(lr: float, warmup_updates: int, updates: int, step: int) -> float:
    """Linear from 1 % up to the peak, then half a cosine from there down to 1 %."""
    low = 0.01 * lr
    if step < warmup_updates:
        return low + (lr - low) * step / warmup_updates
    progress = (step - warmup_updates) / (updates - warmup_updates)
    return low + (lr - low) * (1 + math.cos(math.pi * progress)) / 2


@each_row
def test_contract(row: ScheduleRow) -> None:
    assert SCHEDULES[row.name] is row and row.doc
    for warmup in (0.0, 0.1, 0.9):
        for per_epoch, epochs in ((1, 1), (1, 2), (3, 7), (50, 4)):
            params = params_of(row.name, warmup=warmup, lr=0.3)
            rates = learning_rates(params, per_epoch, [1.0] * epochs)
            assert all(0 < rate <= 0.3 * (1 + 1e-12) for rate in rates)


@each_row
def test_groups_keep_their_ratio(row: ScheduleRow) -> None:
    optimizer = sgd(1.0, 0.25)
    schedule = build_schedule(optimizer, params_of(row.name, warmup=0.2), 5, 4)
    for done in range(21):
        schedule.step_update(done)
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert second == pytest.approx(first / 4)


@each_row
def test_goes_on_as_if_never_interrupted(row: ScheduleRow) -> None:
    params = params_of(row.name, warmup=0.2, lr_patience=1, cycles=2)
    losses = [1.0, 2.0, 0.5, 0.7, 0.6, 0.1]

    def run(optimizer: torch.optim.Optimizer, schedule: Schedule, epochs: range) -> list[float]:
        rates = []
        for epoch in epochs:
            rates.append(optimizer.param_groups[0]["lr"])
            schedule.step_update(3 * (epoch + 1))
            schedule.epoch_done(losses[epoch])
        return rates

    first = sgd(1.0)
    schedule = build_schedule(first, params, 3, 6)
    run(first, schedule, range(3))
    state, weights = json.loads(json.dumps(schedule.state_dict())), first.state_dict()
    expected = run(first, schedule, range(3, 6))
    second = sgd(1.0)
    second.load_state_dict(weights)
    resumed = build_schedule(second, params, 3, 6)
    resumed.load_state_dict(state)
    assert run(second, resumed, range(3, 6)) == expected


@pytest.mark.parametrize(
    ("lr", "warmup", "updates", "warmup_updates"),
    [
        (1e-3, 0.0, 10, 0),
        (1e-3, 0.1, 10, 1),
        (3e-4, 0.3, 20, 6),
        (0.5, 0.25, 100, 25),
        (1e-3, 0.9, 10, 9),
        (1e-3, 0.9, 1, 0),  # one update: no room for a warm-up
        (1e-3, 0.9, 2, 1),
    ],
)
def test_cosine_of_every_update(
    lr: float, warmup: float, updates: int, warmup_updates: int
) -> None:
    found = learning_rates(params_of("cosine", lr=lr, warmup=warmup), 1, [1.0] * updates)
    wanted = [cosine_by_hand(lr, warmup_updates, updates, step) for step in range(updates)]
    assert found == pytest.approx(wanted, rel=1e-9)


def test_cosine_of_a_small_case() -> None:
    # 4 updates, 1 of warm-up: 1 % of the peak; then (1 + cos(pi t / 3)) / 2 for t = 0, 1, 2.
    assert learning_rates(params_of("cosine", warmup=0.25), 4, [1.0]) == pytest.approx(
        [0.01, 1.0, 0.01 + 0.99 * 0.75, 0.01 + 0.99 * 0.25]
    )


@pytest.mark.parametrize("cycles", [1, 2, 5])
@pytest.mark.parametrize("warmup", [0.1, 0.3, 0.9])
def test_no_jump_but_at_a_restart(warmup: float, cycles: int) -> None:
    """Between two neighbours never more than the steepest slopes of the parts allow."""
    found = learning_rates(params_of("cosine", warmup=warmup, cycles=cycles), 100, [1.0] * 10)
    peak = round(warmup * 1000)
    assert found[peak] == 1.0 and max(found[:peak]) < 1.0
    restarts = {100 * (end + 1) for end in cycle_ends(10, cycles)}
    shortest = min(end - peak for end in restarts if end > peak)  # updates of the first cosine
    steepest = max(1 / peak, math.pi / 2 / min(shortest, 1000 // cycles))
    for i, (before, after) in enumerate(itertools.pairwise(found), 1):
        if i in restarts and i > peak:
            assert before < 0.02 and after == pytest.approx(1.0)
        else:
            assert abs(after - before) <= steepest


def test_only_the_first_cycle_is_shortened() -> None:
    plain = learning_rates(params_of("cosine", cycles=3), 4, [1.0] * 9)
    warmed = learning_rates(params_of("cosine", cycles=3, warmup=0.25), 4, [1.0] * 9)
    assert warmed[12:] == plain[12:] and warmed[9] == 1.0


def test_a_plateau_waits_for_the_end_of_the_warm_up() -> None:
    params = params_of("plateau", warmup=0.5, lr_factor=0.5, lr_patience=1)
    found = learning_rates(params, 4, [1.0, 2.0, 2.0, 2.0])
    assert found[8:] == [1.0] * 4 + [0.5] * 4  # the peak has an epoch


def test_cosine_ends_at_one_percent() -> None:
    optimizer = sgd(2.0)
    build_schedule(optimizer, params_of("cosine", lr=2.0), 5, 3).step_update(15)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.02)


@pytest.mark.parametrize("cycles", [1, 2, 4])
def test_restarts_are_timms(cycles: int) -> None:
    optimizer = sgd(1.0)
    theirs = CosineLRScheduler(
        optimizer, t_initial=40 // cycles, lr_min=0.01, cycle_limit=cycles, t_in_epochs=False
    )
    wanted = []
    for done in range(40):
        theirs.step_update(done)
        wanted.append(optimizer.param_groups[0]["lr"])
    found = learning_rates(params_of("cosine", cycles=cycles), 5, [1.0] * 8)
    assert found == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(("warmup", "pct_start"), [(0.0, 0.3), (0.1, 0.1), (0.5, 0.5)])
def test_one_cycle_is_torchs(warmup: float, pct_start: float) -> None:
    optimizer = sgd(1.0)
    theirs = OneCycleLR(
        optimizer, 1.0, total_steps=40, pct_start=pct_start, cycle_momentum=False
    )  # fmt: skip
    wanted = []
    for _ in range(40):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(wanted) < 40:
            theirs.step()
    found = learning_rates(params_of("one_cycle", warmup=warmup), 10, [1.0] * 4)
    assert found == pytest.approx(wanted, rel=1e-9)


def test_step_is_torchs() -> None:
    optimizer = sgd(1.0)
    theirs = StepLR(optimizer, step_size=3, gamma=0.2)
    wanted = []
    for _ in range(10):
        wanted += [optimizer.param_groups[0]["lr"]] * 4
        optimizer.step()
        theirs.step()
    found = learning_rates(params_of("step", lr_factor=0.2, lr_patience=3), 4, [1.0] * 10)
    assert found == pytest.approx(wanted)


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_plateau_is_torchs(patience: int) -> None:
    losses = [math.nan, 1.0, 0.8, 0.9, 0.8, math.nan, 0.85, 0.7, 0.75, 0.71, 0.7, 0.72, 0.1, 0.2]
    optimizer = sgd(1.0)
    # torch waits for more than `patience` epochs, and its eps keeps small rates.
    theirs = ReduceLROnPlateau(optimizer, factor=0.5, patience=patience - 1, threshold=0, eps=0)
    wanted = []
    for loss in losses:
        wanted += [optimizer.param_groups[0]["lr"]] * 2
        theirs.step(loss)
    found = learning_rates(params_of("plateau", lr_factor=0.5, lr_patience=patience), 2, losses)
    assert found == pytest.approx(wanted)
    assert min(found) < 1


def test_warm_up_and_then_the_schedule() -> None:
    found = learning_rates(params_of("constant", warmup=0.4), 5, [1.0, 1.0])
    assert found == pytest.approx([0.01 + 0.99 * i / 4 for i in range(4)] + [1.0] * 6)
    found = learning_rates(params_of("step", warmup=0.4, lr_factor=0.5, lr_patience=1), 5, [1, 1])
    assert found == pytest.approx([0.01 + 0.99 * i / 4 for i in range(4)] + [1.0] * 5 + [0.5])


@pytest.mark.parametrize(
    ("epochs", "cycles", "ends"),
    [
        (10, 1, [9]),
        (10, 2, [4, 9]),
        (10, 3, [2, 6, 9]),
        (7, 3, [1, 4, 6]),
        (3, 3, [0, 1, 2]),
    ],
)
def test_cycle_ends(epochs: int, cycles: int, ends: list[int]) -> None:
    assert cycle_ends(epochs, cycles) == ends


def test_the_rate_is_lowest_at_the_ends_of_cycles() -> None:
    found = learning_rates(params_of("cosine", cycles=3), 4, [1.0] * 10)
    for end in cycle_ends(10, 3)[:-1]:
        last = 4 * end + 3
        assert found[last] < found[last - 1] and found[last + 1] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("epochs", "image_size", "size_start", "sizes"),
    [
        (6, 224, 0.5, [128, 128, 160, 192, 224, 224]),  # 112, 140, 168, 196 before rounding
        (9, 256, 0.5, [128, 160, 160, 192, 224, 224, 256, 256, 256]),
        (3, 32, 0.25, [8, 24, 32]),
        (4, 64, 0.5, [32, 48, 64, 64]),
        (3, 16, 0.25, [8, 8, 16]),
        (2, 224, 0.5, [128, 224]),
        (1, 224, 0.5, [224]),
        (5, 224, 1.0, [224] * 5),
        (3, 130, 1.0, [130] * 3),
        (3, 500, 0.6, [288, 416, 500]),
    ],
)
def test_sizes(epochs: int, image_size: int, size_start: float, sizes: list[int]) -> None:
    assert [training_size(e, epochs, image_size, size_start) for e in range(epochs)] == sizes


@pytest.mark.parametrize("size_start", [0.25, 0.5, 0.77])
@pytest.mark.parametrize("image_size", [16, 30, 100, 224, 260, 384])
def test_never_shrinks_and_never_exceeds_the_size(image_size: int, size_start: float) -> None:
    for epochs in range(1, 40):
        sizes = [training_size(e, epochs, image_size, size_start) for e in range(epochs)]
        assert sizes == sorted(sizes) and sizes[-1] == image_size
        assert sizes.count(image_size) >= epochs / 3
        assert min(sizes) >= min(8, image_size)
