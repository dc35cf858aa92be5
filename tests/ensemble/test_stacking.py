"""Stacking against scikit-learn's logistic regression and against log-linear pooling."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from foldrace.core.metrics import log_loss
from foldrace.ensemble.pooling import Settings, Stacking, blend_prob
from foldrace.ensemble.solvers.log_linear import (
    Coefficients,
    Problem,
    log_stack,
    row_losses,
    runner_up,
)
from foldrace.ensemble.solvers.stacking import (
    chosen_penalty,
    geometric,
    matrices_for,
    scale_bounds,
    stacked,
    stacking,
)
from tests.ensemble.member_pools import made_up, pool_of


def probabilities(found: Coefficients, stack: np.ndarray) -> np.ndarray:
    m, _, classes = stack.shape
    padded = np.zeros((m, classes, classes))
    padded[: len(found.matrices)] = found.matrices  # the others have none
    logits = np.einsum("m,mnc->nc", found.scales, stack)
    logits += np.einsum("mnc,mcd->nd", stack, padded) + found.intercept
    return np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))


@pytest.mark.parametrize("penalty", [0.3, 30.0])
@pytest.mark.parametrize(("members", "classes"), [(1, 3), (3, 4)])
def test_without_scales_it_is_logistic_regression(
    penalty: float, members: int, classes: int
) -> None:
    log_probs, labels = made_up(members, 150, classes)
    pool = pool_of(log_probs, labels)
    stack = log_stack(pool, np.arange(members))
    found = stacked(
        Problem(stack, labels, np.zeros((members, 2)), penalty), np.zeros(members), members
    )
    # A column of ones: scikit-learn's own intercept has no penalty.
    features = np.concatenate([*stack, np.ones((150, 1))], axis=1).astype(np.float64)
    peer = LogisticRegression(C=1 / penalty, fit_intercept=False, tol=1e-10, max_iter=10_000)
    expected = peer.fit(features, labels).predict_proba(features)
    got = probabilities(found, stack)

    def objective(prob: np.ndarray, size: float) -> float:
        return 150 * log_loss(prob, labels) + penalty / 2 * size

    mine = float((found.matrices**2).sum() + (found.intercept**2).sum())
    theirs = objective(expected, float((peer.coef_**2).sum()))
    assert objective(got, mine) == pytest.approx(theirs, abs=1e-4)
    np.testing.assert_allclose(got, expected, atol=2e-3)
    assert row_losses(stack, labels, found).mean() == pytest.approx(log_loss(got, labels), abs=1e-9)


def test_two_classes_too() -> None:
    log_probs, labels = made_up(2, 80, 2)
    stack = log_stack(pool_of(log_probs, labels), np.arange(2))
    found = stacked(Problem(stack, labels, np.zeros((2, 2)), 1.0), np.zeros(2), 2)
    # For two classes scikit-learn fits one difference d of two columns: |d|^2 / 2 = |W|^2.
    features = np.concatenate([*stack, np.ones((80, 1))], axis=1).astype(np.float64)
    peer = LogisticRegression(C=2.0, fit_intercept=False, tol=1e-10, max_iter=10_000)
    expected = peer.fit(features, labels).predict_proba(features)
    np.testing.assert_allclose(probabilities(found, stack), expected, atol=2e-3)


@pytest.mark.parametrize("penalty", [1e9, math.inf])
def test_a_heavy_penalty_gives_log_linear_pooling(penalty: float) -> None:
    log_probs, labels = made_up(5, 120, 4)
    pool = pool_of(log_probs, labels)
    expected = geometric(pool, Settings())
    members = expected.used
    stack = log_stack(pool, members)
    bounds = scale_bounds(members, Settings())
    problem = Problem(stack, labels, bounds, penalty, runner_up(stack, labels))
    found = stacked(problem, np.full(len(members), 0.1), 2)
    np.testing.assert_allclose(probabilities(found, stack), blend_prob(expected, pool), atol=1e-3)


def test_the_further_row_is_one_row() -> None:
    """As many rows again, their labels the runners-up, that together weigh what one row does."""
    log_probs, labels = made_up(2, 90, 3)
    stack = log_stack(pool_of(log_probs, labels), np.arange(2))
    others = runner_up(stack, labels)
    assert (others != labels).all()
    found = stacked(Problem(stack, labels, np.zeros((2, 2)), 3.0, others), np.zeros(2), 2)
    features = np.concatenate([*stack, np.ones((90, 1))], axis=1).astype(np.float64)
    peer = LogisticRegression(C=1 / 3.0, fit_intercept=False, tol=1e-10, max_iter=10_000)
    share = np.repeat([90 / 91, 1 / 91], 90)
    peer.fit(np.concatenate([features, features]), np.concatenate([labels, others]), share)
    np.testing.assert_allclose(probabilities(found, stack), peer.predict_proba(features), atol=2e-3)


def test_rows_that_are_all_right_do_not_promise_certainty() -> None:
    log_probs, labels = made_up(3, 60, 4)
    rows = (log_probs.argmax(axis=2) == labels).all(axis=0)
    pool = pool_of(log_probs[:, rows], labels[rows])
    for method in (geometric, stacking):
        prob = blend_prob(method(pool, Settings()), pool)
        confidence = prob.max(axis=1).mean()
        assert 0.8 < confidence < 1 - 0.2 / rows.sum()  # about one row in n + 1 may be wrong


def confused(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Members that take every second image of class 0 for class 1, and never 1 for 0."""
    log_probs, labels = made_up(3, rows, 3, seed)
    rng = np.random.default_rng(seed)
    swapped = (labels == 0) & (rng.random(rows) < 0.5)
    log_probs[:, swapped] = log_probs[:, swapped][:, :, [1, 0, 2]]
    return log_probs, labels


def test_it_learns_which_classes_are_confused() -> None:
    log_probs, labels = confused(600, 0)
    pool = pool_of(log_probs, labels)
    fit = stacking(pool, Settings())
    unseen = pool_of(*confused(600, 1))
    plain = geometric(pool, Settings())
    gain = log_loss(blend_prob(plain, unseen), unseen.labels) - log_loss(
        blend_prob(fit, unseen), unseen.labels
    )
    assert gain > 0.02


def test_pure_noise_is_not_learned() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 90)
    log_probs = np.log(rng.dirichlet(np.ones(4), (4, 90))).astype(np.float32)
    stack = log_stack(pool_of(log_probs, labels), np.arange(4))
    bounds = scale_bounds(np.arange(4), Settings())
    assert chosen_penalty(stack, labels, bounds, np.full(4, 0.1), 4) == math.inf


def easy(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Members that are nearly always right, and wrong together."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, rows)
    shared = rng.normal(0, 1, (rows, 10))
    shared[np.arange(rows), labels] += 4
    logits = 1.5 * (shared + rng.normal(0, 0.7, (8, rows, 10)))
    logits -= np.log(np.exp(logits).sum(axis=2, keepdims=True))
    return logits.astype(np.float32), labels


def test_a_few_wrong_rows_do_not_make_it_worse_than_pooling() -> None:
    unseen = pool_of(*easy(5000, 100))
    for seed in range(4):
        pool = pool_of(*easy(100, seed))
        plain, found = (
            log_loss(blend_prob(method(pool, Settings()), unseen), unseen.labels)
            for method in (geometric, stacking)
        )
        assert found == pytest.approx(plain, abs=1e-4)


@pytest.mark.parametrize(
    ("members", "classes", "matrices"),
    [(20, 10, 10), (20, 40, 10), (3, 10, 3), (20, 64, 4), (20, 128, 1), (20, 129, 0), (1, 2, 1)],
)
def test_matrices_are_few_where_classes_are_many(members: int, classes: int, matrices: int) -> None:
    assert matrices_for(members, classes) == matrices


def test_a_weight_is_the_scale_where_there_is_no_matrix() -> None:
    pool = pool_of(*made_up(4, 30, 129))
    combiner = stacking(pool, Settings()).combiner
    assert isinstance(combiner, Stacking)
    np.testing.assert_array_equal(combiner.weights, combiner.scales)
