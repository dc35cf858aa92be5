"""Log-linear pooling: the product of the members' probabilities, each to a power of its own.

Takes a `Pool`, gives a `Fit`. Source: Genest and Zidek, Combining Probability Distributions: A
Critique and an Annotated Bibliography, Statistical Science 1986, section 3.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ensemble.combine import GeometricMean
from ensemble.fit import Fit, Settings
from ensemble.greedy import greedy
from ensemble.log_linear import LARGEST_SCALE, Coefficients, Problem, log_stack, minimise
from ensemble.pool import Pool

_MOST_MEMBERS = 20
_LEAST = 1e-6
"""Of the heaviest member: with all powers 0 there would be nothing to predict from."""


def geometric(pool: Pool, settings: Settings) -> Fit:
    """Powers >= 0 of the least OOF loss, for the 20 heaviest members of the greedy blend and the
    forced ones. The powers need not sum to 1: their sum is the inverse of a temperature."""
    members = heaviest(pool, settings, _MOST_MEMBERS)
    found = pooled(log_stack(pool, members), pool.labels, scale_bounds(members, settings))
    weights = np.zeros(len(pool.members))
    weights[members] = found.scales
    return Fit(GeometricMean(weights))


def heaviest(pool: Pool, settings: Settings, most: int) -> NDArray[np.intp]:
    """The heaviest members of the greedy blend first, at most so many or all that are forced."""
    blend = greedy(
        pool.true_prob,
        max_rounds=settings.max_rounds,
        bags=settings.bags,
        forced=settings.forced,
        seed=settings.seed,
    )
    used = np.flatnonzero(blend.weights)
    is_forced = np.isin(used, settings.forced)
    first = used[np.lexsort((-blend.weights[used], ~is_forced))]
    kept = first[: max(most, int(is_forced.sum()))]
    return kept[np.argsort(-blend.weights[kept], kind="stable")]


def scale_bounds(members: NDArray[np.intp], settings: Settings) -> NDArray[np.float64]:
    """(m, 2) the least and the largest power of each member."""
    least = np.where(np.isin(members, settings.forced), 1.0 / settings.max_rounds, 0.0)
    least[0] = max(least[0], _LEAST)
    return np.stack([least, np.full(len(members), LARGEST_SCALE)], axis=1)


def pooled(
    stack: NDArray[np.float32], labels: NDArray[np.int64], bounds: NDArray[np.float64]
) -> Coefficients:
    """Scales alone, for stack (m, N, C)."""
    m, _, n_classes = stack.shape
    start = Coefficients(
        np.clip(np.full(m, 1.0 / m), *bounds.T), np.zeros((0, n_classes, n_classes)),
        np.zeros(n_classes),
    )  # fmt: skip
    return minimise(Problem(stack, labels, bounds), start)
