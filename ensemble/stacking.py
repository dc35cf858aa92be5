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
from ensemble.log_linear import Coefficients, Problem, minimise, row_losses, runner_up, scales_alone
from ensemble.log_stack import log_stack, thinned_rows
from ensemble.pool import Pool

_MOST_MATRICES = 10
_MOST_COEFFICIENTS = 1 << 14
"""Of all matrices together: 10 members have one up to C = 40, one member up to C = 128, none
beyond. Members without a matrix still have their scale."""
_PENALTIES = (1e5, 3e4, 1e4, 3e3, 1e3)
"""Lighter ones never gave the least held-out loss on real members, and where few rows are wrong the
inner parts cannot tell: 1e1 and 1e0 were chosen there for twice the loss."""
_PARTS = 3
_INNER_NUMBERS = 1 << 22
"""Numbers in the stack on which the penalty is chosen: more rows than that are thinned out. The
penalty is on the scale of the sum over rows, a prior on the coefficients, and so carries over."""


def stacking(pool: Pool, settings: Settings) -> Fit:
    """softmax(sum of a_m z_m + sum of z_m W_m + b) with a_m >= 0 and an L2 penalty on W and b.

    The members of the log-linear pooling have a scale a_m, the heaviest 10 of them a matrix W_m
    (C, C). The penalty is chosen by the loss in 3 inner parts of the pool's rows; where none lowers
    it by more than chance, W and b are 0.
    """
    members, first = heaviest(pool, settings)
    n_matrices = matrices_for(len(members), pool.n_classes)
    bounds = scale_bounds(members, settings)
    stack = log_stack(pool, members)
    rows = thinned_rows(pool, int(members[0]), _INNER_NUMBERS // (len(members) * pool.n_classes))
    penalty = chosen_penalty(stack[:, rows], pool.labels[rows], bounds, first, n_matrices)
    others = runner_up(stack, pool.labels)
    found = stacked(Problem(stack, pool.labels, bounds, penalty, others), first, n_matrices)
    return Fit(_combiner(found, members, len(pool.members)))


def matrices_for(n_members: int, n_classes: int) -> int:
    """How many of the members have a matrix."""
    return min(n_members, _MOST_MATRICES, _MOST_COEFFICIENTS // n_classes**2)


def stacked(problem: Problem, first: NDArray[np.float64], n_matrices: int) -> Coefficients:
    """The minimum with so many matrices, none where the penalty is infinite, sought from the scales
    `first` (m,)."""
    if math.isinf(problem.penalty):
        return pooled(problem.stack, problem.labels, problem.bounds, first)
    return minimise(problem, scales_alone(first, problem.stack.shape[2], n_matrices))


def chosen_penalty(
    stack: NDArray[np.float32],
    labels: NDArray[np.int64],
    bounds: NDArray[np.float64],
    first: NDArray[np.float64],
    n_matrices: int,
) -> float:
    """The heaviest penalty whose cross-fitted loss on stack (m, N, C) is within one standard error
    of the least, tried from the heaviest down until the loss rises. Rows are dealt to the parts in
    turn. Source of the rule: Breiman, Friedman, Olshen and Stone, Classification and Regression
    Trees, 1984; the error is that of the difference, row by row.
    """
    if len(labels) < _PARTS:
        return math.inf
    part = np.arange(len(labels)) % _PARTS
    sides = [(part != k, part == k) for k in range(_PARTS)]
    others = runner_up(stack, labels)
    poolings = [pooled(stack[:, inside], labels[inside], bounds, first) for inside, _ in sides]
    fits = [scales_alone(pooling.scales, stack.shape[2], n_matrices) for pooling in poolings]
    tried = {math.inf: _held_losses(stack, labels, sides, fits)}
    least = math.inf
    for penalty in _PENALTIES:
        fits = [
            minimise(
                Problem(stack[:, inside], labels[inside], bounds, penalty, others[inside]), fit
            )
            for (inside, _), fit in zip(sides, fits, strict=True)
        ]
        tried[penalty] = _held_losses(stack, labels, sides, fits)
        if tried[penalty].mean() >= tried[least].mean():
            break
        least = penalty
    return next(p for p, losses in tried.items() if _within_chance(losses, tried[least]))


def _within_chance(losses: NDArray[np.float64], least: NDArray[np.float64]) -> bool:
    """Whether the mean of losses (N,) is no more than one standard error above the least."""
    worse = losses - least
    return bool(worse.mean() <= worse.std(ddof=1) / math.sqrt(len(worse)))


def _held_losses(
    stack: NDArray[np.float32],
    labels: NDArray[np.int64],
    sides: list[tuple[NDArray[np.bool_], NDArray[np.bool_]]],
    fits: list[Coefficients],
) -> NDArray[np.float64]:
    """(N,) each row's loss under the fit that has not seen it."""
    losses = np.empty(len(labels))
    for (_, outside), fit in zip(sides, fits, strict=True):
        losses[outside] = row_losses(stack[:, outside], labels[outside], fit)
    return losses


def _combiner(found: Coefficients, members: NDArray[np.intp], n_members: int) -> Stacking:
    """The coefficients at their members' places in the pool."""
    n_matrices, n_classes = found.matrices.shape[:2]
    scales, weights = np.zeros(n_members), np.zeros(n_members)
    scales[members] = weights[members] = found.scales
    whole = found.scales[:n_matrices, None, None] * np.eye(n_classes) + found.matrices
    weights[members[:n_matrices]] = np.sqrt((whole**2).sum(axis=(1, 2)) / n_classes)
    return Stacking(weights, scales, found.matrices, members[:n_matrices], found.intercept)
