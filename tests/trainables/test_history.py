"""Which epochs of a training are kept: the last one and, as snapshots, fixed earlier ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from foldrace.config.hyperparameters import TrialParams
from foldrace.run_folder.records import Oof
from foldrace.run_folder.variants import EMA, RAW
from foldrace.trainables import history as history_module
from foldrace.trainables.history import Checkpoint, FoldScore, History
from foldrace.trainables.spec import EpochReport

Losses = list[float]
some_losses = st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5]), min_size=1, max_size=12)


def train(history: History, raw: Losses, ema: Losses | None = None) -> History:
    """A model whose weight is the epoch, and 100 more in the average."""
    for epoch, loss in enumerate(raw):
        history.log.append(EpochReport(epoch, *[math.nan] * 9, lr=0.0, seconds=0.0))
        models, scored = {RAW: model(epoch)}, {RAW: scored_as(loss)}
        if ema is not None:
            models[EMA], scored[EMA] = model(100 + epoch), scored_as(ema[epoch])
        history.keep(models, scored)
    return history


def model(weight: float) -> nn.Module:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, weight)
    return layer


def scored_as(loss: float) -> FoldScore:
    """Calibrated; the other losses say the opposite."""
    log_prob = np.array([[-loss, math.log(-math.expm1(-loss))]], np.float16)
    oof = Oof(log_prob, np.array([math.exp(-loss)], np.float32))
    return FoldScore(2 - loss, 0.5, 1 - loss, loss, oof)


def epochs(history: History) -> dict[str, int]:
    """Variant -> the epoch whose weights it has."""
    found = {}
    for name, kept in history.variants().items():
        weight = round(float(kept.weights["weight"]))
        assert weight % 100 == kept.score.epoch
        found[name] = kept.score.epoch
    return found


def history_of(epochs: int, snapshots: int = 0, cycles: int = 1) -> History:
    return History.of(TrialParams(epochs=epochs, snapshots=snapshots, cycles=cycles))


@given(some_losses, some_losses, st.integers(0, 4))
def test_the_last_epoch_and_those_before_it(raw: Losses, ema: Losses, snapshots: int) -> None:
    """Whatever the losses are, so that it is the same in all folds."""
    raw, ema = raw[: len(ema)], ema[: len(raw)]
    last = len(raw) - 1
    earlier = list(range(last))[max(0, last - snapshots) :]
    found = train(history_of(len(raw), snapshots), raw, ema)
    wanted = {f"snap{i + 1}": epoch for i, epoch in enumerate(earlier)}
    assert epochs(found) == {RAW: last, EMA: last} | wanted
    assert float(found.kept[EMA].weights["weight"]) == 100 + last
    assert found.kept[RAW].score.calibrated_logloss == raw[-1]


@pytest.mark.parametrize(
    ("snapshots", "cycles", "expected"),
    [
        (0, 3, []),
        (1, 2, [5]),  # of 12 epochs
        (1, 3, [7]),
        (2, 3, [3, 7]),
        (2, 4, [5, 8]),
    ],
)
def test_the_ends_of_the_last_cycles_before_the_last(
    snapshots: int, cycles: int, expected: list[int]
) -> None:
    found = epochs(train(history_of(12, snapshots, cycles), [0.3] * 12))
    assert found == {RAW: 11} | {f"snap{i + 1}": epoch for i, epoch in enumerate(expected)}


@pytest.mark.parametrize(("snapshots", "copied"), [(0, [4]), (1, [3, 4]), (2, [2, 3, 4])])
def test_only_what_is_written_is_copied(
    monkeypatch: pytest.MonkeyPatch, snapshots: int, copied: list[int]
) -> None:
    found: list[int] = []
    real = history_module._checkpoint

    def counted(model: nn.Module, scored: FoldScore, epoch: int) -> Checkpoint:
        found.append(epoch)
        return real(model, scored, epoch)

    monkeypatch.setattr(history_module, "_checkpoint", counted)
    train(history_of(5, snapshots), [0.3, 0.1, 0.2, 0.25, 0.4])
    assert found == copied


def test_nothing_of_a_training_that_diverged() -> None:
    history = train(history_of(2), [0.3, 0.1])
    history.diverged = True
    assert history.variants() == {}


def test_what_is_kept_does_not_change_with_the_model() -> None:
    history, changing = history_of(1), model(7.0)
    history.log.append(EpochReport(0, *[math.nan] * 9, lr=0.0, seconds=0.0))
    history.keep({RAW: changing}, {RAW: scored_as(0.1)})
    with torch.no_grad():
        next(changing.parameters()).fill_(9.0)
    assert float(history.kept[RAW].weights["weight"]) == 7.0
