"""The honest loss of a method, and the loss without each member."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax

from foldrace.ensemble import Blend, crossfit, greedy
from foldrace.ensemble.crossfit import crossfit_rows, rise_of_least_loss, rise_of_mixture
from foldrace.ensemble.pool import MemberRows, Pool, member_rows
from foldrace.ensemble.pooling import Fit, mixture_fit
from foldrace.ensemble.solvers.kernels import certified
from tests.ensemble.temperature_reference import smoothed_temperature


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


def test_a_method_gets_members_whose_rows_are_adjacent() -> None:
    true = np.random.default_rng(0).uniform(0.1, 0.9, (7, 40))

    def first(members: NDArray[np.floating]) -> Blend:
        assert members.flags.c_contiguous
        return certified(members, np.eye(7)[0])

    crossfit(true, np.arange(40) % 4, first)


ROWS, CLASSES = 120, 4


def greedy_fit(pool: Pool) -> Fit:
    return mixture_fit(greedy(pool.true_prob, max_rounds=8))


def drawn_members(k: int = 3) -> tuple[list[NDArray[np.float64]], NDArray[np.int64], MemberRows]:
    """Overconfident members, the labels, and both as `MemberRows`."""
    rng = np.random.default_rng(3)
    logits = rng.normal(scale=1.5, size=(ROWS, CLASSES))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    noisy = [sharp * (logits + rng.normal(size=logits.shape)) for sharp in (1, 2, 3, 4)]
    members = [log_softmax(z, axis=1) for z in noisy]
    folds = rng.permutation(np.arange(ROWS) % k)
    return members, labels, member_rows(members, labels, folds)


@pytest.mark.parametrize("calibrated", [False, True])
def test_rows_equal_a_plain_loop_with_scipy_temperatures(calibrated: bool) -> None:
    members, labels, rows = drawn_members()
    plain, tempered = np.empty((ROWS, CLASSES)), np.empty((ROWS, CLASSES))
    for part in range(3):
        held = rows.parts == part
        probs = [
            np.exp(log_softmax(z / smoothed_temperature(z[~held], labels[~held]), axis=1))
            if calibrated
            else np.exp(z)
            for z in members
        ]
        true = np.stack([p[~held, labels[~held]] for p in probs])
        mixed = np.einsum("m,mnc->nc", greedy(true, max_rounds=8).weights, np.stack(probs))
        temperature = smoothed_temperature(np.log(mixed[~held]), labels[~held])
        plain[held] = mixed[held]
        tempered[held] = np.exp(log_softmax(np.log(mixed[held]) / temperature, axis=1))
    got_both = crossfit_rows(rows, greedy_fit, calibrated)
    for got, prob in zip(got_both, (plain, tempered), strict=True):
        losses = -np.log(prob[np.arange(ROWS), labels])
        assert got.loss == pytest.approx(losses.mean(), abs=1e-5)
        assert got.se == pytest.approx(losses.std(ddof=1) / math.sqrt(ROWS), abs=1e-5)
        by_part = [losses[rows.parts == part].mean() for part in range(3)]
        assert got.fold_losses == pytest.approx(by_part, abs=1e-5)
        np.testing.assert_allclose(got.true_prob, prob[np.arange(ROWS), labels], atol=1e-3)
        np.testing.assert_allclose(got.confidence, prob.max(axis=1), atol=1e-3)
        np.testing.assert_array_equal(got.hits, prob.argmax(axis=1) == labels)


def test_rows_without_temperatures_equal_the_arrays() -> None:
    _, _, rows = drawn_members(k=1)
    got, _ = crossfit_rows(rows, greedy_fit, calibrated=False)
    arrays = crossfit(rows.raw, np.zeros(ROWS, int), lambda t: greedy(t, max_rounds=8))
    assert got.loss == pytest.approx(arrays.loss, abs=1e-6)
    assert got.se == pytest.approx(arrays.se, abs=1e-6)
    assert got.fold_losses == pytest.approx(arrays.fold_losses, abs=1e-6)


@pytest.mark.parametrize("calibrated", [False, True])
def test_held_labels_have_no_say_in_what_is_predicted(calibrated: bool) -> None:
    members, labels, rows = drawn_members()
    held = rows.parts == 1
    other = np.where(held, (labels + 1) % CLASSES, labels)
    changed = member_rows(members, other, rows.parts)
    for before, after in zip(
        crossfit_rows(rows, greedy_fit, calibrated),
        crossfit_rows(changed, greedy_fit, calibrated),
        strict=True,
    ):
        np.testing.assert_array_equal(before.confidence[held], after.confidence[held])
        assert not np.allclose(before.confidence[~held], after.confidence[~held], rtol=1e-4)


def test_each_member_is_read_once_a_part_and_only_if_it_counts() -> None:
    _, _, rows = drawn_members()
    seen: list[int] = []

    def read(member: int) -> NDArray[np.float32]:
        seen.append(member)
        return rows.read(member)

    def second(pool: Pool) -> Fit:
        return mixture_fit(certified(pool.true_prob, [0.0, 1.0, 0.0, 0.0]))

    crossfit_rows(replace(rows, read=read), second, calibrated=True)
    assert seen == [1, 1, 1]


def members(seed: int, m: int, n: int = 300) -> NDArray[np.float64]:
    """(m, n) true-class probabilities of members that are each good at other rows."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(1.0, 1.0, n) + rng.normal(0.0, 1.5, (m, n)) + rng.normal(0, 0.4, (m, 1))
    return 1.0 / (1.0 + np.exp(-logits))


def test_leaving_out_agrees_with_another_solver() -> None:
    t = members(4, 4, n=200)

    def reference(columns: NDArray[np.float64]) -> float:
        def loss(z: NDArray[np.float64]) -> float:
            w = np.exp(z - z.max())
            return -float(np.log(w / w.sum() @ columns).mean())

        starts = [np.zeros(len(columns)), *(6 * np.eye(len(columns)))]
        options = {"xatol": 1e-8, "fatol": 1e-12, "maxiter": 8000, "maxfev": 8000}
        return min(minimize(loss, s, method="Nelder-Mead", options=options).fun for s in starts)

    rises = [reference(np.delete(t, m, axis=0)) - reference(t) for m in range(4)]
    np.testing.assert_allclose(
        np.array(rise_of_least_loss(t), dtype=float), np.maximum(rises, 0), atol=2e-6
    )


def test_a_member_without_a_weight_costs_nothing() -> None:
    t = members(6, 3)
    t[2] = 0.5 * t[:2].min(axis=0)
    rises = rise_of_least_loss(t)
    assert rises[2] == 0.0 and min(rises[:2]) > 1e-3  # type: ignore[type-var]
    copies = rise_of_least_loss(np.vstack([t, t[:2]]))
    assert copies == [0.0] * 5


def test_only_the_heaviest_of_many_are_asked() -> None:
    t = np.full((60, 60), 0.1) + 0.8 * np.eye(60)  # each is needed for one row
    rises = rise_of_least_loss(t)
    assert sum(rise is None for rise in rises) == 10
    assert min(rise for rise in rises if rise is not None) > 0.0


def test_the_mean_of_the_others() -> None:
    t = members(8, 5)
    t[3] = 0.01
    rises = rise_of_mixture(t, np.full(5, 0.2))
    losses = [-np.log(np.delete(t, m, axis=0).mean(axis=0)).mean() for m in range(5)]
    np.testing.assert_allclose(rises, losses + np.log(t.mean(axis=0)).mean(), atol=1e-12)
    assert rises[3] < 0.0 < rises[0]


def test_one_member_has_no_others() -> None:
    t = members(6, 1)
    with pytest.raises(ValueError, match="one member"):
        rise_of_least_loss(t)
    with pytest.raises(ValueError, match="one member"):
        rise_of_mixture(t, np.ones(1))
