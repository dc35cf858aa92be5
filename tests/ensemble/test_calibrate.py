"""Temperatures against scipy's scalar minimiser and closed forms; extremes stay in range."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import DTypeLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from ensemble.calibrate import (
    HOTTEST,
    LOG_CLIP,
    at_temperature,
    fit_temperature,
    part_temperatures,
    true_prob_at,
)


def drawn(
    rows: int, classes: int, sharpness: float, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Log-probabilities whose best temperature is about `sharpness`, and labels."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2.0, size=(rows, classes))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    return log_softmax(logits * sharpness, axis=1), labels


def loss_at(log_prob: NDArray[np.floating], labels: NDArray[np.int64], beta: float) -> float:
    scaled = log_softmax(log_prob.astype(np.float64) * beta, axis=1)
    return -float(scaled[np.arange(len(labels)), labels].mean())


def scipy_beta(log_prob: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    found = minimize_scalar(
        lambda beta: loss_at(log_prob, labels, beta),
        bounds=(1 / HOTTEST, HOTTEST),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return float(found.x)


@pytest.mark.parametrize("sharpness", [0.2, 0.7, 1.0, 1.8, 4.0])
@pytest.mark.parametrize(("rows", "classes"), [(30, 3), (400, 10), (300, 396)])
def test_equals_scipy(sharpness: float, rows: int, classes: int) -> None:
    log_prob, labels = drawn(rows, classes, sharpness)
    log_prob = np.maximum(log_prob, LOG_CLIP)
    best = scipy_beta(log_prob, labels)
    got = 1.0 / fit_temperature(log_prob, labels)
    assert got == pytest.approx(best, rel=1e-3)
    assert loss_at(log_prob, labels, got) - loss_at(log_prob, labels, best) < 1e-8


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_precision_as_it_is_stored(dtype: DTypeLike) -> None:
    log_prob, labels = drawn(500, 7, 1.5)
    stored = np.maximum(log_prob, LOG_CLIP).astype(dtype)
    assert 1.0 / fit_temperature(stored, labels) == pytest.approx(
        scipy_beta(stored, labels), rel=1e-3
    )


@pytest.mark.parametrize(("said", "right"), [(0.99, 0.8), (0.6, 0.9), (0.8, 0.8)])
def test_closed_form_of_two_classes(said: float, right: float) -> None:
    # All rows say `said`; the best p ** (1 / T), renormalised, says the share that is right.
    log_prob = np.tile(np.log([said, 1 - said]), (100, 1))
    labels = (np.arange(100) >= round(100 * right)).astype(np.int64)
    expected = math.log(said / (1 - said)) / math.log(right / (1 - right))
    assert fit_temperature(log_prob, labels) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("rows", "classes"), [(60, 3), (700, 10), (300, 396)])
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


def test_a_part_that_holds_all_errors() -> None:
    log_prob = np.tile(np.log([0.7, 0.3]), (40, 1))
    labels, parts = np.repeat([0, 1], [30, 10]), np.repeat([0, 1], [30, 10])
    every, without_right, without_errors = part_temperatures(log_prob, labels, parts)
    assert every == pytest.approx(math.log(0.7 / 0.3) / math.log(3), rel=1e-4)
    assert without_right == pytest.approx(HOTTEST, rel=1e-2)
    assert without_errors == pytest.approx(1 / HOTTEST, rel=1e-2)


@pytest.mark.parametrize("rows", [1, 50])
def test_all_right_and_all_wrong_stay_in_range(rows: int) -> None:
    log_prob, _ = drawn(rows, 5, 1.0)
    best, worst = log_prob.argmax(axis=1), log_prob.argmin(axis=1)
    coldest = fit_temperature(log_prob, best)
    assert 1 / HOTTEST <= coldest <= 0.2
    assert fit_temperature(log_prob, worst) == pytest.approx(HOTTEST, rel=1e-2)


def test_rows_that_say_nothing_keep_temperature_one() -> None:
    labels = np.arange(12) % 4
    constant = np.full((12, 4), math.log(0.25))
    certain = np.where(np.eye(4, dtype=bool)[labels], 0.0, -np.inf)
    assert fit_temperature(constant, labels) == 1.0
    assert fit_temperature(certain, labels) == 1.0
    assert fit_temperature(np.zeros((3, 1)), np.zeros(3, np.int64)) == 1.0


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
