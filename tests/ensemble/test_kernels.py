"""The sums over rows by two backends, and the certificate made of them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import cvxpy as cp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldrace.ensemble import certify, greedy, optimal
from foldrace.ensemble.solvers.kernels import BLOCK, certificate, certified, member_sums
from tests.conftest import examples

Backend = Literal["numba", "numpy"]
BACKENDS: tuple[Backend, ...] = ("numba", "numpy")


def random_members(members: int, rows: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    t = rng.uniform(size=(members, rows)) ** rng.choice([0.1, 1, 30], (members, rows))
    t[rng.random(t.shape) < 0.1] = 0.0
    t[rng.random(t.shape) < 0.1] = 1e-30
    t[rng.random(t.shape) < 0.1] = 1.0
    return t


def expected_logs(t: np.ndarray, offset: np.ndarray) -> np.ndarray:
    wide = np.maximum(t.astype(np.longdouble), np.longdouble(1e-15))
    return np.log(wide + offset.astype(np.longdouble)).mean(axis=1).astype(np.float64)


@settings(max_examples=examples(60), deadline=None)
@given(
    rows=st.one_of(st.integers(1, 70), st.sampled_from([1023, 1024, 1025, 2047, 2049, 3111])),
    seed=st.integers(0, 2**32 - 1),
    reach=st.sampled_from([0.0, 1e-15, 1e-3, 1.0, 50.0, 1e5]),
    single=st.booleans(),
    backend=st.sampled_from(BACKENDS),
)
def test_sums_are_exact_to_rounding(
    rows: int, seed: int, reach: float, single: bool, backend: Backend
) -> None:
    rng = np.random.default_rng(seed)
    t = random_members(5, rows, seed).astype(np.float32 if single else np.float64)
    index, vector = rng.permutation(5)[:3], reach * rng.uniform(size=rows)
    sums = member_sums(t, backend)
    np.testing.assert_allclose(
        sums.mean_logs(index, vector), expected_logs(t[index], vector), rtol=1e-13, atol=1e-13
    )
    wide = np.maximum(t[index].astype(np.longdouble), np.longdouble(1e-15))
    np.testing.assert_allclose(
        sums.mean_products(index, vector),
        (wide * vector).mean(axis=1).astype(np.float64),
        rtol=1e-13,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 16, 17, 1024, 2000])
def test_nothing_but_clipped_zeros_neither_underflows_nor_overflows(
    backend: Backend, rows: int
) -> None:
    zeros, every = member_sums(np.zeros((2, rows)), backend), np.arange(2)
    assert zeros.mean_logs(every, np.zeros(rows)) == pytest.approx(np.log(1e-15), rel=1e-14)
    assert zeros.mean_logs(every, np.full(rows, 1e5)) == pytest.approx(np.log(1e5), rel=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_layout_and_threads_do_not_matter(
    backend: Backend, dtype: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = random_members(90, 2 * BLOCK // 30, 1).astype(dtype)
    np.save(tmp_path / "t.npy", t)
    wide = np.repeat(t, 2, axis=1)
    read_only = t.copy()
    read_only.flags.writeable = False
    layouts = {
        "memory-mapped": np.load(tmp_path / "t.npy", mmap_mode="r"),
        "strided": wide[:, ::2],
        "columns": np.asfortranarray(t),
        "part of a row": np.concatenate([t, t], axis=1)[:, : t.shape[1]],
        "read-only": read_only,
        "backwards": t[::-1][::-1],
    }
    index, vector = np.arange(90)[::-2], np.random.default_rng(2).uniform(size=t.shape[1])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sums = member_sums(t, backend)
    logs, products = sums.mean_logs(index, vector), sums.mean_products(index, vector)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    for name, members in layouts.items():
        other = member_sums(members, backend)
        np.testing.assert_array_equal(other.mean_logs(index, vector), logs, err_msg=name)
        np.testing.assert_array_equal(other.mean_products(index, vector), products, err_msg=name)
    assert t.flags.writeable


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_threads_may_call_at_once(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    t = random_members(300, 3000, 3).astype(np.float32)

    def both(_: int) -> tuple[list[float], list[float]]:
        first, second = greedy(t, 5, backend=backend), optimal(t, backend=backend)
        return first.weights.tolist(), second.weights.tolist()

    alone = both(0)
    with ThreadPoolExecutor(4) as threads:
        assert all(result == alone for result in threads.map(both, range(8)))


def test_small_problems_load_no_numba_and_large_ones_use_it() -> None:
    assert member_sums(np.zeros((10, 100), np.float32)).backend == "numpy"
    assert member_sums(np.zeros((1000, 5000), np.float32)).backend == "numba"
    code = (
        "import sys, numpy; from foldrace import ensemble;"
        "t = numpy.random.default_rng(0).uniform(size=(20, 500));"
        "ensemble.optimal(t), ensemble.certify(t, ensemble.greedy(t).weights);"
        "print(sorted({'numba', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


SUMS = """
import resource, sys, numpy
from foldrace.ensemble.solvers.kernels import member_sums
if sys.argv[1:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sums = member_sums(numpy.full((3, 40), 0.5), "numba")
for _ in range(2):
    print(*sums.mean_logs(numpy.arange(2), numpy.full(40, 0.5)))
    print(*sums.mean_products(numpy.arange(2), numpy.full(40, 0.5)))
"""


def sums_with_cache(folder: Path, *limit: str) -> str:
    """What a new process prints that keeps numba's machine code in the folder."""
    done = subprocess.run(
        [sys.executable, "-c", SUMS, *limit],
        capture_output=True,
        text=True,
        env={**os.environ, "NUMBA_CACHE_DIR": str(folder)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_full_disk_or_a_damaged_cache_costs_time_alone(tmp_path: Path) -> None:
    expected = "0.0 0.0\n0.25 0.25\n" * 2
    assert sums_with_cache(tmp_path / "full", "100") == expected
    assert sums_with_cache(tmp_path / "damaged") == expected
    files = [path for path in (tmp_path / "damaged").rglob("*.nb?") if path.stat().st_size > 20]
    assert {path.suffix for path in files} == {".nbi", ".nbc"}
    for path in files:
        path.write_bytes(path.read_bytes()[:20])
    assert sums_with_cache(tmp_path / "damaged") == expected


def test_an_unknown_backend_is_named() -> None:
    for function in (greedy, optimal):
        with pytest.raises(ValueError, match="backend is 'cuda', should be 'numba', 'numpy' or"):
            function([[0.5]], backend="cuda")  # type: ignore[operator]
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        certify([[0.5]], [1.0], backend="cuda")  # type: ignore[arg-type]


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
