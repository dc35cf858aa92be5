"""Our greedy and optimal blends, in a process of their own.

What numba has to compile or load is done before, on a small matrix; `first_call` is a process that
only makes a first call.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median

import numpy as np
from measured import Answer, Data, Prepared, Side, main
from numpy.typing import NDArray

from foldrace.ensemble import Blend, greedy, optimal
from foldrace.ensemble.solvers.kernels import Backend, MemberSums

_WARM = np.random.default_rng(0).uniform(0.1, 0.9, (60, 200)).astype(np.float32)
_READS = 7

Method = Callable[[NDArray[np.floating], int], Blend]


def _greedy(backend: Backend) -> Method:
    return lambda true_prob, rounds: greedy(true_prob, rounds, backend=backend)


def _optimal(backend: Backend) -> Method:
    return lambda true_prob, rounds: optimal(true_prob, tolerance=1e-6, backend=backend)


_METHODS: dict[str, Method] = {
    "greedy (numba)": _greedy("numba"),
    "greedy (numpy)": _greedy("numpy"),
    "optimal (numba)": _optimal("numba"),
    "optimal (numpy)": _optimal("numpy"),
}


def _side(method: Method) -> Side:
    def side(data: Data, rounds: int) -> Prepared:
        method(_WARM, 2)
        return Prepared(
            lambda: Answer(weights=method(data.true_prob, rounds).weights), data.true_prob.nbytes
        )

    return side


def _more(data: Data, name: str, rounds: int) -> dict[str, float]:
    """The certificate; passes: members read in a call / members there are; read_seconds: the matrix
    multiplied by a vector, which is bound by memory alone."""
    read = 0

    def counted(original: Callable[..., NDArray[np.float64]]) -> Callable[..., NDArray[np.float64]]:
        def count(
            sums: MemberSums, index: NDArray[np.intp], vector: NDArray[np.float64]
        ) -> NDArray[np.float64]:
            nonlocal read
            read += len(index)
            return original(sums, index, vector)

        return count

    for kernel in ("mean_logs", "mean_products"):
        setattr(MemberSums, kernel, counted(getattr(MemberSums, kernel)))
    blend = _METHODS[name](data.true_prob, rounds)
    return {
        "certificate": blend.certificate,
        "passes": read / len(data.true_prob),
        "read_seconds": _read_seconds(data.true_prob),
    }


def _read_seconds(matrix: NDArray[np.float32]) -> float:
    ones, times = np.ones(matrix.shape[1], dtype=np.float32), []
    for _ in range(_READS):
        mark = time.perf_counter()
        matrix @ ones
        times.append(time.perf_counter() - mark)
    return median(times)


if __name__ == "__main__":
    if sys.argv[1] == "first_call":
        mark = time.perf_counter()
        _METHODS[sys.argv[2]](_WARM, 2)
        print(time.perf_counter() - mark)
    else:
        main({name: _side(method) for name, method in _METHODS.items()}, _more)
