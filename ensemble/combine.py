"""How the members' probabilities become the blend's: four ways of pooling.

Takes log-probabilities of one member after another, never all at once; gives (n, C) probabilities.
The same record pools OOF rows and, when the blend predicts, new images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[np.float64]]


class Combiner(Protocol):
    """Immutable; `weights` (M,) tells which members count: those that are not 0."""

    @property
    def pooling(self) -> str:
        """Its name in `POOLINGS`."""

    @property
    def weights(self) -> NDArray[np.float64]: ...

    def term(self, member: int, log_prob: NDArray[np.floating]) -> NDArray[np.float64]:
        """(n, C): what a member's log-probabilities (n, C) add to the total."""

    def finish(self, total: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum of all terms (n, C) -> probabilities (n, C), rows sum to 1."""

    def arrays(self) -> Arrays:
        """What it knows beyond the weights, for the run folder."""

    def take(self, members: NDArray[np.intp]) -> Combiner:
        """The same with only these members, in this order; the others must not count."""


@dataclass(frozen=True, eq=False)
class ArithmeticMean:
    """The weighted mean of the probabilities: a simplex mixture."""

    weights: NDArray[np.float64]  # (M,) sums to 1
    pooling: str = "arithmetic"

    def term(self, member: int, log_prob: NDArray[np.floating]) -> NDArray[np.float64]:
        prob = np.exp(log_prob.astype(np.float64))
        prob *= self.weights[member]
        return prob

    def finish(self, total: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(total / total.sum(axis=1, keepdims=True))

    def arrays(self) -> Arrays:
        return {}

    def take(self, members: NDArray[np.intp]) -> ArithmeticMean:
        return ArithmeticMean(self.weights[members])


def pool_terms(
    combiner: Combiner, log_probs: Iterable[tuple[int, NDArray[np.floating]]]
) -> NDArray[np.float64]:
    """(n, C) probabilities from (member, its log-probabilities (n, C)) pairs."""
    total: NDArray[np.float64] | None = None
    for member, log_prob in log_probs:
        term = combiner.term(member, log_prob)
        total = term if total is None else np.add(total, term, out=total)
    if total is None:
        raise ValueError("no member to pool")
    return combiner.finish(total)


POOLINGS: dict[str, Callable[[NDArray[np.float64], Arrays], Combiner]] = {
    "arithmetic": lambda weights, arrays: ArithmeticMean(weights),
}
"""Name -> the combiner from weights (M,) and its further arrays, as a run folder keeps them."""
