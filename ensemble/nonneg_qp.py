"""min 1/2 v'Hv - b'v over v >= 0, for a positive semidefinite H of up to a few hundred members.

The step of `ensemble.optimal`. Source: Lawson and Hanson, Solving Least Squares Problems, 1974,
23.3 (NNLS), on H itself instead of its Cholesky factor and started from the last weights.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_RIDGE = 1e-13
"""Of a diagonal of ones: keeps H invertible where columns are (nearly) dependent."""
_DUAL = 1e-11
"""Of the largest entry of b: a smaller slope is rounding."""
_TINY = 1e-300


def nonneg_qp(hessian: Floats, linear: Floats, start: Floats) -> Floats:
    """(k,) the minimiser for hessian (k, k) and linear (k,), searched from start (k,) >= 0.

    Each step lowers the objective, so that a search that is cut off still gives a feasible v that
    is no worse than the start. A small multiple of |v - start|^2 is added to the objective: it
    moves no minimiser that is also the start.
    """
    scale = 1.0 / np.sqrt(np.diag(hessian))  # members of 1e-15 beside members of 1
    h = hessian * np.outer(scale, scale)
    h[np.diag_indices_from(h)] += _RIDGE
    x = start / scale
    b = linear * scale + _RIDGE * x
    free = x > 0.0
    for _ in range(3 * len(x) + 10):
        x, free = _minimise_on(h, b, x, free)
        dual = np.where(free, 0.0, b - h @ x)
        worst = int(dual.argmax())
        if dual[worst] <= _DUAL * np.abs(b).max():
            break
        free[worst] = True
    return np.asarray(x * scale)


def _minimise_on(
    h: Floats, b: Floats, x: Floats, free: NDArray[np.bool_]
) -> tuple[Floats, NDArray[np.bool_]]:
    """The minimiser over the free members, freeing no other: those that reach 0 leave."""
    free = free.copy()
    while free.any():
        target = np.zeros_like(x)
        target[free] = _solve(h[np.ix_(free, free)], b[free])
        if (target[free] > 0.0).all():
            return target, free
        falling = free & (target <= 0.0)
        ratio = np.full(len(x), np.inf)
        ratio[falling] = x[falling] / np.maximum(x[falling] - target[falling], _TINY)
        step = ratio.min()
        x = np.where(free, x + step * (target - x), 0.0)
        free &= ratio > step
        x[~free] = 0.0
    return np.zeros_like(x), free


def _solve(h: Floats, b: Floats) -> Floats:
    try:
        return np.asarray(np.linalg.solve(h, b))
    except np.linalg.LinAlgError:
        return np.asarray(np.linalg.lstsq(h, b)[0])
