"""The best k members with equal weights.

Takes a `Pool`, gives a `Fit`; k is where the mean of the members so far has the least OOF loss.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ensemble.blend import clipped
from ensemble.certificate import certified
from ensemble.fit import Fit, Settings, mixture_fit
from ensemble.pool import Pool
from ensemble.ranking import distinct_members, own_losses
from ensemble.uniform import equal_weights
from experiment.metrics import log_loss_of_true


def top_k(pool: Pool, settings: Settings) -> Fit:
    """The forced members, then the others by their own loss, as far as their mean gets better.

    Ties go to the lower member and to the smaller k. The path is the members in that order.
    """
    members = distinct_members(pool, settings.forced)
    is_forced = np.isin(members, settings.forced)
    order = members[np.lexsort((own_losses(pool)[members], ~is_forced))]
    losses = _prefix_losses(pool.true_prob, order)
    least = max(1, int(is_forced.sum()))
    k = least + int(np.argmin(losses[least - 1 :]))
    weights = equal_weights(order[:k], len(pool.members))
    path = [int(member) for member in order[:k]]
    return mixture_fit(certified(pool.true_prob, weights, path, losses))


def _prefix_losses(true_prob: NDArray[np.floating], order: NDArray[np.intp]) -> list[float]:
    """The loss of the mean of the first 1, 2, ... members."""
    total = np.zeros(true_prob.shape[1])
    losses = []
    for count, member in enumerate(order, start=1):
        total += clipped(true_prob[member])
        losses.append(log_loss_of_true(total / count))
    return losses
