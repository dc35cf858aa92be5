"""Loss against a price: which members to take at rising budgets of one resource.

Takes true_prob (M, N) and `Limits`; gives a `Point` for each budget at which the loss visibly
falls.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ensemble.limits import Limits, Support
from ensemble.support_search import SupportSearch

VISIBLE = 1e-4
"""Of the loss before: a point that gains less says nothing to who reads four digits."""


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
    without that limit needs; one that is not visibly better than a cheaper one is left out."""
    costs, free = limits.costs[resource], limits.within(resource, np.inf)
    search = SupportSearch(true_prob, free, forced)
    support = search.best(free)
    most = float(costs[list(support)].sum())
    least = float(costs[list(forced)].sum()) if forced else float(costs.min())
    found = [support]
    for budget in np.geomspace(max(least, most * 1e-3), most, points)[-2::-1]:
        bounded = limits.within(resource, float(budget))
        if bounded.admit(support):  # the best of more is still the best
            continue
        if not forced and not bounded.room(()).any():
            break
        support = search.best(bounded, near=support)
        found.append(support)
    best, kept = np.inf, []
    for support in reversed(found):
        if search.loss(support) < best * (1.0 - VISIBLE):
            best = search.loss(support)
            kept.append(Point(float(costs[list(support)].sum()), np.array(support, dtype=np.intp)))
    return kept
