"""The best weights of a few members: sequential quadratic programming on the log loss.

Takes an `Active` set of members and weights on it; gives weights whose certificate within the set
is at most a tolerance. `foldrace.ensemble.solvers.optimal` decides who is in the set. Source of
`nonneg_qp`: Lawson and Hanson, Solving Least Squares Problems, 1974, 23.3 (NNLS), on H itself
instead of its Cholesky factor and started from the last weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foldrace.ensemble.blend import clipped, mixture
from foldrace.ensemble.solvers.kernels import BLOCK

Floats = NDArray[np.float64]

_RIDGE = 1e-13
"""Added to a diagonal of ones: keeps H invertible where columns are (nearly) dependent."""
_DUAL = 1e-11
"""Relative to the largest entry of b: a smaller slope is rounding."""
_TINY = 1e-300


def nonneg_qp(hessian: Floats, linear: Floats, start: Floats) -> Floats:
    """Minimise 1/2 v'Hv - b'v over v >= 0: (k,) for hessian (k, k), linear (k,), start (k,) >= 0.

    H is positive semidefinite, of up to a few hundred members. Each step lowers the objective, so
    that a search that is cut off still gives a feasible v that is no worse than the start. A small
    multiple of |v - start|^2 is added to the objective: it moves no minimiser that is also the
    start.
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


_STEPS = 60
"""Far more than needed where rounding does not interfere: convergence is quadratic."""
_SEARCH_STEPS = 100
"""Half of them halve the bracket: enough for any float64."""
_BLAS_ALONE = 1 << 17
"""Multiplications; OpenBLAS starts threads from twice as many."""
_TILE = 64
"""Members on a side of one product."""
ROUNDING = 1e-14
"""Losses closer than this, in nats, are equal."""


@dataclass(frozen=True, eq=False)
class Active:
    """Mixtures q = fixed + share * (v @ members) with v on the simplex."""

    members: NDArray[np.floating]  # (k, N)
    fixed: Floats  # (N,) the part of the mixture that v has no say in
    share: float  # what v may give away: 1 where nothing is fixed

    def mixed(self, v: Floats) -> Floats:
        """(N,) q at v (k,)."""
        mixed = mixture(self.members, v)
        mixed *= self.share
        mixed += self.fixed
        return mixed

    def hessian(self, mixed: Floats) -> Floats:
        """(k, k) mean_i r_ai r_bi with r_a = (fixed + share * t_a) / q: of -mean log q in v."""
        k, n_rows = self.members.shape
        step = max(1, BLOCK // k)
        total = np.zeros((k, k))
        for start in range(0, n_rows, step):
            rows = slice(start, start + step)
            ratios = clipped(self.members[:, rows])
            ratios *= self.share
            ratios += self.fixed[rows]
            ratios /= mixed[rows]
            _add_gram(ratios, total)
        return np.asarray(total / n_rows)


def _add_gram(ratios: Floats, total: Floats) -> None:
    """Add ratios @ ratios.T of ratios (k, n) to total (k, k), in small products.

    Too small for BLAS to share among threads: on a busy machine those wait for each other a hundred
    times longer.
    """
    k, n_rows = ratios.shape
    tiles = [slice(first, first + _TILE) for first in range(0, k, _TILE)]
    step = _BLAS_ALONE // min(k, _TILE) ** 2
    for start in range(0, n_rows, step):
        part = ratios[:, start : start + step]
        for a in tiles:
            for b in tiles:
                total[a, b] += part[a] @ part[b].T


def settle(active: Active, v: Floats, tolerance: float) -> Floats:
    """(k,) weights from which no member of the set lowers the loss by more than tolerance (nats).

    As far as rounding allows; never a higher loss than at v (k,).

    The minimum of mean(-log q(v)) + sum(v) over v >= 0 lies on the simplex, so a step needs no
    equality: with slopes g = Hv it goes to the minimiser of 1/2 u'Hu - (2g - 1)'u over u >= 0,
    scaled to the simplex, or to the best point on the way there.
    """
    mixed = active.mixed(v)
    loss, bound = _loss(mixed), np.inf
    for _ in range(_STEPS):
        hessian = active.hessian(mixed)
        slopes = hessian @ v  # since v @ ratios = 1 on every row
        before, bound = bound, float(slopes.max()) - 1.0
        if bound <= tolerance:
            break
        target = nonneg_qp(hessian, 2.0 * slopes - 1.0, v)
        target /= target.sum()
        aim = active.mixed(target)
        if _loss(aim) > loss + ROUNDING:
            step = line_search(mixed, aim)
            target = (1.0 - step) * v + step * target
            aim = active.mixed(target)
        gained = loss - _loss(aim)
        if gained < -ROUNDING or (gained < ROUNDING and bound >= before):
            break
        v, mixed, loss = target, aim, loss - gained
    return v


def line_search(here: Floats, there: Floats) -> float:
    """The step in [0, 1] from mixture here (N,) to there (N,) with the least log loss.

    The loss is convex on the way, and steep near rows that `there` gives nothing. So Newton on its
    slope takes turns with halving the bracket, until what is left to gain is below rounding.
    """
    way = there - here
    low, high, step = 0.0, 1.0, 1.0
    for turn in range(_SEARCH_STEPS):
        ratio = way / (here + step * way)
        slope = float(ratio.mean())  # of the gain
        if slope >= 0.0:
            low = step
            if slope * (high - step) <= ROUNDING:
                break
        else:
            high = step
        newton = step + slope / max(float((ratio * ratio).mean()), 1e-300)
        halve = turn % 2 == 0 or not low < newton < high
        step = (low + high) / 2.0 if halve else newton
    return low


def _loss(mixed: Floats) -> float:
    return -float(np.log(mixed).mean())
