"""Temperatures against scipy's scalar minimiser and closed forms; extremes stay in range."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import DTypeLike, NDArray
from scipy.special import log_softmax

from foldrace.core.metrics import log_loss_of_true
from foldrace.core.temperature import (
    HOTTEST,
    LOG_CLIP,
    at_temperature,
    calibrated_log_loss,
    fit_temperature,
    part_temperatures,
    true_prob_at,
)
from tests.ensemble.temperature_reference import (
    plain_loss,
    plain_temperature,
    smoothed_loss,
    smoothed_temperature,
)


def drawn(
    rows: int, classes: int, sharpness: float, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Log-probabilities whose best temperature is about `sharpness`, and labels."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2.0, size=(rows, classes))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    return log_softmax(logits * sharpness, axis=1), labels


@pytest.mark.parametrize("sharpness", [0.2, 0.7, 1.0, 1.8, 4.0])
@pytest.mark.parametrize(("rows", "classes"), [(30, 3), (40, 2), (400, 10), (300, 396)])
def test_equals_scipy(sharpness: float, rows: int, classes: int) -> None:
    log_prob, labels = drawn(rows, classes, sharpness)
    log_prob = np.maximum(log_prob, LOG_CLIP)
    best = smoothed_temperature(log_prob, labels)
    got = fit_temperature(log_prob, labels)
    assert got == pytest.approx(best, rel=1e-3)
    gap = smoothed_loss(log_prob, labels, 1 / got) - smoothed_loss(log_prob, labels, 1 / best)
    assert gap < 1e-8


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_precision_as_it_is_stored(dtype: DTypeLike) -> None:
    log_prob, labels = drawn(500, 7, 1.5)
    stored = np.maximum(log_prob, LOG_CLIP).astype(dtype)
    assert fit_temperature(stored, labels) == pytest.approx(
        smoothed_temperature(stored, labels), rel=1e-3
    )


def test_of_many_rows_the_further_one_has_no_say() -> None:
    log_prob, labels = drawn(20_000, 10, 1.4)
    many = plain_temperature(log_prob, labels)
    assert fit_temperature(log_prob, labels) == pytest.approx(many, rel=1e-3)
    log_prob, labels = drawn(20, 10, 1.4, seed=1)
    few = plain_temperature(log_prob, labels)
    assert abs(fit_temperature(log_prob, labels) / few - 1) > 0.01


def two_classes(said: float, rows: int) -> NDArray[np.float64]:
    return np.tile(np.log([said, 1 - said]), (rows, 1))


def log_odds(share: float) -> float:
    return math.log(share / (1 - share))


def fitted_share(right: int, rows: int) -> float:
    """Each row gives 1 / (rows + 1) of itself to the other class: of `right` rows the label's
    share remains rows / (rows + 1), and of the wrong ones 1 / (rows + 1) is added."""
    return (rows * right + rows - right) / (rows * (rows + 1))


@pytest.mark.parametrize("rows", [10, 100])
@pytest.mark.parametrize(("said", "right"), [(0.99, 0.8), (0.6, 0.9), (0.8, 0.8), (0.7, 1.0)])
def test_closed_form_of_two_classes(said: float, right: float, rows: int) -> None:
    # All rows say `said`; the best p ** (1 / T), renormalised, says the share of the targets.
    count = round(rows * right)
    labels = (np.arange(rows) >= count).astype(np.int64)
    expected = log_odds(said) / log_odds(fitted_share(count, rows))
    assert fit_temperature(two_classes(said, rows), labels) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("rows", "classes"), [(60, 3), (40, 2), (700, 10), (300, 396)])
def test_parts_equal_fits_on_the_other_rows(rows: int, classes: int) -> None:
    log_prob, labels = drawn(rows, classes, 1.4)
    parts = np.random.default_rng(1).permutation(np.arange(rows) % 4)
    got = part_temperatures(log_prob, labels, parts)
    assert got.shape == (5,)
    assert got[0] == pytest.approx(fit_temperature(log_prob, labels), rel=1e-3)
    for part in range(4):
        rest = parts != part
        assert got[1 + part] == pytest.approx(
            fit_temperature(log_prob[rest], labels[rest]), rel=1e-3
        )


def test_parts_count_their_own_rows() -> None:
    # Unequal parts, all right: what is left outside decides how sure the temperature may be.
    labels, parts = np.zeros(60, np.int64), np.repeat([0, 1, 2], [50, 8, 2])
    got = part_temperatures(two_classes(0.7, 60), labels, parts)
    # All right of n: the share is n / (n + 1), the odds are n.
    expected = [log_odds(0.7) / math.log(outside) for outside in (60, 10, 52, 58)]
    assert got == pytest.approx(expected, rel=1e-4)


def test_a_part_that_holds_all_errors() -> None:
    labels, parts = np.repeat([0, 1], [30, 10]), np.repeat([0, 1], [30, 10])
    every, without_right, without_errors = part_temperatures(two_classes(0.7, 40), labels, parts)
    assert every == pytest.approx(log_odds(0.7) / log_odds(fitted_share(30, 40)), rel=1e-4)
    assert without_right == pytest.approx(HOTTEST, rel=1e-2)
    assert without_errors == pytest.approx(log_odds(0.7) / math.log(30), rel=1e-4)


@pytest.mark.parametrize("rows", [20, 200])
def test_rows_that_are_all_right_do_not_promise_certainty(rows: int) -> None:
    log_prob, _ = drawn(rows + 500, 5, 1.0)
    given, held = log_prob[:rows], log_prob[rows:]
    best = given.argmax(axis=1)
    got = fit_temperature(given, best)
    assert got == pytest.approx(smoothed_temperature(given, best), rel=1e-3)
    assert 2 / HOTTEST < got < 1  # surer than they said, as they were right
    wrong = held.argsort(axis=1)[:, -2]
    coldest = plain_temperature(given, best)
    assert coldest == pytest.approx(1 / HOTTEST, rel=1e-3)
    prices = [-np.log(true_prob_at(held, wrong, t)).mean() for t in (got, coldest)]
    assert prices[0] < 0.6 * prices[1]


@pytest.mark.parametrize("rows", [2, 200, 5000])
def test_a_wrong_row_after_rows_that_were_all_right_costs_log_rows(rows: int) -> None:
    log_prob, labels = two_classes(0.9, rows), np.zeros(rows, np.int64)
    temperature = fit_temperature(log_prob, labels)
    wrong = true_prob_at(log_prob[:1], np.ones(1, np.int64), temperature)
    assert wrong[0] == pytest.approx(1 / (rows + 1), rel=1e-3)


def test_rows_that_are_all_wrong_stay_in_range() -> None:
    log_prob, _ = drawn(50, 5, 1.0)
    worst = log_prob.argmin(axis=1)
    assert fit_temperature(log_prob, worst) == pytest.approx(HOTTEST, rel=1e-2)
    assert fit_temperature(two_classes(0.9, 50), np.ones(50, np.int64)) == pytest.approx(
        HOTTEST, rel=1e-2
    )


@pytest.mark.parametrize("classes", [3, 5, 396])
@pytest.mark.parametrize("rank", [-1, -2, 0])
def test_one_row(classes: int, rank: int) -> None:
    log_prob, _ = drawn(1, classes, 1.0)
    label = log_prob.argsort(axis=1)[:, rank]
    got = fit_temperature(log_prob, label)
    assert got == pytest.approx(smoothed_temperature(log_prob, label), rel=1e-2)


@pytest.mark.parametrize("label", [0, 1])
def test_one_row_of_two_classes_says_nothing(label: int) -> None:
    # The row and the further one disagree: a half each.
    got = fit_temperature(two_classes(0.9, 1), np.array([label]))
    assert got == pytest.approx(HOTTEST, rel=1e-2)


def test_rows_that_say_nothing_keep_temperature_one() -> None:
    labels = np.arange(12) % 4
    constant = np.full((12, 4), math.log(0.25))
    assert fit_temperature(constant, labels) == 1.0
    assert fit_temperature(np.zeros((1, 2)), np.zeros(1, np.int64)) == 1.0
    for rows in (1, 3):
        assert fit_temperature(np.zeros((rows, 1)), np.zeros(rows, np.int64)) == 1.0
    one_class = part_temperatures(np.zeros((4, 1)), np.zeros(4, np.int64), np.arange(4) % 2)
    np.testing.assert_array_equal(one_class, 1.0)


def test_rows_that_are_certain_and_right_are_as_sure_as_their_number_allows() -> None:
    labels = np.arange(12) % 4
    certain = np.where(np.eye(4, dtype=bool)[labels], 0.0, -np.inf)
    # Odds of 12 against three others together, of LOG_CLIP each.
    assert fit_temperature(certain, labels) == pytest.approx(-LOG_CLIP / math.log(36), rel=1e-4)


@pytest.mark.parametrize("zero", [-np.inf, -65504.0, -40.0])
def test_a_stored_zero_counts_as_the_least_probability_of_the_score(zero: float) -> None:
    log_prob, labels = drawn(200, 4, 1.2)
    stored, clipped = log_prob.astype(np.float16), log_prob.astype(np.float16)
    stored[7, labels[7]], clipped[7, labels[7]] = zero, LOG_CLIP
    expected = np.maximum(clipped, np.float16(LOG_CLIP))
    got = fit_temperature(stored, labels)
    assert got == pytest.approx(fit_temperature(expected, labels), rel=1e-3)
    assert got > fit_temperature(log_prob, labels)
    assert np.isfinite(at_temperature(stored, got)).all()


@pytest.mark.parametrize("temperature", [1 / HOTTEST, 0.5, 1.0, 3.0, HOTTEST])
def test_at_temperature_is_a_softmax(temperature: float) -> None:
    log_prob, labels = drawn(300, 396, 1.0)
    stored = log_prob.astype(np.float32) + np.float32(0.01)  # rows need not sum to 1
    stored.flags.writeable = False  # as in a memory-mapped file
    expected = np.maximum(log_softmax(stored.astype(np.float64) / temperature, axis=1), LOG_CLIP)
    got = at_temperature(stored, temperature)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=1e-4)
    np.testing.assert_allclose(np.exp(got).sum(axis=1), 1.0, atol=1e-5)
    true = true_prob_at(stored, labels, temperature)
    np.testing.assert_allclose(true, np.exp(expected[np.arange(300), labels]), atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("temperature", [0.05, 0.8, 1.0, 3.0])
def test_the_true_class_alone_is_as_in_the_whole_row(dtype: DTypeLike, temperature: float) -> None:
    log_prob, labels = drawn(900, 113, 3.0)
    log_prob = log_prob.astype(dtype)
    log_prob[5, 3] = -np.inf
    before = log_prob.copy()
    whole = np.exp(at_temperature(log_prob, temperature))[np.arange(len(labels)), labels]
    np.testing.assert_array_equal(true_prob_at(log_prob, labels, temperature), whole)
    np.testing.assert_array_equal(log_prob, before)


def calibrated(log_prob: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    stored = np.maximum(log_prob, LOG_CLIP).astype(np.float32)
    return calibrated_log_loss(stored, labels, np.exp(stored[np.arange(len(labels)), labels]))


@pytest.mark.parametrize("sharpness", [0.2, 0.7, 1.0, 1.8, 4.0])
@pytest.mark.parametrize(("rows", "classes"), [(30, 3), (400, 10), (300, 396)])
def test_the_calibrated_loss_is_that_of_scipys_temperature(
    sharpness: float, rows: int, classes: int
) -> None:
    log_prob, labels = drawn(rows, classes, sharpness)
    log_prob = np.maximum(log_prob, LOG_CLIP)
    fitted = plain_loss(log_prob, labels, 1 / smoothed_temperature(log_prob, labels))
    least = min(fitted, plain_loss(log_prob, labels, 1.0))
    assert calibrated(log_prob, labels) == pytest.approx(least, abs=2e-6)


def test_of_many_rows_the_calibrated_loss_is_the_least_of_any_temperature() -> None:
    log_prob, labels = drawn(20_000, 10, 2.5)
    least = plain_loss(log_prob, labels, 1 / plain_temperature(log_prob, labels))
    assert calibrated(log_prob, labels) == pytest.approx(least, abs=1e-6)
    assert plain_loss(log_prob, labels, 1.0) > least + 0.1


@given(st.integers(1, 40), st.integers(1, 8), st.floats(0, 60), st.integers(0, 99))
def test_calibration_never_raises_the_loss(
    rows: int, classes: int, sharpness: float, seed: int
) -> None:
    log_prob, labels = drawn(rows, classes, sharpness, seed)
    stored = np.maximum(log_prob, LOG_CLIP).astype(np.float32)
    uncalibrated = log_loss_of_true(np.exp(stored[np.arange(rows), labels]))
    assert 0 <= calibrated(log_prob, labels) <= uncalibrated + 1e-9


def test_the_calibrated_loss_of_no_number_is_none() -> None:
    log_prob = np.log(np.full((2, 2), 0.5, np.float32))
    log_prob[0, 1] = np.nan
    labels = np.zeros(2, np.int64)
    assert math.isnan(calibrated_log_loss(log_prob, labels, np.exp(log_prob[:, 0])))
