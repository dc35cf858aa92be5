"""Which members may enter a blend when members, time or bytes are limited.

Takes true_prob (M, N) and `Limits`: what each member costs and the budgets; gives the support whose
best weights have the least loss found. Choosing columns under a budget is NP-hard (Natarajan 1995,
Sparse Approximate Solutions to Linear Systems): greedy searches start from different ends and the
best of them is improved by swaps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from foldrace.core.metrics import log_loss_of_true
from foldrace.ensemble.blend import checked_members, clipped
from foldrace.ensemble.solvers.active_set import Active, settle
from foldrace.ensemble.solvers.kernels import member_sums
from foldrace.ensemble.solvers.optimal import optimal

Support = tuple[int, ...]
"""Members, ascending."""


@dataclass(frozen=True, eq=False)
class Limits:
    """The most that a blend may have; a member costs the same whatever its weight is."""

    costs: NDArray[np.float64]
    """(R, M) of R resources, such as milliseconds per image and bytes."""
    budgets: NDArray[np.float64]
    """(R,) at most so much of each."""
    max_members: int | None = None

    @property
    def bounded(self) -> bool:
        """Say whether there is any limit at all."""
        return self.max_members is not None or bool(np.isfinite(self.budgets).any())

    def admit(self, support: Support) -> bool:
        """Say whether the support is within all limits."""
        within = self.costs[:, list(support)].sum(axis=1) <= self.budgets * (1 + 1e-12)
        return bool(within.all()) and len(support) <= (self.max_members or len(support))

    def room(self, support: Support) -> NDArray[np.bool_]:
        """(M,): members that may be added to the support, other than its own."""
        sums = self.costs[:, list(support)].sum(axis=1, keepdims=True) + self.costs
        fits: NDArray[np.bool_] = (sums <= self.budgets[:, None] * (1 + 1e-12)).all(axis=0)
        fits[list(support)] = False
        return fits & (self.max_members is None or len(support) < self.max_members)

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


_SHORTLIST = 40
"""Members that each ranking may bring into the search: beyond them lie copies of better ones."""
_TRIED = 8
"""Members whose gain is computed at each step, those with the steepest descent."""
_SWAP_ROUNDS = 4
_DROPPED, _SWAPPED = 8, 3
"""Members that are left out in turn, and promising swaps that are solved, in each round."""
_TOLERANCE = 1e-5
"""Certificate of the weights of a support, mostly far less: Newton's steps square the error."""
_LEAST_GAIN = 1e-7
"""Nats; a smaller gain is no reason for another member."""

Floats = NDArray[np.float64]


def choose_support(
    true_prob: NDArray[np.floating], limits: Limits, forced: Support = ()
) -> NDArray[np.intp]:
    """Choose the members (ascending) of a blend of true_prob (M, N) within the limits.

    `forced` are always among them. Raises ValueError where no member fits, or the forced do not.
    """
    if not limits.admit(forced):
        raise ValueError("the members that must enter are beyond the limits")
    if not forced and not limits.room(()).any():
        raise ValueError("no member is within the limits")
    return np.array(SupportSearch(true_prob, limits, forced).best(limits), dtype=np.intp)


@dataclass(frozen=True, eq=False)
class _SupportWeights:
    """The best weights v (k,) of a support, within the tolerance."""

    loss: float
    v: Floats


class SupportSearch:
    """Supports of one problem, each solved once, for several limits no wider than the first."""

    def __init__(
        self, true_prob: NDArray[np.floating], limits: Limits, forced: Support = ()
    ) -> None:
        self._true_prob, self._limits, self._forced = checked_members(true_prob), limits, forced
        self._sums = member_sums(self._true_prob)
        self._nothing = np.zeros(self._true_prob.shape[1])
        fitting = np.flatnonzero(limits.room(forced))
        self._losses = np.full(len(true_prob), np.inf)
        self._losses[fitting] = -self._sums.mean_logs(fitting, self._nothing)
        self._pool = self._shortlist(fitting)
        self._solved: dict[Support, _SupportWeights] = {}

    def best(self, limits: Limits, near: Support | None = None) -> Support:
        """Find the best support within the limits, which admit the forced members and one more.

        Or the forced members alone, if there are any. `near`: a good support within wider limits,
        from which fewer searches need start.
        """
        self._limits = limits
        found = min(self._candidates(near), key=self._rank)
        for _ in range(_SWAP_ROUNDS):
            better = min(self._swap(found), key=self._rank, default=found)
            if self._rank(better) >= self._rank(found):
                return found
            found = better
        return found

    def loss(self, support: Support) -> float:
        """The least loss of the support, within the tolerance."""
        return self._solve(support).loss

    def _rank(self, support: Support) -> tuple[float, int, Support]:
        """Less is better; equal losses go to fewer and lower members."""
        return round(self.loss(support) / _LEAST_GAIN), len(support), support

    def _candidates(self, near: Support | None) -> Iterator[Support]:
        starts = sorted(self._starts())
        for start in starts if near is None else starts[:1]:
            yield self._forward(start, per_cost=False)
            yield self._forward(start, per_cost=True)
        dropped = self._backward(self._optimum() if near is None else near)
        if dropped:
            yield self._forward(dropped, per_cost=False)

    def _starts(self) -> set[Support]:
        """The best member alone, and the best of those that leave room for others."""
        if self._forced:
            return {self._forced}
        fits = np.flatnonzero(self._limits.room(()))
        shares = self._limits.share(fits)
        parts = (fits[shares <= part] for part in (np.inf, 0.5, 0.25))
        return {(int(some[self._losses[some].argmin()]),) for some in parts if len(some)}

    def _forward(self, support: Support, per_cost: bool) -> Support:
        """Add members, the one with the most gain (or gain per cost) first, while one helps."""
        while True:
            members, gains, steps = self._gains(support)
            if not len(members):
                return support
            worth = gains / np.maximum(self._limits.share(members), 1e-12) if per_cost else gains
            best = int(worth.argmax())
            grown = self._add_member(support, int(members[best]), float(steps[best]))
            if self.loss(grown) >= self.loss(support) - _LEAST_GAIN:
                return support
            support = grown

    def _backward(self, support: Support) -> Support:
        """Drop members, the least loss per cost first, until it fits.

        A third of what is too much at a time, since every drop changes what the others are worth.
        """
        while not self._limits.admit(support):
            rises = self._rises(support)
            free = [place for place, m in enumerate(support) if m not in self._forced]
            shares = self._limits.share(np.array(support, dtype=np.intp)[free])
            order = np.argsort(rises[free] / np.maximum(shares, 1e-12), kind="stable")
            leaving = [support[free[place]] for place in order]
            too_many = next(
                n for n in range(1, len(leaving) + 1)
                if self._limits.admit(_remove(support, *leaving[:n]))
            )  # fmt: skip
            support = self._drop_members(support, leaving[: -(-too_many // 3)])
        return support

    def _swap(self, support: Support) -> Iterator[Support]:
        """Try one member less and what then fits, where that looks best."""
        swaps: list[tuple[float, Support, int, float]] = []
        for place in np.argsort(self._rises(support), kind="stable")[:_DROPPED]:
            if support[place] in self._forced or len(support) == 1:
                continue
            rest = self._drop_members(support, [support[place]])
            members, gains, steps = self._gains(rest)
            others = np.flatnonzero(members != support[place])
            if len(others):
                best = others[gains[others].argmax()]
                estimate = self.loss(rest) - float(gains[best])
                swaps.append((estimate, rest, int(members[best]), float(steps[best])))
        for _, rest, member, step in sorted(swaps)[:_SWAPPED]:
            yield self._forward(self._add_member(rest, member, step), per_cost=False)

    def _rises(self, support: Support) -> Floats:
        """(k,) estimates of how much the loss rises without each member: w^2 / (2 inv(H)_mm).

        From the second derivatives H at the best weights w. Source: Hassibi and Stork, Second Order
        Derivatives for Network Pruning: Optimal Brain Surgeon, NIPS 1992.
        """
        v, active = self._solve(support).v, self._active(support)
        hessian = active.hessian(active.mixed(v))
        used = np.flatnonzero(v > 0.0)
        inverse = np.linalg.pinv(hessian[np.ix_(used, used)], hermitian=True)
        rises = np.zeros(len(v))
        rises[used] = v[used] ** 2 / (2.0 * np.maximum(np.diag(inverse), 1e-300))
        return rises

    def _gains(self, support: Support) -> tuple[NDArray[np.intp], Floats, Floats]:
        """Members that fit and help, the gain of mixing each in, and its weight there."""
        fits = self._pool[self._limits.room(support)[self._pool]]
        q = self._active(support).mixed(self._solve(support).v)
        slopes = self._sums.mean_products(fits, 1.0 / q) - 1.0
        steepest = np.argsort(-slopes, kind="stable")[:_TRIED]
        found = fits[steepest[slopes[steepest] > 0.0]]
        pairs = [_line_gain(q, clipped(self._true_prob[m])) for m in found]
        gains, steps = np.array(pairs).reshape(-1, 2).T
        helps = gains > _LEAST_GAIN
        return found[helps], gains[helps], steps[helps]

    def _add_member(self, support: Support, member: int, step: float) -> Support:
        """Add a member, solved from that step towards it, and drop those that it makes useless."""
        grown = tuple(sorted((*support, member)))
        v = np.insert((1.0 - step) * self._solve(support).v, grown.index(member), step)
        solved = self._solve(grown, v)
        return self._drop_members(
            grown, [m for m, w in zip(grown, solved.v, strict=True) if w == 0.0]
        )

    def _drop_members(self, support: Support, leaving: list[int]) -> Support:
        """Drop members, except forced ones, and solve from what is left of the weights."""
        rest = _remove(support, *(m for m in leaving if m not in self._forced))
        weights = dict(zip(support, self._solve(support).v, strict=True))
        v = np.array([weights[m] for m in rest])
        if rest:
            self._solve(rest, v / v.sum() if v.sum() > 0.0 else None)
        return rest

    def _solve(self, support: Support, start: Floats | None = None) -> _SupportWeights:
        if support not in self._solved:
            active = self._active(support)
            v = np.full(len(support), 1.0 / len(support)) if start is None else start
            v = settle(active, v, _TOLERANCE)
            self._solved[support] = _SupportWeights(log_loss_of_true(active.mixed(v)), v)
        return self._solved[support]

    def _active(self, support: Support) -> Active:
        return Active(self._true_prob[list(support)], self._nothing, 1.0)

    def _optimum(self) -> Support:
        """The members of the unbounded optimum, and the forced ones."""
        if not len(self._pool):  # the forced members fill the limits
            return self._forced
        weights = optimal(self._true_prob[self._pool], tolerance=_TOLERANCE).weights
        return tuple(sorted({*self._pool[weights > 0].tolist(), *self._forced}))

    def _shortlist(self, fitting: NDArray[np.intp]) -> NDArray[np.intp]:
        """Members of the optimum, the best alone, the best of each price, and the cheapest."""
        if len(fitting) <= 3 * _SHORTLIST:
            return fitting
        losses = self._losses[fitting]
        by_price = np.argsort(self._limits.share(fitting), kind="stable")
        chosen = {int(fitting[by_price[0]])}
        chosen |= set(fitting[np.argsort(losses, kind="stable")[:_SHORTLIST]].tolist())
        for group in np.array_split(by_price, 10):
            best = group[np.argsort(losses[group], kind="stable")]
            chosen |= set(fitting[best[: _SHORTLIST // 10]].tolist())
        weights = optimal(self._true_prob[fitting], tolerance=1e-4).weights
        return np.array(sorted({*chosen, *fitting[weights > 0].tolist()}), dtype=np.intp)


def _line_gain(q: Floats, column: Floats) -> tuple[float, float]:
    """The gain of mixing a column into q (N,), and its weight there, by three Newton steps."""
    ratio = column / q - 1.0
    step, part = 0.0, ratio
    for _ in range(3):
        step += float(part.mean()) / max(float(np.square(part).mean()), 1e-300)
        step = min(max(step, 0.0), 0.999)
        part = ratio / (1.0 + step * ratio)
    return float(np.log1p(step * ratio).mean()), step


def _remove(support: Support, *members: int) -> Support:
    return tuple(m for m in support if m not in members)
