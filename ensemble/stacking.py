"""A regularised multinomial logistic regression on the members' log-probabilities.

Takes a `Pool`, gives a `Fit`. Source: Wolpert, Stacked Generalization, Neural Networks 1992; the
penalty pulls toward the log-linear pooling of `ensemble.geometric`, not toward no opinion.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ensemble.combine import Stacking
from ensemble.fit import Fit, Settings
from ensemble.geometric import heaviest, pooled, scale_bounds
from ensemble.log_linear import Coefficients, Problem, log_stack, mean_loss, minimise
from ensemble.pool import Pool

_MOST_MEMBERS = 10
_MOST_COEFFICIENTS = 1 << 14
"""Of all matrices together: 10 members have one up to C = 40, one member up to C = 128, none
beyond. Members without a matrix still have their scale."""
_PENALTIES = (1e5, 1e4, 1e3, 1e2, 1e1, 1e0)
_PARTS = 3
_INNER_NUMBERS = 1 << 22
"""Numbers in the stack on which the penalty is chosen: more rows than that are thinned out. The
penalty is on the scale of the sum over rows, a prior on the coefficients, and so carries over."""


def stacking(pool: Pool, settings: Settings) -> Fit:
    """softmax(sum of a_m z_m + sum of z_m W_m + b) with a_m >= 0 and an L2 penalty on W and b.

    The 10 heaviest members of the greedy blend, and the forced ones, have a scale a_m, the first of
    them a matrix W_m (C, C). The penalty has the least loss in 3 inner parts of the pool's rows;
    where no finite one lowers it, W and b are 0.
    """
    members = heaviest(pool, settings, _MOST_MEMBERS)
    n_matrices = min(len(members), _MOST_COEFFICIENTS // pool.n_classes**2)
    bounds = scale_bounds(members, settings)
    stack = log_stack(pool, members)
    rows = _dealt_rows(pool, int(members[0]), _INNER_NUMBERS // (len(members) * pool.n_classes))
    penalty = chosen_penalty(stack[:, rows], pool.labels[rows], bounds, n_matrices)
    found = stacked(Problem(stack, pool.labels, bounds, penalty), n_matrices)
    return Fit(_combiner(found, members, len(pool.members)))


def stacked(problem: Problem, n_matrices: int) -> Coefficients:
    """The minimum with so many matrices, from the log-linear pooling on."""
    pooling = pooled(problem.stack, problem.labels, problem.bounds)
    start = _with_matrices(pooling, n_matrices)
    return minimise(problem, start) if math.isfinite(problem.penalty) else start


def chosen_penalty(
    stack: NDArray[np.float32],
    labels: NDArray[np.int64],
    bounds: NDArray[np.float64],
    n_matrices: int,
) -> float:
    """The penalty with the least cross-fitted loss on stack (m, N, C), whose rows are dealt to the
    parts in turn: from the heaviest one down, until the loss rises."""
    if len(labels) < _PARTS:
        return math.inf
    part = np.arange(len(labels)) % _PARTS
    sides = [(part != k, part == k) for k in range(_PARTS)]
    fits = [
        _with_matrices(pooled(stack[:, inside], labels[inside], bounds), n_matrices)
        for inside, _ in sides
    ]
    best, best_loss = math.inf, _held_loss(stack, labels, sides, fits)
    for penalty in _PENALTIES:
        fits = [
            minimise(Problem(stack[:, inside], labels[inside], bounds, penalty), fit)
            for (inside, _), fit in zip(sides, fits, strict=True)
        ]
        loss = _held_loss(stack, labels, sides, fits)
        if loss >= best_loss:
            break
        best, best_loss = penalty, loss
    return best


def _held_loss(
    stack: NDArray[np.float32],
    labels: NDArray[np.int64],
    sides: list[tuple[NDArray[np.bool_], NDArray[np.bool_]]],
    fits: list[Coefficients],
) -> float:
    """The mean over all rows, each under the fit that has not seen it."""
    return math.fsum(
        mean_loss(stack[:, outside], labels[outside], fit) * int(outside.sum())
        for (_, outside), fit in zip(sides, fits, strict=True)
    ) / len(labels)


def _dealt_rows(pool: Pool, member: int, most: int) -> NDArray[np.intp]:
    """At most so many rows, by class and by what the member gives to it: parts and thinning are
    fair, and the same whatever the order of the rows."""
    order = np.lexsort((pool.true_prob[member], pool.labels))
    return order[:: math.ceil(len(order) / max(1, most))]


def _with_matrices(pooling: Coefficients, n_matrices: int) -> Coefficients:
    n_classes = len(pooling.intercept)
    return Coefficients(
        pooling.scales, np.zeros((n_matrices, n_classes, n_classes)), pooling.intercept
    )


def _combiner(found: Coefficients, members: NDArray[np.intp], n_members: int) -> Stacking:
    """The coefficients at their members' places in the pool."""
    n_matrices, n_classes = found.matrices.shape[:2]
    scales, weights = np.zeros(n_members), np.zeros(n_members)
    scales[members] = weights[members] = found.scales
    whole = found.scales[:n_matrices, None, None] * np.eye(n_classes) + found.matrices
    weights[members[:n_matrices]] = np.sqrt((whole**2).sum(axis=(1, 2)) / n_classes)
    return Stacking(weights, scales, found.matrices, members[:n_matrices], found.intercept)
