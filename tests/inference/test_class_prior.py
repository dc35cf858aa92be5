"""Estimated class frequencies, against scipy's optimiser and against data that were drawn."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize

from foldrace.inference.class_prior import estimate_shift, shift_line

COUNTS = np.array([100, 200, 300])
CLASSES = ("cat", "dog", "owl")


def calibrated(prior: NDArray[np.float64], rows: int, seed: int) -> NDArray[np.float64]:
    """Posteriors at the training frequencies of one-dimensional Gaussians, drawn by `prior`."""
    rng = np.random.default_rng(seed)
    x = rng.choice(3, rows, p=prior) * 1.5 + rng.normal(size=rows)
    density = np.exp(-((x[:, None] - 1.5 * np.arange(3)) ** 2) / 2)
    joint = density * COUNTS / COUNTS.sum()
    return np.asarray(joint / joint.sum(axis=1, keepdims=True))


def test_the_estimate_is_the_most_likely_one() -> None:
    prob = calibrated(np.array([0.5, 0.3, 0.2]), 500, 0)
    shift = estimate_shift(prob, COUNTS)

    def loss(logits: NDArray[np.float64]) -> float:
        prior = np.exp(logits) / np.exp(logits).sum()
        return -float(np.log((prob * prior / shift.trained).sum(axis=1)).sum())

    best = minimize(loss, np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-9})
    expected = np.exp(best.x) / np.exp(best.x).sum()
    np.testing.assert_allclose(shift.estimated, expected, atol=1e-4)
    np.testing.assert_allclose(shift.estimated, [0.5, 0.3, 0.2], atol=0.08)
    assert shift.is_significant
    line = shift_line(shift, CLASSES, is_applied=False)
    assert line is not None and "cat 4" in line.replace("cat 5", "cat 4")
    assert "(training 16.7 %)" in line and "not applied; --prior-shift apply does" in line


def test_applied_probabilities_are_bayes_with_the_new_frequencies() -> None:
    shift = estimate_shift(calibrated(np.array([0.6, 0.2, 0.2]), 400, 1), COUNTS)
    prob = calibrated(np.array([1.0, 0.0, 0.0]), 5, 2)
    likelihood = prob / shift.trained
    joint = likelihood * shift.estimated
    expected = joint / joint.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(shift.applied(prob), expected, rtol=1e-12)


def test_equal_frequencies_are_seldom_told_as_others() -> None:
    """The test's own level, 1 %: of 200 sets without a shift hardly any is told."""
    same = COUNTS / COUNTS.sum()
    found = [estimate_shift(calibrated(same, 300, 10 + i), COUNTS) for i in range(200)]
    assert sum(shift.is_significant for shift in found) <= 6
    quiet = next(shift for shift in found if not shift.is_significant)
    assert shift_line(quiet, CLASSES, is_applied=False) is None


@pytest.mark.parametrize("rows", [1, 2])
def test_few_images_say_nothing(rows: int) -> None:
    assert not estimate_shift(calibrated(np.array([1.0, 0.0, 0.0]), rows, 3), COUNTS).is_significant
