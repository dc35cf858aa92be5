"""The certificate against the optimum of an independent convex solver, and closed forms."""

from __future__ import annotations

import math
from typing import Literal

import cvxpy as cp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldrace.ensemble import certify, greedy
from foldrace.ensemble.solvers.kernels import certificate, certified
from tests.conftest import examples


def loss(t: np.ndarray, weights: np.ndarray) -> float:
    return float(-np.log(weights @ np.clip(np.asarray(t, dtype=np.float64), 1e-15, 1)).mean())


def optimum(t: np.ndarray) -> np.ndarray:
    """The solver's weights, put back on the simplex: their loss is never below the minimum."""
    w = cp.Variable(len(t), nonneg=True)
    objective = cp.Maximize(cp.sum(cp.log(np.clip(t, 1e-15, 1).T @ w)) / t.shape[1])
    cp.Problem(objective, [cp.sum(w) == 1]).solve(solver=cp.CLARABEL)
    weights = np.maximum(np.asarray(w.value), 0)
    return weights / weights.sum()


values = st.one_of(
    st.floats(0.01, 1.0), st.sampled_from([0.0, 1e-30, 1e-15, 1e-9, 1e-3, 0.25, 0.5, 1.0])
)
matrices = st.tuples(st.integers(1, 6), st.integers(1, 8)).flatmap(
    lambda shape: st.lists(
        st.lists(values, min_size=shape[1], max_size=shape[1]),
        min_size=shape[0],
        max_size=shape[0],
    )
)


@settings(max_examples=examples(80), deadline=None)
@given(rows=matrices, repeat=st.booleans(), rounds=st.integers(1, 12))
def test_bounds_the_gap_to_the_optimum(rows: list[list[float]], repeat: bool, rounds: int) -> None:
    t = np.array(rows + rows[:1] if repeat else rows)
    got = greedy(t, max_rounds=rounds)
    assert got.loss == pytest.approx(loss(t, got.weights), abs=1e-12)
    try:
        best = loss(t, optimum(t))
    except (cp.SolverError, TypeError):  # the solver gives up on some extreme instances
        return
    assert got.loss - best <= got.certificate + 1e-10


@settings(max_examples=examples(150), deadline=None)
@given(rows=matrices, seed=st.integers(0, 2**32 - 1))
def test_bounds_the_gap_between_any_two_blends(rows: list[list[float]], seed: int) -> None:
    t, rng = np.array(rows), np.random.default_rng(seed)
    one, other = rng.dirichlet(np.full(len(t), 0.3), size=2)
    assert loss(t, one) - loss(t, other) <= certificate(t, one) + 1e-10


@pytest.mark.parametrize("seed", range(4))
def test_is_near_zero_at_the_optimum(seed: int) -> None:
    t = np.random.default_rng(seed).uniform(0.05, 1.0, size=(8, 60))
    assert certificate(t, optimum(t)) < 1e-5


def test_closed_form_of_two_rows() -> None:
    t = np.array([[0.9, 0.1], [0.1, 0.9]])
    assert certificate(t, [1.0, 0.0]) == pytest.approx(math.log((0.1 / 0.9 + 9) / 2))
    assert certificate(t, [0.5, 0.5]) == pytest.approx(0.0, abs=1e-15)


def test_is_never_negative() -> None:
    t = np.random.default_rng(0).uniform(size=(1, 1001)).astype(np.float32)
    assert 0.0 <= certificate(t, [1.0]) < 1e-13


def test_float32_members_are_certified_in_float64() -> None:
    t = np.random.default_rng(1).uniform(0.01, 1, size=(7, 5000)).astype(np.float32)
    w = np.full(7, 1 / 7)
    assert certificate(t, w) == certificate(t.astype(np.float64), w)


@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_blocks_do_not_change_the_result(backend: Literal["numba", "numpy"]) -> None:
    t = np.random.default_rng(2).uniform(0.01, 1, size=(40, 33_000))
    w = np.full(40, 1 / 40)
    expected = math.log((t / (w @ t)).mean(axis=1).max())
    assert certificate(t, w, backend) == pytest.approx(expected, abs=1e-13)


def test_certified_carries_loss_bound_and_path() -> None:
    t = np.array([[0.9, 0.1], [0.1, 0.9]])
    got = certified(t, [0.25, 0.75], path=[1, 0], path_losses=[0.5, 0.25])
    assert got.loss == pytest.approx(loss(t, got.weights))
    assert got.certificate == certify(t, got.weights)
    assert (got.path, got.path_losses) == ((1, 0), (0.5, 0.25))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.25, 0.25], r"shape \(3,\), should be \(2,\)"),
        ([1.5, -0.5], r"member 1: the weight is -0\.5"),
        ([math.nan, 0.5], "member 0: the weight is nan"),
        ([0.5, 0.4], r"sum to 0\.9, should sum to 1"),
    ],
)
def test_wrong_weights_are_named(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        certificate([[0.5], [0.5]], weights)
