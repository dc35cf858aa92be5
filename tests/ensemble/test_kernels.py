"""Both backends against sums in extended precision, whatever the layout of the members."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldrace.ensemble import certify, greedy, optimal
from foldrace.ensemble.solvers.kernels import BLOCK, member_sums
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
from tests.conftest import examples
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
