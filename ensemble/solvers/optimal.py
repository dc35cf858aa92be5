"""The blend with the least log loss, proven to a tolerance: column generation.

Takes true_prob (M, N), members x rows; gives the `Blend` with its certificate. Few members of many
have a weight at the optimum, so it is sought among a few, and one pass over all members names those
that are missing, or proves that none is. Source: Lübbecke and Desrosiers, Selected Topics in Column
Generation, 2005, for the scheme; `foldrace.ensemble.solvers.active_set` for the search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from foldrace.core.metrics import log_loss_of_true
from foldrace.ensemble.blend import Blend, checked_forced, checked_members, first_of_equals, mixture
from foldrace.ensemble.solvers.active_set import ROUNDING, Active, line_search, settle
from foldrace.ensemble.solvers.kernels import Backend, MemberSums, member_sums

Floats = NDArray[np.float64]

_AT_START = 20
"""Number of members, the best single ones, that the search starts from."""
_ADDED = 20
"""Largest number of members that join at a time."""
_PASSES = 200
"""Far more than any search needed: 2 to 6 on OOF data."""
_STALLED = 3
"""Passes without progress after which rounding is taken to allow none."""
_INNER = 0.05
"""Part of the certificate of all members that is close enough before others join."""


def optimal(
    true_prob: ArrayLike,
    tolerance: float = 1e-6,
    forced: Sequence[int] = (),
    min_weight: float = 0.0,
    backend: Backend | None = None,
) -> Blend:
    """The weights whose log loss is within `tolerance` (nats) of the least one.

    true_prob (M, N) in [0, 1], float32 or float64, may be memory-mapped. `forced` members have a
    weight of at least min_weight; then loss and certificate are compared with the best of the
    blends that obey. The lowest of exact duplicates gets the weight of them all. Where rounding
    allows no certificate of `tolerance`, the best blend found comes back with the certificate it
    has. Backends: see `foldrace.ensemble.solvers.kernels`.

    Raises ValueError on wrong values (member and row named) or weights that do not fit into 1.
    """
    members = checked_members(true_prob)
    lower = _lower_weights(checked_forced(forced, len(members)), min_weight, len(members))
    if not tolerance >= 0.0:
        raise ValueError(f"tolerance is {tolerance}, should be at least 0")
    objective = _Objective(
        member_sums(members, backend), mixture(members, lower), max(0.0, 1.0 - float(lower.sum()))
    )
    found = _search(objective, *_first(objective), tolerance)
    weights = lower.copy()
    weights[found.index] += objective.share * found.v
    return Blend(weights / weights.sum(), found.loss, found.certificate)


def _lower_weights(forced: Sequence[int], min_weight: float, n_members: int) -> Floats:
    """(M,) the least weight of each member."""
    if not 0.0 <= min_weight * max(1, len(forced)) <= 1.0:
        raise ValueError(
            f"min_weight is {min_weight}, should be from 0 to {1 / max(1, len(forced)):.3g} for "
            f"{len(forced)} forced members"
        )
    lower = np.zeros(n_members)
    lower[list(forced)] = min_weight
    return lower


@dataclass(frozen=True, eq=False)
class _Objective:
    """Minimise the loss of fixed + share * (v @ members) over the simplex."""

    sums: MemberSums
    fixed: Floats  # (N,)
    share: float

    def active(self, index: NDArray[np.intp]) -> Active:
        return Active(self.sums.members[index], self.fixed, self.share)

    def slopes(self, index: NDArray[np.intp], mixed: Floats) -> Floats:
        """(k,) how fast the loss falls toward each member, plus 1: at most 1 at the optimum."""
        inverse = 1.0 / mixed
        ratios = self.sums.mean_products(index, inverse)
        return np.asarray(self.share * ratios + float((self.fixed * inverse).mean()))


@dataclass(frozen=True, eq=False)
class SearchState:
    """Weights v (k,) of the members in index (k,), their loss, and the slopes there."""

    index: NDArray[np.intp]
    v: Floats
    mixed: Floats
    """(N,) what they blend to."""
    loss: float
    certificate: float
    slopes: Floats
    """(p,) of the pool's members: how fast the loss falls toward each, plus 1."""


def improved(sums: MemberSums, found: SearchState, tolerance: float) -> SearchState:
    """Continue the search of `optimal` from `found`, whose pool are all members.

    Members came that it does not have in its index, and `slopes` and `certificate` know of them. No
    member may equal another. Never a higher loss.
    """
    objective = _Objective(sums, np.zeros(sums.members.shape[1]), 1.0)
    return _search(objective, np.arange(len(sums.members)), found, tolerance)


def _first(objective: _Objective) -> tuple[NDArray[np.intp], SearchState]:
    """The members without equal ones, and the mean of the best single ones."""
    every = np.arange(len(objective.sums.members))
    scores = objective.sums.mean_logs(every, np.zeros_like(objective.fixed))
    pool = first_of_equals(objective.sums.members, scores)
    index = np.sort(pool[np.argsort(-scores[pool], kind="stable")[:_AT_START]])
    return pool, _settled(objective, pool, index, np.full(len(index), 1.0 / len(index)), _INNER)


def _search(
    objective: _Objective, pool: NDArray[np.intp], best: SearchState, tolerance: float
) -> SearchState:
    """The best weights found until their certificate is small enough or rounding stops it."""
    found, stalled = best, 0
    for _ in range(_PASSES):
        if best.certificate <= tolerance or stalled == _STALLED:
            break
        index, v = _joined(objective, found, pool)
        within = max(tolerance / 2, _INNER * best.certificate)
        found = _settled(objective, pool, index, v, within)
        better = found.loss < best.loss - ROUNDING or found.certificate < 0.9 * best.certificate
        best, stalled = (found, 0) if better else (best, stalled + 1)
    return best


def _settled(
    objective: _Objective,
    pool: NDArray[np.intp],
    index: NDArray[np.intp],
    v: Floats,
    tolerance: float,
) -> SearchState:
    """The best weights of the members in index, with the slopes of the whole pool there."""
    active = objective.active(index)
    v = settle(active, v, tolerance)
    mixed = active.mixed(v)
    slopes = objective.slopes(pool, mixed)
    certificate = max(0.0, math.log(float(slopes.max())))
    return SearchState(index, v, mixed, log_loss_of_true(mixed), certificate, slopes)


def _joined(
    objective: _Objective, found: SearchState, pool: NDArray[np.intp]
) -> tuple[NDArray[np.intp], Floats]:
    """The members with a weight and the steepest others, at the best point toward their mean.

    Where no other member would lower the loss, the steepest of all joins.
    """
    used, slopes = found.index[found.v > 0.0], found.slopes
    others = np.flatnonzero(np.isin(pool, used, invert=True) & (slopes > 1.0))
    steepest = others[np.argsort(-slopes[others], kind="stable")[:_ADDED]]
    joining = pool[steepest] if len(steepest) else pool[[slopes.argmax()]]
    index = np.union1d(used, joining)
    v = np.zeros(len(index))
    v[np.searchsorted(index, used)] = found.v[found.v > 0.0]
    toward = np.isin(index, joining) / len(joining)
    active = objective.active(index)
    step = line_search(active.mixed(v), active.mixed(toward))
    return index, (1.0 - step) * v + step * toward
