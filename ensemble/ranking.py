"""Members by their own merit: what each loses alone, and which are the same as another.

Takes a `Pool`; members that must count (`forced`) are never the ones that are left out.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ensemble.pool import Pool
from experiment.metrics import log_loss_of_true


def own_losses(pool: Pool) -> NDArray[np.float64]:
    """(M,) log loss of each member alone, in nats."""
    return np.array([log_loss_of_true(row) for row in pool.true_prob])


def distinct_members(pool: Pool, forced: Iterable[int] = ()) -> NDArray[np.intp]:
    """One member of each set of exact duplicates, ascending: the lowest, or those that are forced.
    Where members have equal say, a copy would count twice."""
    kept: set[int] = set()
    seen: set[bytes] = set()
    first = list(dict.fromkeys(forced))
    for member in [*first, *range(len(pool.members))]:
        column = pool.true_prob[member].tobytes()
        if column not in seen or member in first:
            kept.add(member)
        seen.add(column)
    return np.array(sorted(kept), dtype=np.intp)
