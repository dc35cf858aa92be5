"""Learning rates at exact updates by another formula; who is decayed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from search_spaces.params import TrialParams
from trainables.optim import build_optimizer, build_schedule


def learning_rates(lr: float, warmup: float, updates: int) -> list[float]:
    """What each update is made with."""
    params = TrialParams(lr=lr, warmup=warmup)
    optimizer = build_optimizer(nn.Linear(2, 2), params)
    schedule = build_schedule(optimizer, params, updates)
    found = []
    for done in range(1, updates + 1):
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
        found.append(optimizer.param_groups[0]["lr"])
        schedule.step_update(done)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * lr)
    return found


def expected(lr: float, warmup_updates: int, updates: int, step: int) -> float:
    """Linear from 1 % up to the peak, then the half cosine of all `updates` down to 1 %."""
    low = 0.01 * lr
    if step < warmup_updates:
        return low + (lr - low) * step / warmup_updates
    return low + (lr - low) * (1 + math.cos(math.pi * step / updates)) / 2


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
def test_learning_rate_of_every_update(
    lr: float, warmup: float, updates: int, warmup_updates: int
) -> None:
    found = learning_rates(lr, warmup, updates)
    wanted = [expected(lr, warmup_updates, updates, step) for step in range(updates)]
    assert found == pytest.approx(wanted, rel=1e-9)


def test_exact_rates_of_a_small_case() -> None:
    # 4 updates, 1 of warm-up: 1 % of the peak; then (1 + cos(pi t / 4)) / 2 for t = 1, 2, 3.
    assert learning_rates(1.0, 0.25, 4) == pytest.approx(
        [0.01, 0.01 + 0.99 * 0.8535533905932737, 0.505, 0.01 + 0.99 * 0.14644660940672624]
    )


def test_biases_and_norms_are_not_decayed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    optimizer = build_optimizer(model, TrialParams(weight_decay=0.07))
    decay = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        is_matrix = name in ("0.weight", "3.weight")
        assert decay[parameter] == (0.07 if is_matrix else 0.0), name


def test_one_update_is_adamw_by_hand() -> None:
    layer = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(2.0)
    optimizer = build_optimizer(layer, TrialParams(lr=0.1, weight_decay=0.5))
    layer(torch.tensor([[3.0]])).sum().backward()
    optimizer.step()
    # Decay: 2 - 0.1 * 0.5 * 2; then Adam's first step is lr in the direction of the gradient.
    assert layer.weight.item() == pytest.approx(2.0 * (1 - 0.05) - 0.1, abs=1e-6)
