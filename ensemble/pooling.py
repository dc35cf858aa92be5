"""How the members' probabilities become the blend's: four ways of pooling.

Takes log-probabilities of one member after another, never all at once; gives (n, C) probabilities.
The same record pools OOF rows and, when the blend predicts, new images. `Settings` are what the
config asks of a method, `Fit` is the combination that it found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from foldrace.core.metrics import CLIP
from foldrace.ensemble.blend import Blend
from foldrace.ensemble.pool import Pool

_BLOCK = 1 << 15
"""Numbers pooled at a time: 256 KiB, so that a term stays in the cache until it is added."""

Arrays = Mapping[str, NDArray[np.float64]]


class Combiner(Protocol):
    """A combination of members, immutable; it uses those whose weight is not 0."""

    @property
    def pooling(self) -> str:
        """Its name in `POOLINGS`."""

    @property
    def weights(self) -> NDArray[np.float64]:
        """(M,) weights, or a summary of what a member counts."""

    def term(self, member: int, log_prob: NDArray[np.floating]) -> NDArray[np.float64]:
        """(n, C): what a member's log-probabilities (n, C) add to the total.

        Row by row, so that any block of rows can be asked for alone.
        """

    def finish(self, total: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum of all terms (n, C) as probabilities (n, C), rows sum to 1; row by row too."""

    def arrays(self) -> Arrays:
        """Everything beyond the weights, for the run folder."""

    def take(self, members: NDArray[np.intp]) -> Combiner:
        """The same with only these members, in this order; the others must not count."""

    def among(self, places: NDArray[np.intp], n_members: int) -> Combiner:
        """The same among more members that do not count: member i is at places[i], ascending."""


@dataclass(frozen=True, eq=False)
class ArithmeticMean:
    """The weighted mean of the probabilities: a simplex mixture."""

    weights: NDArray[np.float64]  # (M,) sums to 1
    pooling: str = "arithmetic"

    def term(self, member: int, log_prob: NDArray[np.floating]) -> NDArray[np.float64]:
        """(n, C): see `Combiner.term`."""
        prob: NDArray[np.float64] = np.exp(log_prob, dtype=np.float64)
        prob *= self.weights[member]
        return prob

    def finish(self, total: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n, C): see `Combiner.finish`."""
        return np.asarray(total / total.sum(axis=1, keepdims=True))

    def arrays(self) -> Arrays:
        """Everything beyond the weights."""
        return {}

    def take(self, members: NDArray[np.intp]) -> ArithmeticMean:
        """The same with only these members."""
        return ArithmeticMean(self.weights[members])

    def among(self, places: NDArray[np.intp], n_members: int) -> ArithmeticMean:
        """The same among more members."""
        return ArithmeticMean(spread(self.weights, places, n_members))


@dataclass(frozen=True, eq=False)
class Votes:
    """Shares of votes, mixed with the constant 1/C.

    Each member votes for its most probable class, the lowest one on a tie.
    """

    weights: NDArray[np.float64]  # (M,) sums to 1
    constant: float
    """The weight of 1/C, in [0, 1]."""
    pooling: str = "votes"

    def term(self, member: int, log_prob: NDArray[np.floating]) -> NDArray[np.float64]:
        """(n, C): see `Combiner.term`."""
        shares = np.zeros(log_prob.shape)
        shares[np.arange(len(log_prob)), log_prob.argmax(axis=1)] = self.weights[member]
        return shares

    def finish(self, total: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n, C): see `Combiner.finish`."""
        shares = total / total.sum(axis=1, keepdims=True)
        return np.asarray((1.0 - self.constant) * shares + self.constant / total.shape[1])

    def arrays(self) -> Arrays:
        """Everything beyond the weights."""
        return {"constant": np.array([self.constant])}

    def take(self, members: NDArray[np.intp]) -> Votes:
        """The same with only these members."""
        return Votes(self.weights[members], self.constant)

    def among(self, places: NDArray[np.intp], n_members: int) -> Votes:
        """The same among more members."""
        return Votes(spread(self.weights, places, n_members), self.constant)


@dataclass(frozen=True, eq=False)
class GeometricMean:
    """softmax(sum of w_m log p_m): the product of p_m ** w_m, renormalised.

    The weights need not sum to 1: their sum is the inverse of a temperature.
    """

    weights: NDArray[np.float64]  # (M,) >= 0
    pooling: str = "geometric"

    def term(self, member: int, log_prob: NDArray[np.floating]) -> NDArray[np.float64]:
        """(n, C): see `Combiner.term`."""
        logs = centred_logs(log_prob)
        logs *= self.weights[member]
        return logs

    def finish(self, total: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n, C): see `Combiner.finish`."""
        return softmax(total)

    def arrays(self) -> Arrays:
        """Everything beyond the weights."""
        return {}

    def take(self, members: NDArray[np.intp]) -> GeometricMean:
        """The same with only these members."""
        return GeometricMean(self.weights[members])

    def among(self, places: NDArray[np.intp], n_members: int) -> GeometricMean:
        """The same among more members."""
        return GeometricMean(spread(self.weights, places, n_members))


@dataclass(frozen=True, eq=False)
class Stacking:
    """softmax(sum of a_m z_m + sum of z_m W_m + b) of the centred log-probabilities z_m."""

    weights: NDArray[np.float64]
    """(M,) the size of a member's coefficients, a_m where W_m is 0: no more than a summary."""
    scales: NDArray[np.float64]
    """(M,) a_m."""
    matrices: NDArray[np.float64]
    """(J, C, C) W_m of some members."""
    owners: NDArray[np.intp]
    """(J,) whose matrix each one is."""
    intercept: NDArray[np.float64]
    """(C,) b."""
    pooling: str = "stacking"

    def term(self, member: int, log_prob: NDArray[np.floating]) -> NDArray[np.float64]:
        """(n, C): see `Combiner.term`."""
        logs = centred_logs(log_prob)
        added = self.scales[member] * logs
        for matrix in self.matrices[self.owners == member]:
            added += logs @ matrix
        return np.asarray(added)

    def finish(self, total: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n, C): see `Combiner.finish`."""
        return softmax(total + self.intercept)

    def arrays(self) -> Arrays:
        """Everything beyond the weights."""
        return {
            "scales": self.scales,
            "matrices": self.matrices,
            "owners": self.owners.astype(np.float64),
            "intercept": self.intercept,
        }

    def take(self, members: NDArray[np.intp]) -> Stacking:
        """The same with only these members."""
        place = np.full(len(self.weights), -1)
        place[members] = np.arange(len(members))
        owners = place[self.owners]
        there = owners >= 0
        return Stacking(
            self.weights[members],
            self.scales[members],
            self.matrices[there],
            owners[there],
            self.intercept,
        )

    def among(self, places: NDArray[np.intp], n_members: int) -> Stacking:
        """The same among more members."""
        return Stacking(
            spread(self.weights, places, n_members),
            spread(self.scales, places, n_members),
            self.matrices,
            places[self.owners],
            self.intercept,
        )


def spread(
    weights: NDArray[np.float64], places: NDArray[np.intp], n_members: int
) -> NDArray[np.float64]:
    """(n_members,) the weights at their places, 0 elsewhere."""
    among = np.zeros(n_members)
    among[places] = weights
    return among


def centred_logs(log_prob: NDArray[np.floating]) -> NDArray[np.float64]:
    """(n, C) log-probabilities, clipped like the score and with a mean of 0 in each row.

    Softmax does not see the mean, but a matrix of coefficients would.
    """
    logs = np.maximum(log_prob.astype(np.float64), math.log(CLIP))
    logs -= logs.mean(axis=1, keepdims=True)
    return np.asarray(logs)


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, C) probabilities of logits (n, C)."""
    prob = np.exp(logits - logits.max(axis=1, keepdims=True))
    prob /= prob.sum(axis=1, keepdims=True)
    return np.asarray(prob)


def pool_terms(
    combiner: Combiner, log_probs: Iterable[tuple[int, NDArray[np.floating]]]
) -> NDArray[np.float64]:
    """(n, C) probabilities from (member, its log-probabilities (n, C)) pairs."""
    total: NDArray[np.float64] | None = None
    for member, log_prob in log_probs:
        total = np.zeros(log_prob.shape) if total is None else total
        for rows in _blocks(log_prob.shape):
            total[rows] += combiner.term(member, log_prob[rows])
    if total is None:
        raise ValueError("no member to pool")
    for rows in _blocks(total.shape):
        total[rows] = combiner.finish(total[rows])
    return total


def _blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Blocks of the rows of (n, C)."""
    step = max(1, _BLOCK // shape[1])
    return (slice(start, start + step) for start in range(0, shape[0], step))


POOLINGS: dict[str, Callable[[NDArray[np.float64], Arrays], Combiner]] = {
    "arithmetic": lambda weights, arrays: ArithmeticMean(weights),
    "votes": lambda weights, arrays: Votes(weights, float(arrays["constant"][0])),
    "geometric": lambda weights, arrays: GeometricMean(weights),
    "stacking": lambda weights, arrays: Stacking(
        weights,
        arrays["scales"],
        arrays["matrices"],
        arrays["owners"].astype(np.intp),
        arrays["intercept"],
    ),
}
"""Name -> the combiner from weights (M,) and its further arrays: how a run folder is read back."""


@dataclass(frozen=True)
class Settings:
    """What the config asks of a method; one that has no use for a field ignores it."""

    max_rounds: int = 50
    bags: int = 0
    """Greedy: how many random halves of the members are searched and averaged; 0: all, once."""
    forced: tuple[int, ...] = ()
    """Members (indices into the pool) that must have a weight."""

    @property
    def rounds(self) -> int:
        """`max_rounds`, but one for each forced member at least."""
        return max(self.max_rounds, len(set(self.forced)))


@dataclass(frozen=True, eq=False)
class Fit:
    """A combination of members."""

    combiner: Combiner
    blend: Blend | None = None
    """Loss, certificate and path, where the combination is a simplex mixture."""

    @property
    def used(self) -> NDArray[np.intp]:
        """Members that count, ascending."""
        return np.flatnonzero(self.combiner.weights)


def mixture_fit(blend: Blend) -> Fit:
    """The weighted mean of the probabilities, as the blend says."""
    return Fit(ArithmeticMean(blend.weights), blend)


def blend_prob(fit: Fit, pool: Pool) -> NDArray[np.float64]:
    """(N, C) probabilities on the pool's rows, one member in memory at a time."""
    return pool_terms(fit.combiner, ((int(m), pool.log_prob(int(m))) for m in fit.used))
