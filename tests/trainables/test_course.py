"""Which epochs of a training are kept, against sorting them all."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from foldrace.run_folder.records import EMA, RAW, Oof
from foldrace.trainables import history as course_module
from foldrace.trainables.history import Course, Kept, Scored
from foldrace.trainables.spec import EpochReport

Losses = list[float]
some_losses = st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5]), min_size=1, max_size=12)


def train(course: Course, raw: Losses, ema: Losses | None = None) -> Course:
    """A model whose weight is the epoch, and 100 more in the average."""
    for epoch, loss in enumerate(raw):
        course.log.append(EpochReport(epoch, *[math.nan] * 7, lr=0.0, seconds=0.0))
        models, scored = {RAW: model(epoch)}, {RAW: scored_as(loss)}
        if ema is not None:
            models[EMA], scored[EMA] = model(100 + epoch), scored_as(ema[epoch])
        course.keep(models, scored)
    return course


def model(weight: float) -> nn.Module:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, weight)
    return layer


def scored_as(loss: float) -> Scored:
    log_prob = np.array([[-loss, math.log(-math.expm1(-loss))]], np.float16)
    return Scored(loss, 0.5, loss, Oof(log_prob, np.array([math.exp(-loss)], np.float32)))


def epochs(course: Course) -> dict[str, int]:
    """Variant -> the epoch whose weights it has."""
    found = {}
    for name, kept in course.variants().items():
        weight = round(float(kept.state["weight"]))
        assert weight % 100 == kept.score.best_epoch
        found[name] = kept.score.best_epoch
    return found


@given(some_losses, st.integers(0, 4))
def test_the_best_epochs_by_sorting(losses: Losses, snapshots: int) -> None:
    """The best one first, the earlier of two equal ones before the later."""
    order = sorted(range(len(losses)), key=lambda epoch: (losses[epoch], epoch))
    wanted = {RAW: order[0]}
    wanted |= {f"snap{i + 1}": epoch for i, epoch in enumerate(order[1 : snapshots + 1])}
    assert epochs(train(Course(snapshots), losses)) == wanted


@given(some_losses, st.integers(1, 3))
def test_the_last_ends_of_cycles(losses: Losses, snapshots: int) -> None:
    ends = tuple(range(1, len(losses), 2))
    found = epochs(train(Course(snapshots, ends), losses))
    assert found.pop(RAW) == losses.index(min(losses))
    assert found == {f"snap{i + 1}": epoch for i, epoch in enumerate(ends[-snapshots:])}


def test_raw_and_average_each_have_their_best_epoch() -> None:
    course = train(Course(1), [0.3, 0.1, 0.2], [0.5, 0.4, 0.2])
    assert epochs(course) == {RAW: 1, EMA: 2, "snap1": 2}
    assert float(course.best[EMA].state["weight"]) == 102
    assert course.epochs_without_progress() == 0
    assert train(Course(), [0.1, 0.2, 0.3]).epochs_without_progress() == 2


@pytest.mark.parametrize(("snapshots", "copies"), [(0, 2), (1, 3), (2, 4)])
def test_only_what_is_kept_is_copied(
    monkeypatch: pytest.MonkeyPatch, snapshots: int, copies: int
) -> None:
    copied: list[int] = []
    real = course_module._kept

    def counted(model: nn.Module, scored: Scored, epoch: int) -> Kept:
        copied.append(epoch)
        return real(model, scored, epoch)

    monkeypatch.setattr(course_module, "_kept", counted)
    train(Course(snapshots), [0.3, 0.1, 0.2, 0.25, 0.4])
    assert len(copied) == copies


def test_nothing_of_a_training_that_diverged() -> None:
    course = train(Course(), [0.3, 0.1])
    course.diverged = True
    assert course.variants() == {}


def test_what_is_kept_does_not_change_with_the_model() -> None:
    course, changing = Course(), model(7.0)
    course.log.append(EpochReport(0, *[math.nan] * 7, lr=0.0, seconds=0.0))
    course.keep({RAW: changing}, {RAW: scored_as(0.1)})
    with torch.no_grad():
        next(changing.parameters()).fill_(9.0)
    assert float(course.best[RAW].state["weight"]) == 7.0


@pytest.mark.parametrize("ends", [(), (0, 1)])
def test_without_snapshots_there_are_none(ends: tuple[int, ...]) -> None:
    assert set(epochs(train(Course(0, ends), [0.3, 0.1]))) == {RAW}
