"""How far a blend can be from the best one: a bound that costs one pass over the members.

Takes true_prob (M, N) and weights (M,); gives the bound, or the `Blend` that carries it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensemble.blend import Blend, checked_members, checked_weights, clipped, mixture
from experiment.metrics import log_loss_of_true

_BLOCK = 1 << 18
"""Numbers converted to float64 at a time: 2 MiB, so that they stay in the cache."""


def certificate(true_prob: ArrayLike, weights: ArrayLike) -> float:
    """An upper bound on loss(weights) - min over the simplex of the loss, in nats, >= 0.

    With q = weights @ t, any other blend w' has loss(weights) - loss(w') = mean log(w' @ t / q)
    <= log mean(w' @ t / q) <= log max_m mean(t_m / q), by Jensen. The loss is convex and the bound
    is 0 at its minimum (Boyd and Vandenberghe 2004, 4.2.3). float64: float32 certifies to 2e-7.
    """
    members = checked_members(true_prob)
    return _bound(members, mixture(members, checked_weights(weights, len(members))))


def certified(
    true_prob: ArrayLike,
    weights: ArrayLike,
    path: Sequence[int] = (),
    path_losses: Sequence[float] = (),
) -> Blend:
    """The `Blend` of these weights, with its loss and certificate."""
    members = checked_members(true_prob)
    checked = checked_weights(weights, len(members))
    mixed = mixture(members, checked)
    loss = log_loss_of_true(mixed)
    return Blend(checked, loss, _bound(members, mixed), tuple(path), tuple(path_losses))


def _bound(members: NDArray[np.floating], mixed: NDArray[np.float64]) -> float:
    """log max_m mean_i(t_mi / q_i), for members (M, N) and mixed q (N,)."""
    step = max(1, _BLOCK // len(mixed))
    inverse = 1.0 / mixed
    peaks = [
        float((clipped(members[start : start + step]) @ inverse).max())
        for start in range(0, len(members), step)
    ]
    return max(0.0, math.log(max(peaks) / len(mixed)))
