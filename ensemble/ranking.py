"""Members by their own merit: what each loses alone, and which are the same as another.

Takes a `Pool`; members that must count (`forced`) are never the ones that are left out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ensemble.duplicates import first_of_equals
from ensemble.pool import Pool
from experiment.metrics import log_loss_of_true


def own_losses(pool: Pool) -> NDArray[np.float64]:
    """(M,) log loss of each member alone, in nats."""
    return np.array([log_loss_of_true(row) for row in pool.true_prob])


def distinct_members(pool: Pool, forced: tuple[int, ...] = ()) -> NDArray[np.intp]:
    """One member of each set of exact duplicates, ascending: the lowest, or those that are forced.
    Where members have equal say, a copy would count twice."""
    losses = own_losses(pool)
    if not forced:
        return first_of_equals(pool.true_prob, losses)
    first = np.unique(forced)
    order = np.concatenate([first, np.setdiff1d(np.arange(len(losses)), first)])
    distinct = order[first_of_equals(pool.true_prob[order], losses[order])]
    return np.union1d(distinct, first)
