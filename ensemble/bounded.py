"""Any method within limits: where its own choice is beyond them, the members that fit are chosen
first, then the method combines those.

Takes a `Pool`, `Settings` and `Limits`; gives a `Fit` over all members of the pool.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ensemble.blend import Blend
from ensemble.certificate import certified
from ensemble.combine import Arrays, Combiner
from ensemble.fit import Fit, Settings
from ensemble.limits import Limits
from ensemble.methods import METHODS, fit_method
from ensemble.pool import Pool
from ensemble.support_search import choose_support
from ensemble.trade_off import trade_off


@dataclass(frozen=True, eq=False)
class AmongMore:
    """A combiner of few members, seen from a pool of more."""

    inner: Combiner
    support: NDArray[np.intp]
    """(m,) ascending: which members of the pool the inner ones are."""
    n_members: int

    @property
    def pooling(self) -> str:
        return self.inner.pooling

    @property
    def weights(self) -> NDArray[np.float64]:
        return _spread(self.inner.weights, self.support, self.n_members)

    def term(self, member: int, log_prob: NDArray[np.floating]) -> NDArray[np.float64]:
        return self.inner.term(int(np.searchsorted(self.support, member)), log_prob)

    def finish(self, total: NDArray[np.float64]) -> NDArray[np.float64]:
        return self.inner.finish(total)

    def arrays(self) -> Arrays:
        return self.inner.arrays()

    def take(self, members: NDArray[np.intp]) -> Combiner:
        return self.inner.take(np.searchsorted(self.support, members))


def fit_within(method: str, pool: Pool, settings: Settings, limits: Limits) -> Fit:
    """The method of that name on all members, where the limits admit what it then uses; else on the
    members that `choose_support` picks. Its certificate compares with the best blend of all members
    of the pool: the limits' price is in it."""
    free = fit_method(method, pool, settings)
    if limits.admit(tuple(free.used.tolist())):
        return free
    able = _able(method, pool, limits, settings)
    support = choose_support(able.true_prob, able.limits, able.forced)
    return fit_on(method, pool, settings, able.members[support])


def fit_on(method: str, pool: Pool, settings: Settings, support: NDArray[np.intp]) -> Fit:
    """The method of that name on the members of the support (m,), ascending, which has the forced
    ones; its certificate compares with the best blend of all members of the pool."""
    forced = _places(settings.forced, support)
    fit = fit_method(method, pool.take(support), replace(settings, forced=forced))
    combiner = AmongMore(fit.combiner, support, len(pool.members))
    return Fit(combiner, None if fit.blend is None else _among_all(fit.blend, support, pool))


def supports_by_price(
    method: str, pool: Pool, settings: Settings, limits: Limits, resource: int
) -> list[NDArray[np.intp]]:
    """What the method is to combine at rising budgets of one resource, as in `trade_off`."""
    able = _able(method, pool, limits, settings)
    points = trade_off(able.true_prob, able.limits, resource, able.forced)
    return [able.members[point.support] for point in points]


@dataclass(frozen=True, eq=False)
class _Able:
    """The members that a method takes."""

    members: NDArray[np.intp]
    true_prob: NDArray[np.floating]
    limits: Limits
    forced: tuple[int, ...]
    """Places in `members`."""


def _able(method: str, pool: Pool, limits: Limits, settings: Settings) -> _Able:
    members = np.flatnonzero([METHODS[method].takes(member) for member in pool.members])
    if len(members) == len(pool.members):
        return _Able(members, pool.true_prob, limits, settings.forced)
    among = replace(limits, costs=limits.costs[:, members])
    return _Able(members, pool.true_prob[members], among, _places(settings.forced, members))


def _places(members: tuple[int, ...], among: NDArray[np.intp]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.searchsorted(among, np.array(members, dtype=np.intp)))


def _among_all(blend: Blend, support: NDArray[np.intp], pool: Pool) -> Blend:
    weights = _spread(blend.weights, support, len(pool.members))
    path = [int(support[i]) for i in blend.path]
    return certified(pool.true_prob, weights, path, blend.path_losses)


def _spread(
    weights: NDArray[np.float64], support: NDArray[np.intp], n_members: int
) -> NDArray[np.float64]:
    spread = np.zeros(n_members)
    spread[support] = weights
    return spread
