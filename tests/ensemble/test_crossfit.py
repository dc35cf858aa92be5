"""Cross-fitting against hand computation, and that held-out rows have no say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from ensemble import Blend, crossfit, greedy
from ensemble.certificate import certified


def uniform(t: NDArray[np.floating]) -> Blend:
    return certified(t, np.full(len(t), 1 / len(t)))


def best_single(t: NDArray[np.floating]) -> Blend:
    return certified(t, np.eye(len(t))[np.log(t).mean(axis=1).argmax()])


def test_closed_form_with_a_method_that_ignores_the_rows() -> None:
    true = np.array([[0.5, 0.25, 0.125, 0.125]])
    got = crossfit(true, [7, 3, 3, 7], uniform)
    bits = np.array([1, 2, 3, 3]) * math.log(2)
    assert got.loss == pytest.approx(bits.mean())
    assert got.se == pytest.approx(bits.std(ddof=1) / 2)
    assert got.fold_losses == pytest.approx((bits[1:3].mean(), bits[[0, 3]].mean()))  # 3, then 7


def test_weights_come_from_the_other_folds() -> None:
    # Member 0 is right on fold 0 only, member 1 on fold 1 only: each fold is scored by the other.
    true = np.array([[0.9, 0.9, 0.1, 0.1], [0.1, 0.1, 0.9, 0.9]])
    assert crossfit(true, [0, 0, 1, 1], best_single).loss == pytest.approx(-math.log(0.1))


def test_the_loss_is_pooled_not_the_mean_of_folds() -> None:
    true = np.array([[0.5, 0.125, 0.125, 0.125]])
    got = crossfit(true, [0, 1, 1, 1], uniform)
    assert got.loss == pytest.approx(2.5 * math.log(2))
    assert np.mean(got.fold_losses) == pytest.approx(2.0 * math.log(2))


def test_equals_a_plain_loop_with_greedy() -> None:
    rng = np.random.default_rng(0)
    true, folds = rng.uniform(0.0, 1.0, size=(9, 101)), rng.integers(0, 4, size=101)
    expected = np.empty(101)
    for row in range(101):
        weights = greedy(true[:, folds != folds[row]]).weights
        expected[row] = -math.log(max(1e-15, float(weights @ true[:, row])))
    got = crossfit(true, folds, greedy)
    assert got.loss == pytest.approx(expected.mean(), abs=1e-12)
    assert got.loss > greedy(true).loss


def test_a_single_fold_is_split_into_five_fixed_parts() -> None:
    true = np.random.default_rng(1).uniform(0.01, 1.0, size=(6, 52))
    seen: list[int] = []

    def method(t: NDArray[np.floating]) -> Blend:
        seen.append(t.shape[1])
        return greedy(t)

    first, second = crossfit(true, np.zeros(52, int), method), crossfit(true, [0] * 52, greedy)
    assert sorted(seen) == [41, 41, 42, 42, 42]
    assert len(first.fold_losses) == 5
    assert first == second


def test_two_rows_of_a_single_fold() -> None:
    got = crossfit([[0.5, 0.25]], [0, 0], uniform)
    assert got.loss == pytest.approx(1.5 * math.log(2))
    assert len(got.fold_losses) == 2


def test_chance_has_no_spread() -> None:
    got = crossfit(np.full((3, 20), 0.25), np.arange(20) % 5, greedy)
    assert got.loss == pytest.approx(math.log(4))
    assert got.se == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("true", "folds", "message"),
    [
        ([[0.5, 0.5]], [0], r"folds have shape \(1,\), should be \(2,\)"),
        ([[0.5, 0.5]], [0.0, 1.0], "type float64, should be an integer"),
        ([[0.5]], [0], "at least 2 are needed"),
        ([[0.5, math.nan]], [0, 1], "member 0, row 1: nan"),
    ],
)
def test_wrong_input_is_named(true: object, folds: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        crossfit(true, folds, greedy)
