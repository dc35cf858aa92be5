"""What every row of the table of methods takes and gives.

`Settings` are the config's wishes, `Fit` is the combination that a method found.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ensemble.blend import Blend
from ensemble.combine import ArithmeticMean, Combiner, pool_terms
from ensemble.pool import Pool


@dataclass(frozen=True)
class Settings:
    """What a method may be told; one that has no use for a field ignores it."""

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
