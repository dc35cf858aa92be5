"""Any method within limits, and the loss at rising budgets of one resource.

Takes a `Pool`, `Settings` and `Limits`; gives a `Fit` over all members of the pool. Where the own
choice of a method is beyond the limits, the members that fit are chosen first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from foldrace.core.plugins import NO_PARTS, Parts
from foldrace.ensemble.blend import Blend
from foldrace.ensemble.limits import Limits, Support, SupportSearch, choose_support
from foldrace.ensemble.methods import METHODS, Method, fit_method
from foldrace.ensemble.pool import Pool
from foldrace.ensemble.pooling import Fit, Settings, spread
from foldrace.ensemble.solvers.kernels import certified

VISIBLE = 1e-4
"""Relative to the loss before: who reads four digits does not see a smaller gain."""


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
    """Find supports at rising budgets of one resource.

    From the cheapest that works to what the blend without that limit needs; one that is not visibly
    better than a cheaper one is left out.
    """
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


def fit_within(
    method: str, pool: Pool, settings: Settings, limits: Limits, parts: Parts = NO_PARTS
) -> Fit:
    """Fit the method to all members, or to those that the limits allow.

    Where the limits admit what it uses of all members, that is the fit; else it combines the
    members that `choose_support` picks. Its certificate compares with the best blend of all members
    of the pool: the limits' price is in it.
    """
    free = fit_method(method, pool, settings, parts)
    if limits.admit(tuple(free.used.tolist())):
        return free
    usable = _usable_members(parts[METHODS][method], pool, limits, settings)
    support = choose_support(usable.true_prob, usable.limits, usable.forced)
    return fit_on(method, pool, settings, usable.members[support], parts)


def fit_on(
    method: str,
    pool: Pool,
    settings: Settings,
    support: NDArray[np.intp],
    parts: Parts = NO_PARTS,
) -> Fit:
    """Fit the method to the members of the support (m,), ascending, which has the forced ones.

    Its certificate compares with the best blend of all members of the pool.
    """
    forced = _places(settings.forced, support)
    fit = fit_method(method, pool.take(support), replace(settings, forced=forced), parts)
    combiner = fit.combiner.among(support, len(pool.members))
    return Fit(combiner, None if fit.blend is None else _among_all(fit.blend, support, pool))


def supports_by_price(
    method: str,
    pool: Pool,
    settings: Settings,
    limits: Limits,
    resource: int,
    parts: Parts = NO_PARTS,
) -> list[NDArray[np.intp]]:
    """Find what the method is to combine at rising budgets of one resource, as in `trade_off`."""
    usable = _usable_members(parts[METHODS][method], pool, limits, settings)
    points = trade_off(usable.true_prob, usable.limits, resource, usable.forced)
    return [usable.members[point.support] for point in points]


@dataclass(frozen=True, eq=False)
class _UsableMembers:
    """The members that a method takes."""

    members: NDArray[np.intp]
    true_prob: NDArray[np.floating]
    limits: Limits
    forced: tuple[int, ...]
    """Places in `members`."""


def _usable_members(
    method: Method, pool: Pool, limits: Limits, settings: Settings
) -> _UsableMembers:
    members = np.flatnonzero([method.takes(member) for member in pool.members])
    if len(members) == len(pool.members):
        return _UsableMembers(members, pool.true_prob, limits, settings.forced)
    among = replace(limits, costs=limits.costs[:, members])
    return _UsableMembers(
        members, pool.true_prob[members], among, _places(settings.forced, members)
    )


def _places(members: tuple[int, ...], among: NDArray[np.intp]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.searchsorted(among, np.array(members, dtype=np.intp)))


def _among_all(blend: Blend, support: NDArray[np.intp], pool: Pool) -> Blend:
    weights = spread(blend.weights, support, len(pool.members))
    path = [int(support[i]) for i in blend.path]
    return certified(pool.true_prob, weights, path, blend.path_losses)
