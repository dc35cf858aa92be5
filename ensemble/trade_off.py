"""Loss against a price: which members to take at rising budgets of one resource.

Takes true_prob (M, N) and `Limits`; gives a `Point` a budget at which the loss visibly falls.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ensemble.limits import Limits, Support, choose_support
from ensemble.optimal import optimal

_TOLERANCE = 1e-7
_LEAST_GAIN = 1e-9


@dataclass(frozen=True)
class Point:
    """The best blend found at one budget."""

    budget: float
    support: NDArray[np.intp]


def trade_off(
    true_prob: NDArray[np.floating],
    limits: Limits,
    resource: int,
    forced: Support = (),
    points: int = 12,
) -> list[Point]:
    """Supports at rising budgets of one resource, from the cheapest that works to what the blend
    without that limit needs; one that is no better than a cheaper one is left out."""
    costs = limits.costs[resource]
    free = choose_support(true_prob, limits.within(resource, np.inf), forced)
    least = float(costs[list(forced)].sum()) if forced else float(costs.min())
    most = max(float(costs[free].sum()), least)
    found: list[Point] = []
    best = np.inf
    for budget in np.geomspace(max(least, most * 1e-3), most, points):
        bounded = limits.within(resource, float(budget))
        if not forced and not any(bounded.admit((m,)) for m in range(len(true_prob))):
            continue
        support = choose_support(true_prob, bounded, forced)
        loss = optimal(true_prob[support], tolerance=_TOLERANCE).loss
        if loss < best - _LEAST_GAIN:
            found.append(Point(float(costs[support].sum()), support))
            best = loss
    return found
