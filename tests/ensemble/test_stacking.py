"""Log-linear pooling and stacking."""

from __future__ import annotations

import math
import resource
import tracemalloc
from collections.abc import Callable

import cvxpy as cp
import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from sklearn.linear_model import LogisticRegression

import foldrace.ensemble.solvers.log_linear
import foldrace.ensemble.solvers.stacking
from foldrace.core.errors import EnvironmentProblem
from foldrace.core.metrics import log_loss
from foldrace.ensemble.pooling import Fit, Settings, Stacking, blend_prob
from foldrace.ensemble.solvers.greedy import greedy
from foldrace.ensemble.solvers.log_linear import (
    Coefficients,
    Objective,
    log_stack,
    row_losses,
    runner_up,
)
from foldrace.ensemble.solvers.stacking import (
    chosen_penalty,
    fit_powers,
    fit_stacking,
    geometric,
    heaviest,
    matrices_for,
    scale_bounds,
    stacking,
)
from tests.ensemble.member_pools import made_up, pool_of


def smoothed_targets(log_probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(N, C): one row more, shared by all rows, has the runner-up for its label."""
    rows, share = np.arange(len(labels)), 1.0 / (len(labels) + 1)
    others = log_probs.astype(np.float64).mean(axis=0)
    others[rows, labels] = -np.inf
    targets = np.zeros_like(others)
    targets[rows, labels] = 1.0 - share
    targets[rows, others.argmax(axis=1)] = share
    return targets


def solver_optimum(log_probs: np.ndarray, targets: np.ndarray, least: np.ndarray) -> float:
    """The least mean of log-sum-exp minus the logit of the targets."""
    powers = cp.Variable(len(log_probs))
    logits = sum(powers[m] * log_probs[m].astype(np.float64) for m in range(len(log_probs)))
    truth = cp.sum(cp.multiply(logits, targets), axis=1)
    loss = cp.sum(cp.log_sum_exp(logits, axis=1) - truth) / len(targets)
    problem = cp.Problem(cp.Minimize(loss), [powers >= least, powers <= 20])
    return float(problem.solve(solver=cp.CLARABEL))


@pytest.mark.parametrize("forced", [(), (1, 3)])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_a_convex_solver(forced: tuple[int, ...], seed: int) -> None:
    log_probs, labels = made_up(6, 50, 3, seed)
    pool, settings = pool_of(log_probs, labels), Settings(forced=forced, max_rounds=10)
    fit = geometric(pool, settings)
    members, _ = heaviest(pool, settings)
    least = np.where(np.isin(members, forced), 0.1, 0.0)
    targets = smoothed_targets(log_probs[members], labels)
    expected = solver_optimum(log_probs[members], targets, least)
    found = float(-(targets * np.log(blend_prob(fit, pool))).sum(axis=1).mean())
    assert found == pytest.approx(expected, abs=2e-6)
    assert (fit.combiner.weights[list(forced)] >= 0.1 - 1e-12).all()


def test_the_power_of_one_member_is_the_inverse_of_a_temperature() -> None:
    log_probs, labels = made_up(1, 300, 4)
    logs = log_probs[0].astype(np.float64)

    def loss(power: float) -> float:
        return float(
            np.mean(np.logaddexp.reduce(power * logs, axis=1) - power * logs[range(300), labels])
        )

    best = minimize_scalar(loss, bounds=(0, 20), method="bounded", options={"xatol": 1e-10})
    pool = pool_of(log_probs, labels)
    assert geometric(pool, Settings()).combiner.weights[0] == pytest.approx(best.x, abs=1e-3)


def test_members_that_err_apart_are_multiplied() -> None:
    """Two members with independent evidence: Bayes multiplies their likelihoods."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 20_000)
    evidence = rng.normal(2.0 * labels - 1.0, 1.5, (2, len(labels)))
    ratio = 2 * evidence / 1.5**2  # log of the likelihood ratio of class 1 to class 0
    log_probs = -np.logaddexp(0, np.stack([ratio, -ratio], axis=2))
    fit = geometric(pool_of(log_probs.astype(np.float32), labels), Settings())
    np.testing.assert_allclose(fit.combiner.weights, 1.0, atol=0.08)


def test_members_worse_than_chance_leave_the_constant() -> None:
    log_probs, labels = made_up(1, 100, 2)
    pool = pool_of(log_probs, 1 - labels)
    fit = geometric(pool, Settings())
    assert fit.used.tolist() == [0]
    assert log_loss(blend_prob(fit, pool), pool.labels) == pytest.approx(np.log(2), abs=1e-4)


def test_at_most_20_members_but_all_that_are_forced() -> None:
    pool = pool_of(*made_up(40, 30, 3))
    settings = Settings(max_rounds=400, forced=tuple(range(30)))
    assert sorted(heaviest(pool, settings)[0]) == list(range(30))
    assert 1 < len(heaviest(pool, Settings())[0]) <= 20
    assert 7 in heaviest(pool, Settings(forced=(7,)))[0]


def test_members_that_only_a_product_wants_are_found() -> None:
    """The mean has no use for a weak member beside a strong one, the product has."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 4000)
    noise = np.array([[0.8], [2.5], [2.5]])
    evidence = rng.normal(0, noise, (3, 4000)) + 2.0 * labels - 1.0
    ratio = 2 * evidence / noise**2
    log_probs = -np.logaddexp(0, np.stack([ratio, -ratio], axis=2)).astype(np.float32)
    pool = pool_of(log_probs, labels)
    assert greedy(pool.true_prob).weights[0] > 0.9
    fit = geometric(pool, Settings())
    np.testing.assert_allclose(fit.combiner.weights, 1.0, atol=0.25)


def test_the_rows_on_which_members_are_screened_may_be_thinned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = pool_of(*made_up(30, 600, 3))
    expected = log_loss(blend_prob(geometric(pool, Settings()), pool), pool.labels)
    monkeypatch.setattr(foldrace.ensemble.solvers.stacking, "_SCREENED_NUMBERS", 30 * 3 * 300)
    found = log_loss(blend_prob(geometric(pool, Settings()), pool), pool.labels)
    assert found == pytest.approx(expected, abs=0.01)


def test_a_stack_in_a_file_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    log_probs, labels = made_up(5, 70, 4)
    pool, members = pool_of(log_probs, labels), np.arange(5)
    bounds = scale_bounds(members, Settings())
    stack, first = log_stack(pool, members), np.full(5, 0.2)
    expected = fit_powers(stack, labels, bounds, first).scales
    monkeypatch.setattr(foldrace.ensemble.solvers.log_linear, "_IN_MEMORY", 0)
    monkeypatch.setattr(foldrace.ensemble.solvers.log_linear, "_BLOCK", 7 * 20 + 1)
    in_file = log_stack(pool, members)
    assert isinstance(in_file, np.memmap) and type(stack) is np.ndarray
    np.testing.assert_array_equal(in_file, stack)
    np.testing.assert_allclose(
        fit_powers(in_file, labels, bounds, first).scales, expected, atol=1e-3
    )


def test_a_stack_is_read_without_copies_of_all_rows_in_float64() -> None:
    log_probs, labels = made_up(2, 200_000, 4)
    pool = pool_of(log_probs, labels)
    tracemalloc.start()
    stack = log_stack(pool, np.arange(2))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    expected = log_probs - log_probs.mean(axis=2, keepdims=True, dtype=np.float64)
    np.testing.assert_allclose(stack, expected, atol=1e-6)
    assert peak < stack.nbytes + 3 * log_probs[0].nbytes


def test_no_room_for_the_file_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of(*made_up(5, 70, 4))
    monkeypatch.setattr(foldrace.ensemble.solvers.log_linear, "_IN_MEMORY", 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(EnvironmentProblem, match=r"file of 5,600 bytes cannot be .*TMPDIR"):
            log_stack(pool, np.arange(5))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("method", [geometric, stacking])
def test_members_without_an_opinion_still_make_a_blend(method: Callable[..., Fit]) -> None:
    labels = np.arange(30) % 3
    pool = pool_of(np.full((4, 30, 3), np.log(1 / 3), dtype=np.float32), labels)
    fit = method(pool, Settings())
    assert len(fit.used) == 1
    np.testing.assert_allclose(blend_prob(fit, pool), 1 / 3, atol=1e-6)


def test_a_forced_member_without_an_opinion_stays() -> None:
    log_probs, labels = made_up(4, 60, 3)
    log_probs[2] = np.log(1 / 3)
    settings = Settings(forced=(2,), max_rounds=10)
    assert 2 in geometric(pool_of(log_probs, labels), settings).used


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
    found = fit_stacking(
        Objective(stack, labels, np.zeros((members, 2)), penalty), np.zeros(members), members
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
    found = fit_stacking(Objective(stack, labels, np.zeros((2, 2)), 1.0), np.zeros(2), 2)
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
    problem = Objective(stack, labels, bounds, penalty, runner_up(stack, labels))
    found = fit_stacking(problem, np.full(len(members), 0.1), 2)
    np.testing.assert_allclose(probabilities(found, stack), blend_prob(expected, pool), atol=1e-3)


def test_the_further_row_is_one_row() -> None:
    """As many rows again, their labels the runners-up, that together weigh what one row does."""
    log_probs, labels = made_up(2, 90, 3)
    stack = log_stack(pool_of(log_probs, labels), np.arange(2))
    others = runner_up(stack, labels)
    assert (others != labels).all()
    found = fit_stacking(Objective(stack, labels, np.zeros((2, 2)), 3.0, others), np.zeros(2), 2)
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
