"""Which epochs of a training are kept, against sorting them all."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

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
        assert weight % 100 == kept.score.best_epoch
        found[name] = kept.score.best_epoch
    return found


@given(some_losses, st.integers(0, 4))
def test_the_best_epochs_by_sorting(losses: Losses, snapshots: int) -> None:
    """The best one first, the earlier of two equal ones before the later."""
    order = sorted(range(len(losses)), key=lambda epoch: (losses[epoch], epoch))
    wanted = {RAW: order[0]}
    wanted |= {f"snap{i + 1}": epoch for i, epoch in enumerate(order[1 : snapshots + 1])}
    assert epochs(train(History(snapshots), losses)) == wanted


@given(some_losses, st.integers(1, 3))
def test_the_last_ends_of_cycles(losses: Losses, snapshots: int) -> None:
    ends = tuple(range(1, len(losses), 2))
    found = epochs(train(History(snapshots, ends), losses))
    assert found.pop(RAW) == losses.index(min(losses))
    assert found == {f"snap{i + 1}": epoch for i, epoch in enumerate(ends[-snapshots:])}


def test_raw_and_average_each_have_their_best_epoch() -> None:
    history = train(History(1), [0.3, 0.1, 0.2], [0.5, 0.4, 0.2])
    assert epochs(history) == {RAW: 1, EMA: 2, "snap1": 2}
    assert float(history.best[EMA].weights["weight"]) == 102
    assert history.epochs_without_progress() == 0
    assert train(History(), [0.1, 0.2, 0.3]).epochs_without_progress() == 2


@pytest.mark.parametrize(("snapshots", "copies"), [(0, 2), (1, 3), (2, 4)])
def test_only_what_is_kept_is_copied(
    monkeypatch: pytest.MonkeyPatch, snapshots: int, copies: int
) -> None:
    copied: list[int] = []
    real = history_module._checkpoint

    def counted(model: nn.Module, scored: FoldScore, epoch: int) -> Checkpoint:
        copied.append(epoch)
        return real(model, scored, epoch)

    monkeypatch.setattr(history_module, "_checkpoint", counted)
    train(History(snapshots), [0.3, 0.1, 0.2, 0.25, 0.4])
    assert len(copied) == copies


def test_nothing_of_a_training_that_diverged() -> None:
    history = train(History(), [0.3, 0.1])
    history.diverged = True
    assert history.variants() == {}


def test_what_is_kept_does_not_change_with_the_model() -> None:
    history, changing = History(), model(7.0)
    history.log.append(EpochReport(0, *[math.nan] * 9, lr=0.0, seconds=0.0))
    history.keep({RAW: changing}, {RAW: scored_as(0.1)})
    with torch.no_grad():
        next(changing.parameters()).fill_(9.0)
    assert float(history.best[RAW].weights["weight"]) == 7.0


@pytest.mark.parametrize("ends", [(), (0, 1)])
def test_without_snapshots_there_are_none(ends: tuple[int, ...]) -> None:
    assert set(epochs(train(History(0, ends), [0.3, 0.1]))) == {RAW}
