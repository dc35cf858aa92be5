"""The average of the weights against its recurrence in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from foldrace.trainables.state import build_ema, ema_decay


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.9999])
def test_recurrence(decay: float) -> None:
    model = nn.Linear(1, 1, bias=False)
    ema = build_ema(model, decay)
    assert ema is not None
    average = model.weight.item()
    for update in range(1, 60):
        with torch.no_grad():
            model.weight.fill_((update * 7) % 11)
        ema.update(model, update)
        d = min(decay, 1 - update ** (-2 / 3))
        average = d * average + (1 - d) * ((update * 7) % 11)
        assert ema.module.weight.item() == pytest.approx(average, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("epochs", "updates_per_epoch"), [(0.5, 20), (2.0, 7), (1.0, 1)])
def test_the_reach_in_epochs(epochs: float, updates_per_epoch: int) -> None:
    """So many epochs later an update has 1/e of the weight that it came with."""
    decay = ema_decay(epochs, updates_per_epoch)
    assert decay ** (epochs * updates_per_epoch) == pytest.approx(1 / math.e)
    assert ema_decay(0.0, updates_per_epoch) == 0.0


def test_buffers_are_averaged_and_counters_copied() -> None:
    model = nn.BatchNorm1d(2)
    ema = build_ema(model, 0.9)
    assert ema is not None
    model(torch.randn(8, 2))
    ema.update(model, 1)  # the first update copies
    torch.testing.assert_close(ema.module.running_mean, model.running_mean)
    assert ema.module.num_batches_tracked.item() == 1


def test_zero_turns_it_off() -> None:
    assert build_ema(nn.Linear(1, 1), 0.0) is None


def test_the_average_is_its_own_module() -> None:
    model = nn.Linear(2, 2)
    ema = build_ema(model, 0.9)
    assert ema is not None
    assert ema.module.weight.data_ptr() != model.weight.data_ptr()
    assert not ema.module.training
