"""What each member of a blend is good for: the log loss without it.

Takes the true-class probabilities of the members that a blend uses, and its weights where they are
not to be chosen anew; gives one number a member, in nats.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ensemble.blend import clipped, mixture
from ensemble.optimal import optimal
from experiment.metrics import log_loss_of_true

_TOLERANCE = 1e-7
"""Certificate of each blend of the others."""
_LEAST_GAIN = 1e-9
"""A smaller one is rounding."""
_MOST = 50
"""Solves: who is asked about more members looks at the heaviest."""


def rise_of_least_loss(true_prob: NDArray[np.floating]) -> list[float | None]:
    """(m,) >= 0: how much the least log loss of a blend of true_prob (m, N) rises without each
    member, the weights of the others chosen anew; None beyond the 50 heaviest at that blend.
    Raises ValueError on fewer than two members."""
    _check_others(len(true_prob))
    blend = optimal(true_prob, tolerance=_TOLERANCE)
    heaviest = np.argsort(-blend.weights, kind="stable")
    without: list[float | None] = [None] * len(true_prob)
    for place, member in enumerate(heaviest.tolist()):
        if blend.weights[member] == 0.0:  # the others do as well alone
            without[member] = 0.0
        elif place < _MOST:
            others = np.delete(true_prob, member, axis=0)
            rise = optimal(others, tolerance=_TOLERANCE).loss - blend.loss
            without[member] = rise if rise > _LEAST_GAIN else 0.0
    return without


def rise_of_mixture(
    true_prob: NDArray[np.floating], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(m,): how much the log loss of the mixture of true_prob (m, N) with weights (m,) rises
    without each member, the others' weights scaled to 1; below 0 where it was in the way. Raises
    ValueError on fewer than two members."""
    _check_others(len(true_prob))
    whole = mixture(true_prob, weights)
    loss = log_loss_of_true(whole)
    rises = np.empty(len(weights))
    for member, weight in enumerate(weights):
        others = np.maximum(whole - weight * clipped(true_prob[member]), 0.0) / (1.0 - weight)
        rises[member] = log_loss_of_true(others) - loss
    return rises


def _check_others(count: int) -> None:
    if count < 2:
        raise ValueError("a blend of one member has nothing left without it")
