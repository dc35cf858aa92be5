"""Which members may enter a blend when members, time or bytes are limited.

Takes true_prob (M, N) and what each member costs; gives the supports whose best weights have the
least loss found within the limits. Choosing columns under a budget is NP-hard (Natarajan 1995,
Sparse Approximate Solutions to Linear Systems): several greedy searches start from different ends
and the best of them is improved by swaps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ensemble.blend import clipped, mixture
from ensemble.optimal import optimal
from experiment.metrics import log_loss_of_true

_SHORTLIST = 60
"""Members that each ranking may bring into the search: beyond them lie copies of better ones."""
_TRIED = 12
"""Members whose gain is computed exactly at each step, those with the steepest descent."""
_SWAP_ROUNDS = 3
_TOLERANCE = 1e-7
"""Certificate of the weights of a support: far below what separates supports."""
_LEAST_GAIN = 1e-9
"""Nats; a smaller gain is rounding, not a reason for another member."""

Support = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Limits:
    """What a blend may have at most; a member costs the same whatever its weight is."""

    costs: NDArray[np.float64]
    """(R, M) of R resources, such as milliseconds per image and bytes."""
    budgets: NDArray[np.float64]
    """(R,) at most so much of each."""
    max_members: int | None = None

    @property
    def bounded(self) -> bool:
        """Whether there is any limit at all."""
        return self.max_members is not None or bool(np.isfinite(self.budgets).any())

    def admit(self, support: Support) -> bool:
        within = self.costs[:, list(support)].sum(axis=1) <= self.budgets * (1 + 1e-12)
        return bool(within.all()) and len(support) <= (self.max_members or len(support))

    def share(self, members: NDArray[np.intp]) -> NDArray[np.float64]:
        """(m,): the largest part of any budget that each member takes."""
        parts = self.costs[:, members] / np.maximum(self.budgets, 1e-300)[:, None]
        most: NDArray[np.float64] = parts.max(axis=0) if len(parts) else np.zeros(len(members))
        return np.asarray(
            np.maximum(most, 0.0 if self.max_members is None else 1.0 / self.max_members)
        )

    def within(self, resource: int, budget: float) -> Limits:
        """The same with another budget for one resource."""
        budgets = self.budgets.copy()
        budgets[resource] = budget
        return replace(self, budgets=budgets)


def choose_support(
    true_prob: NDArray[np.floating], limits: Limits, forced: Support = ()
) -> NDArray[np.intp]:
    """The members (ascending) that a blend of true_prob (M, N) within the limits should have.

    `forced` are always among them. Raises ValueError where no member fits, or the forced do not.
    """
    if not limits.admit(forced):
        raise ValueError("the members that must enter are beyond the limits")
    fitting = [m for m in range(len(true_prob)) if limits.admit(_with(forced, m))]
    if not fitting and not forced:
        raise ValueError("no member is within the limits")
    search = _Search(true_prob, limits, forced, np.array(fitting, dtype=np.intp))
    return np.array(sorted(search.best()), dtype=np.intp)


class _Search:
    """Supports of one problem, each solved once."""

    def __init__(
        self,
        true_prob: NDArray[np.floating],
        limits: Limits,
        forced: Support,
        fitting: NDArray[np.intp],
    ) -> None:
        self._true_prob, self._limits, self._forced = true_prob, limits, forced
        self._single = {int(m): log_loss_of_true(clipped(true_prob[m])) for m in fitting}
        self._pool = self._shortlist(fitting)
        self._solved: dict[Support, tuple[float, NDArray[np.float64]]] = {}

    def best(self) -> Support:
        """The best of all searches, after swaps."""
        found = min(self._candidates(), key=self._rank)
        for _ in range(_SWAP_ROUNDS):
            better = min(self._neighbours(found), key=self._rank, default=found)
            if self._rank(better) >= self._rank(found):
                return found
            found = better
        return found

    def _rank(self, support: Support) -> tuple[float, int, Support]:
        """Less is better; equal losses go to fewer and lower members."""
        return round(self._solve(support)[0] / _LEAST_GAIN), len(support), support

    def _candidates(self) -> Iterator[Support]:
        if self._forced:
            yield self._forced
        for per_cost in (False, True):
            for start in self._starts():
                yield self._forward(start, per_cost)
        yield self._backward()

    def _starts(self) -> set[Support]:
        """The best member alone, and the best of those that leave room for others."""
        if self._forced:
            return {self._forced}
        shares = dict(zip(self._pool.tolist(), self._limits.share(self._pool), strict=True))
        ordered = sorted(shares, key=lambda m: (self._single[m], m))
        firsts = ([m for m in ordered if shares[m] <= part] for part in (1.0, 0.5, 0.25))
        return {(found[0],) for found in firsts if found}

    def _forward(self, support: Support, per_cost: bool) -> Support:
        """Add members, the one with the most gain (or gain per cost) first, while one helps."""
        while True:
            gains = self._gains(support)
            if per_cost:
                shares = self._limits.share(np.array(list(gains), dtype=np.intp))
                prices = np.maximum(shares, 1e-12).tolist()
                gains = {m: g / p for (m, g), p in zip(gains.items(), prices, strict=True)}
            if not gains:
                return support
            support = _with(support, max(gains, key=lambda m: (gains[m], -m)))

    def _backward(self) -> Support:
        """Drop members of the unbounded optimum, the least loss per cost first, until it fits."""
        weights = optimal(self._true_prob[self._pool], tolerance=_TOLERANCE).weights
        support = tuple(sorted({*self._pool[weights > 0].tolist(), *self._forced}))
        while not self._limits.admit(support):
            loss = self._solve(support)[0]
            free = [m for m in support if m not in self._forced]
            shares = self._limits.share(np.array(free, dtype=np.intp))
            rises = [self._solve(_without(support, m))[0] - loss for m in free]
            support = _without(support, free[int(np.argmin(rises / np.maximum(shares, 1e-12)))])
        return support

    def _neighbours(self, support: Support) -> Iterator[Support]:
        """One member less and the best that then fit."""
        for member in support:
            rest = _without(support, member)
            if member not in self._forced and rest:
                gains = self._gains(rest, but=member)
                if gains:
                    yield self._forward(_with(rest, max(gains, key=lambda m: gains[m])), False)

    def _gains(self, support: Support, but: int = -1) -> dict[int, float]:
        """Members that fit and help, with what the best mixture of blend and member gains."""
        _, q = self._solve(support)
        open_ = [
            int(m) for m in self._pool
            if m not in support and m != but and self._limits.admit(_with(support, int(m)))
        ]  # fmt: skip
        slopes = {m: float((clipped(self._true_prob[m]) / q).mean()) - 1.0 for m in open_}
        steepest = sorted(slopes, key=lambda m: -slopes[m])[:_TRIED]
        gains = {m: _gain(q, clipped(self._true_prob[m])) for m in steepest if slopes[m] > 0}
        return {m: gain for m, gain in gains.items() if gain > _LEAST_GAIN}

    def _solve(self, support: Support) -> tuple[float, NDArray[np.float64]]:
        """Least loss of the support and the mixture's true-class probabilities (N,)."""
        if support not in self._solved:
            columns = self._true_prob[list(support)]
            blend = optimal(columns, tolerance=_TOLERANCE)
            self._solved[support] = blend.loss, mixture(columns, blend.weights)
        return self._solved[support]

    def _shortlist(self, fitting: NDArray[np.intp]) -> NDArray[np.intp]:
        """Members of the optimum, the best alone, and the best of each price."""
        if len(fitting) <= 3 * _SHORTLIST:
            return fitting
        losses = np.array([self._single[int(m)] for m in fitting])
        by_price = np.argsort(self._limits.share(fitting), kind="stable")
        chosen = {*fitting[np.argsort(losses, kind="stable")[:_SHORTLIST]].tolist()}
        for group in np.array_split(by_price, 10):
            best = group[np.argsort(losses[group], kind="stable")]
            chosen |= set(fitting[best[: _SHORTLIST // 10]].tolist())
        weights = optimal(self._true_prob[fitting], tolerance=1e-5).weights
        return np.array(sorted({*chosen, *fitting[weights > 0].tolist()}), dtype=np.intp)


def _gain(q: NDArray[np.float64], column: NDArray[np.float64]) -> float:
    """The most that a mixture of q (N,) with a column gains, by bisection on its derivative."""
    ratio = column / q - 1.0
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        rising = (ratio / (1.0 + middle * ratio)).mean() > 0
        low, high = (middle, high) if rising else (low, middle)
    return float(np.log1p(low * ratio).mean())


def _with(support: Sequence[int], member: int) -> Support:
    return tuple(sorted({*support, member}))


def _without(support: Support, member: int) -> Support:
    return tuple(m for m in support if m != member)
