"""Log-linear pooling against a convex solver and closed forms."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from ensemble import log_linear
from ensemble.fit import Settings, blend_prob
from ensemble.geometric import geometric, heaviest, pooled, scale_bounds
from ensemble.log_linear import log_stack
from experiment.metrics import log_loss
from tests.ensemble.member_pools import made_up, pool_of


def solver_optimum(log_probs: np.ndarray, labels: np.ndarray, least: np.ndarray) -> float:
    """The least mean of log-sum-exp minus the logit of the truth."""
    powers = cp.Variable(len(log_probs))
    logits = sum(powers[m] * log_probs[m].astype(np.float64) for m in range(len(log_probs)))
    truth = cp.sum(cp.multiply(logits, np.eye(logits.shape[1])[labels]), axis=1)
    loss = cp.sum(cp.log_sum_exp(logits, axis=1) - truth) / len(labels)
    problem = cp.Problem(cp.Minimize(loss), [powers >= least, powers <= 20])
    return float(problem.solve(solver=cp.CLARABEL))


@pytest.mark.parametrize("forced", [(), (1, 3)])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_a_convex_solver(forced: tuple[int, ...], seed: int) -> None:
    log_probs, labels = made_up(6, 50, 3, seed)
    pool, settings = pool_of(log_probs, labels), Settings(forced=forced, max_rounds=10)
    fit = geometric(pool, settings)
    members = heaviest(pool, settings, 20)
    least = np.where(np.isin(members, forced), 0.1, 0.0)
    expected = solver_optimum(log_probs[members], labels, least)
    assert log_loss(blend_prob(fit, pool), labels) == pytest.approx(expected, abs=2e-6)
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
    assert sorted(heaviest(pool, settings, 20)) == list(range(30))
    assert len(heaviest(pool, Settings(bags=20, max_rounds=400), 10)) == 10
    few = heaviest(pool, Settings(forced=(7,)), 2)
    assert len(few) == 2 and 7 in few


def test_a_stack_in_a_file_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    log_probs, labels = made_up(5, 70, 4)
    pool, members = pool_of(log_probs, labels), np.arange(5)
    bounds = scale_bounds(members, Settings())
    stack = log_stack(pool, members)
    expected = pooled(stack, labels, bounds).scales
    monkeypatch.setattr(log_linear, "_IN_MEMORY", 0)
    monkeypatch.setattr(log_linear, "_BLOCK", 7 * 20 + 1)
    in_file = log_stack(pool, members)
    assert isinstance(in_file, np.memmap) and type(stack) is np.ndarray
    np.testing.assert_array_equal(in_file, stack)
    np.testing.assert_allclose(pooled(in_file, labels, bounds).scales, expected, atol=1e-3)
