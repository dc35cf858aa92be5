"""Poolings of logarithms: the members' product to fitted powers, and logistic regression.

Each takes a `Pool` and gives a `Fit`. Sources: Genest and Zidek, Combining Probability
Distributions: A Critique and an Annotated Bibliography, Statistical Science 1986, section 3;
Wolpert, Stacked Generalization, Neural Networks 1992. The penalty of `stacking` pulls toward
`geometric`, not toward no opinion.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from foldrace.ensemble.pool import Pool, distinct_members, own_losses
from foldrace.ensemble.pooling import Fit, GeometricMean, Settings, Stacking
from foldrace.ensemble.solvers.greedy import greedy
from foldrace.ensemble.solvers.log_linear import (
    LARGEST_SCALE,
    Coefficients,
    Objective,
    log_stack,
    minimise,
    row_losses,
    runner_up,
    scales_alone,
    thinned_rows,
)
from foldrace.ensemble.uncertainty import Groups, standard_error, whole_group_parts

_MOST_MEMBERS = 20
_SCREENED = 64
_SCREENED_NUMBERS = 1 << 24
"""Numbers in the stack of screened members: of more rows than that, some are left out."""
_LEAST = 1e-6
"""Least power of the heaviest member: with all powers 0 there would be nothing to predict from."""


def geometric(pool: Pool, settings: Settings) -> Fit:
    """Powers >= 0 of the least OOF loss, for at most 20 members or all that are forced.

    The powers need not sum to 1: their sum is the inverse of a temperature.
    """
    members, first = heaviest(pool, settings)
    stack, bounds = log_stack(pool, members), scale_bounds(members, settings)
    weights = np.zeros(len(pool.members))
    weights[members] = fit_powers(stack, pool.labels, bounds, first).scales
    return Fit(GeometricMean(weights))


def heaviest(pool: Pool, settings: Settings) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The members that move the logits most in the pooling of the screened ones, and their powers.

    The heaviest first. A product wants other members than a mean: those of the greedy blend alone
    gave a held-out loss of 0.546, these 0.494 (digits, 24 members, 1,437 rows).
    """
    screened = _screened(pool, settings)
    most = _SCREENED_NUMBERS // (len(screened) * pool.n_classes)
    rows = thinned_rows(pool, int(screened[0]), most)
    stack, bounds = log_stack(pool, screened, rows), scale_bounds(screened, settings)
    equal = np.clip(np.full(len(screened), 1.0 / len(screened)), *bounds.T)
    powers = fit_powers(stack, pool.labels[rows], bounds, equal).scales
    weights = powers * np.sqrt(np.square(stack).mean(axis=(1, 2)))
    is_forced = np.isin(screened, settings.forced)
    order = np.lexsort((-weights, ~is_forced))
    kept = order[: max(_MOST_MEMBERS, int(is_forced.sum()))]
    kept = kept[np.argsort(-weights[kept], kind="stable")]
    counts = (weights[kept] > 0.0) | is_forced[kept]
    counts[0] = True  # even where no member has an opinion on any row
    kept = kept[counts]
    return screened[kept], powers[kept]


def _screened(pool: Pool, settings: Settings) -> NDArray[np.intp]:
    """The best member first; forced ones, those of the greedy blend, and the best others.

    Until there are 64; no duplicates.
    """
    blend = greedy(
        pool.true_prob,
        max_rounds=settings.rounds,
        bags=settings.bags,
        forced=settings.forced,
    )
    members = distinct_members(pool, settings.forced)
    losses = own_losses(pool)[members]
    is_forced = np.isin(members, settings.forced)
    order = np.lexsort((losses, -blend.weights[members], ~is_forced))
    kept = order[: max(_SCREENED, int(is_forced.sum()))]
    return members[kept[np.argsort(losses[kept], kind="stable")]]


def scale_bounds(members: NDArray[np.intp], settings: Settings) -> NDArray[np.float64]:
    """(m, 2) the least and the largest power of each member."""
    least = np.where(np.isin(members, settings.forced), 1.0 / settings.rounds, 0.0)
    least[0] = max(least[0], _LEAST)
    return np.stack([least, np.full(len(members), LARGEST_SCALE)], axis=1)


def fit_powers(
    stack: NDArray[np.float32],
    labels: NDArray[np.int64],
    bounds: NDArray[np.float64],
    first: NDArray[np.float64],
) -> Coefficients:
    """Find the best powers of stack (m, N, C), starting from the powers `first` (m,)."""
    objective = Objective(stack, labels, bounds, runner_up=runner_up(stack, labels))
    return minimise(objective, scales_alone(first, stack.shape[2]))


_MOST_MATRICES = 10
_MOST_COEFFICIENTS = 1 << 14
"""Most coefficients in all: 10 members have a matrix up to C = 40, one up to C = 128, none
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
    groups = None if pool.groups is None else pool.groups[rows]
    penalty = chosen_penalty(stack[:, rows], pool.labels[rows], bounds, first, n_matrices, groups)
    others = runner_up(stack, pool.labels)
    found = fit_stacking(Objective(stack, pool.labels, bounds, penalty, others), first, n_matrices)
    return Fit(_combiner(found, members, len(pool.members)))


def matrices_for(n_members: int, n_classes: int) -> int:
    """Number of the members that have a matrix."""
    return min(n_members, _MOST_MATRICES, _MOST_COEFFICIENTS // n_classes**2)


def fit_stacking(objective: Objective, first: NDArray[np.float64], n_matrices: int) -> Coefficients:
    """Find the minimum with `n_matrices` matrices, starting from the scales `first` (m,).

    An infinite penalty: no matrices.
    """
    if math.isinf(objective.penalty):
        return fit_powers(objective.stack, objective.labels, objective.bounds, first)
    return minimise(objective, scales_alone(first, objective.stack.shape[2], n_matrices))


def chosen_penalty(
    stack: NDArray[np.float32],
    labels: NDArray[np.int64],
    bounds: NDArray[np.float64],
    first: NDArray[np.float64],
    n_matrices: int,
    groups: Groups = None,
) -> float:
    """The heaviest penalty whose cross-fitted loss is within one standard error of the least.

    On stack (m, N, C), tried from the heaviest down until the loss rises. Rows are dealt to the
    parts in turn, or whole groups, where there are several. Source of the rule: Breiman, Friedman,
    Olshen and Stone, Classification and Regression Trees, 1984; the error is that of the
    difference, row by row.
    """
    if len(labels) < _PARTS:
        return math.inf
    part = np.arange(len(labels)) % _PARTS
    if groups is not None and (groups != groups[0]).any():
        part = whole_group_parts(groups, _PARTS)
    sides = [(part != k, part == k) for k in range(int(part.max()) + 1)]
    others = runner_up(stack, labels)
    poolings = [fit_powers(stack[:, inside], labels[inside], bounds, first) for inside, _ in sides]
    fits = [scales_alone(pooling.scales, stack.shape[2], n_matrices) for pooling in poolings]
    tried = {math.inf: _held_losses(stack, labels, sides, fits)}
    least = math.inf
    for penalty in _PENALTIES:
        fits = [
            minimise(
                Objective(stack[:, inside], labels[inside], bounds, penalty, others[inside]), fit
            )
            for (inside, _), fit in zip(sides, fits, strict=True)
        ]
        tried[penalty] = _held_losses(stack, labels, sides, fits)
        if tried[penalty].mean() >= tried[least].mean():
            break
        least = penalty
    return next(p for p, losses in tried.items() if _within_chance(losses, tried[least], groups))


def _within_chance(losses: NDArray[np.float64], least: NDArray[np.float64], groups: Groups) -> bool:
    """Say whether the mean of losses (N,) is at most one standard error above the least."""
    worse = losses - least
    return bool(worse.mean() <= standard_error(worse, groups))


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
