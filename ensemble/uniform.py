"""All members with the same weight: no choice, so nothing that could be overfitted.

Takes a `Pool`, gives a `Fit`; of exact duplicates only one counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ensemble.certificate import certified
from ensemble.fit import Fit, Settings, mixture_fit
from ensemble.pool import Pool
from ensemble.ranking import distinct_members


def uniform(pool: Pool, settings: Settings) -> Fit:
    """The plain mean of all distinct members."""
    members = distinct_members(pool, settings.forced)
    return mixture_fit(certified(pool.true_prob, equal_weights(members, len(pool.members))))


def equal_weights(members: Sequence[int] | NDArray[np.intp], n_members: int) -> NDArray[np.float64]:
    """(n_members,) with 1/k for each of the k members, 0 elsewhere."""
    weights = np.zeros(n_members)
    weights[members] = 1.0 / len(members)
    return weights
