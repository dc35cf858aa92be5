"""The optimum against an independent convex solver, against EM, and closed forms."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import cvxpy as cp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldrace.ensemble import Blend, certify, greedy, optimal
from foldrace.ensemble.solvers.active_set import nonneg_qp
from tests.conftest import examples

Backend = Literal["numba", "numpy"]
KINDS = ("plain", "zeros", "tiny", "grid", "scaled", "alike")


def clip(t: np.ndarray) -> np.ndarray:
    return np.maximum(np.asarray(t, dtype=np.float64), 1e-15)


def loss(t: np.ndarray, weights: np.ndarray) -> float:
    return float(-np.log(weights @ clip(t)).mean())


def solved(t: np.ndarray, lower: np.ndarray | None = None) -> float:
    """The least loss by an interior-point solver, at weights put back into the feasible set."""
    low = np.zeros(len(t)) if lower is None else lower
    w = cp.Variable(len(t), nonneg=True)
    objective = cp.Maximize(cp.sum(cp.log(clip(t).T @ (w + low))) / t.shape[1])
    problem = cp.Problem(objective, [cp.sum(w) == 1 - low.sum()])
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-9, tol_gap_rel=1e-9)
    free = np.maximum(np.asarray(w.value), 0)
    return loss(t, low + free * ((1 - low.sum()) / free.sum()))


def em(t: np.ndarray, steps: int) -> np.ndarray:
    """Weights (B, M) of a batch t (B, M, N): each step w_m *= mean(t_m / q) lowers the loss."""
    weights = np.full(t.shape[:2], 1 / t.shape[1])
    for _ in range(steps):
        mixed = np.einsum("bm,bmn->bn", weights, t)
        weights = weights * np.einsum("bmn,bn->bm", t, 1 / mixed) / t.shape[2]
        weights /= weights.sum(axis=1, keepdims=True)
    return weights


def draw(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Members (..., M, N) of one difficulty; often with exact duplicates or a hopeless row."""
    t = rng.random(shape)
    if kind == "zeros":
        t[rng.random(shape) < 0.5] = 0.0
    if kind == "tiny":
        t = 10.0 ** -rng.uniform(0, 20, shape)
    if kind == "grid":
        t = rng.choice([0.0, 1e-30, 1e-9, 0.25, 0.5, 1.0], shape)
    if kind == "scaled":
        t *= 10.0 ** -rng.uniform(0, 16, (*shape[:-1], 1))
    if kind == "alike":
        t = t[..., :1, :] * (1 - 1e-7 * rng.random(shape))
    if rng.random() < 0.3:
        t[..., -1, :] = t[..., 0, :]
    if rng.random() < 0.3:
        t[..., rng.integers(shape[-1])] = 0.0
    return t


def oof_like(members: int, rows: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    logits = rng.normal(2, 2, rows) + rng.normal(0, 1.2, (members, rows))
    logits += rng.normal(0, 1.0, (4, rows))[rng.integers(4, size=members)]
    return 1 / (1 + np.exp(-(logits + rng.normal(0, 0.5, (members, 1)))))


@settings(max_examples=examples(40), deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(KINDS),
    members=st.integers(1, 8),
    rows=st.integers(1, 8),
)
def test_no_gap_exceeds_the_certificate(seed: int, kind: str, members: int, rows: int) -> None:
    """50 instances an example, each with the optimum, a greedy and a random blend."""
    rng = np.random.default_rng(seed)
    batch = draw(rng, kind, (50, members, rows))
    for t, weights in zip(batch, em(clip(batch), 600), strict=True):
        best = loss(t, weights)
        found = optimal(t)
        assert found.certificate <= 1e-6
        assert found.loss == pytest.approx(loss(t, found.weights), abs=1e-12)
        assert found.loss - best <= found.certificate + 1e-12
        sparse = rng.dirichlet(np.full(members, 0.2))
        some = greedy(t, 1 + int(rng.integers(6)))
        assert loss(t, sparse) - min(best, found.loss) <= certify(t, sparse) + 1e-12
        assert some.loss - min(best, found.loss) <= some.certificate + 1e-12


@pytest.mark.parametrize("backend", ["numba", "numpy"])
@pytest.mark.parametrize(
    ("members", "rows", "seed"),
    [(1, 30, 0), (5, 1, 1), (40, 12, 2), (12, 300, 3), (60, 200, 4), (30, 800, 5)],
)
def test_agrees_with_a_convex_solver(members: int, rows: int, seed: int, backend: Backend) -> None:
    for t in (oof_like(members, rows, seed), np.random.default_rng(seed).random((members, rows))):
        found = optimal(t, backend=backend)
        assert found.certificate <= 1e-6
        assert abs(found.loss - solved(t)) <= 1e-6
        assert found.weights.sum() == pytest.approx(1.0, abs=1e-12)
        assert found.weights.min() >= 0.0


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_a_convex_solver_where_rows_are_hopeless(seed: int) -> None:
    rng = np.random.default_rng(seed)
    t = rng.random((8, 60))
    t[rng.random(t.shape) < 0.1] = 1e-6
    t[:, 7] = 1e-6
    assert abs(optimal(t).loss - solved(t)) <= 1e-6


@pytest.mark.parametrize("forced", [(3,), (0, 5), (7, 2, 7)])
@pytest.mark.parametrize("min_weight", [0.0, 0.05, 0.3])
def test_forced_members_have_their_weight(forced: tuple[int, ...], min_weight: float) -> None:
    t = oof_like(9, 150, 6)
    lower = np.zeros(9)
    lower[list(forced)] = min_weight
    found = optimal(t, forced=forced, min_weight=min_weight)
    assert (found.weights >= lower - 1e-15).all()
    assert found.weights.sum() == pytest.approx(1.0, abs=1e-12)
    assert found.certificate <= 1e-6
    assert found.loss == pytest.approx(loss(t, found.weights), abs=1e-12)
    assert abs(found.loss - solved(t, lower)) <= 1e-6


def test_forced_members_may_take_everything() -> None:
    t = oof_like(4, 50, 7)
    found = optimal(t, forced=(1, 2), min_weight=0.5)
    assert found.weights == pytest.approx([0.0, 0.5, 0.5, 0.0])
    assert found.certificate == pytest.approx(0.0, abs=1e-12)


def test_closed_form_of_two_members() -> None:
    # Rows of each kind in shares 2:1; weights (a, 1 - a) give a, 1 - a on them: a = 2/3.
    t = np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    found = optimal(t, tolerance=1e-12)
    assert found.weights == pytest.approx([2 / 3, 1 / 3], abs=1e-6)
    assert found.loss == pytest.approx(math.log(3) - 2 / 3 * math.log(2), abs=1e-12)


def test_a_row_that_only_a_bad_member_knows() -> None:
    """It is far from the best single ones, and has a weight all the same."""
    rng = np.random.default_rng(8)
    t = np.concatenate([rng.uniform(0.6, 0.9, (50, 400)), np.full((1, 400), 1e-9)])
    t[:50, 11], t[50, 11] = 0.0, 1.0
    found = optimal(t)
    assert found.weights[50] == pytest.approx(1 / 400, rel=1e-3)


@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_the_lowest_of_exact_duplicates_gets_all_the_weight(backend: Backend) -> None:
    t = oof_like(7, 300, 9)
    t[:, 5] = 0.0
    below = np.where(t == 0.0, 1e-30, t)  # the same once clipped
    plain = optimal(t, backend=backend)
    doubled = optimal(np.concatenate([t, t[::-1], below]), backend=backend)
    assert not doubled.weights[7:].any()
    np.testing.assert_allclose(doubled.weights[:7], plain.weights, atol=1e-3)
    assert doubled.loss == pytest.approx(plain.loss, abs=1e-6)


def test_a_thousand_equal_members_are_one() -> None:
    t = np.repeat(oof_like(1, 40, 10), 1000, axis=0)
    found = optimal(t)
    assert found.weights[0] == 1.0
    assert found.certificate == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9, 1e-12, 0.0])
def test_any_tolerance_ends_with_a_true_certificate(tolerance: float) -> None:
    rng = np.random.default_rng(11)
    for kind in KINDS:
        t = draw(rng, kind, (25, 40))
        found = optimal(t, tolerance=tolerance)
        assert found.certificate <= max(tolerance, 1e-10)
        assert found.certificate == pytest.approx(certify(t, found.weights), abs=1e-12)


def test_backends_find_the_same_optimum() -> None:
    t = oof_like(120, 900, 12).astype(np.float32)
    one, other = optimal(t, 1e-10, backend="numba"), optimal(t, 1e-10, backend="numpy")
    assert one.loss == pytest.approx(other.loss, abs=1e-10)
    np.testing.assert_allclose(one.weights, other.weights, atol=1e-4)


def test_no_blend_is_better_than_the_optimal_one() -> None:
    t = oof_like(40, 500, 13)
    assert optimal(t).loss <= greedy(t, 200).loss + 1e-6


def test_repeated_calls_agree_to_the_bit() -> None:
    t = oof_like(60, 700, 14).astype(np.float32)
    first, second = optimal(t), optimal(t.copy())
    assert first.weights.tolist() == second.weights.tolist()
    assert (first.loss, first.certificate) == (second.loss, second.certificate)


@pytest.mark.parametrize("method", [greedy, optimal])
@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_a_mapped_matrix_is_never_copied(
    method: Callable[..., Blend], backend: Backend, tmp_path: Path
) -> None:
    matrix = oof_like(1000, 4000, 15).astype(np.float32)
    np.save(tmp_path / "t.npy", matrix)
    mapped = np.load(tmp_path / "t.npy", mmap_mode="r")
    expected = method(matrix, backend=backend)  # also loads what is loaded once
    tracemalloc.start()
    found = method(mapped, backend=backend)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < matrix.nbytes
    assert found.weights.tolist() == expected.weights.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": -1.0}, r"tolerance is -1\.0, should be at least 0"),
        ({"tolerance": math.nan}, "tolerance is nan"),
        ({"forced": (0, 2)}, r"forced members \[2\] do not exist, should be in 0\.\.1"),
        ({"forced": (-1,)}, r"forced members \[-1\]"),
        ({"forced": (0, 1), "min_weight": 0.6}, r"min_weight is 0\.6, should be from 0 to 0\.5"),
        ({"forced": (0,), "min_weight": -0.1}, r"min_weight is -0\.1"),
        ({"forced": (0,), "min_weight": math.nan}, "min_weight is nan"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimal([[0.5], [0.25]], **options)  # type: ignore[arg-type]


def test_wrong_members_are_named() -> None:
    with pytest.raises(ValueError, match="member 1, row 1: nan is not a probability"):
        optimal([[0.5, 0.5], [0.5, math.nan]])


@settings(max_examples=examples(100), deadline=None)
@given(size=st.integers(1, 12), rank=st.integers(1, 14), seed=st.integers(0, 2**32 - 1))
def test_the_quadratic_step_meets_its_optimality_conditions(
    size: int, rank: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    factor = rng.uniform(0.1, 1, (size, rank)) * 10.0 ** rng.uniform(-6, 0, (size, 1))
    hessian, start = factor @ factor.T, rng.dirichlet(np.ones(size))
    linear = factor @ rng.normal(0.3, 1, rank)
    v = nonneg_qp(hessian, linear, start)
    scale = np.sqrt(np.diag(hessian))
    slope = (hessian @ v - linear) / scale
    near = 1e-7 * max(1.0, float(np.abs(linear / scale).max()), float((v * scale).max()))
    assert (v >= 0).all()
    assert (slope >= -near).all()
    assert (np.abs(slope[v * scale > 1e-7]) <= near).all()
