"""How far a blend can be from the best one: a bound that costs one pass over the members.

Takes true_prob (M, N) and weights (M,); gives the bound, or the `Blend` that carries it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensemble.blend import Blend, checked_members, checked_weights, mixture
from ensemble.kernels import Backend, MemberSums, member_sums
from experiment.metrics import log_loss_of_true


def certificate(true_prob: ArrayLike, weights: ArrayLike, backend: Backend | None = None) -> float:
    """An upper bound on loss(weights) - min over the simplex of the loss, in nats, >= 0.

    With q = weights @ t, any other blend w' has loss(weights) - loss(w') = mean log(w' @ t / q)
    <= log mean(w' @ t / q) <= log max_m mean(t_m / q), by Jensen. The loss is convex and the bound
    is 0 at its minimum (Boyd and Vandenberghe 2004, 4.2.3). float64: float32 certifies to 2e-7.
    """
    members = checked_members(true_prob)
    mixed = mixture(members, checked_weights(weights, len(members)))
    return _bound(member_sums(members, backend), mixed)


def certified(
    true_prob: ArrayLike,
    weights: ArrayLike,
    path: Sequence[int] = (),
    path_losses: Sequence[float] = (),
    sums: MemberSums | None = None,
) -> Blend:
    """The `Blend` of these weights, with its loss and certificate; `sums` are those of true_prob,
    where its values have been checked before."""
    sums = sums or member_sums(checked_members(true_prob))
    members = sums.members
    checked = checked_weights(weights, len(members))
    mixed = mixture(members, checked)
    loss = log_loss_of_true(mixed)
    return Blend(checked, loss, _bound(sums, mixed), tuple(path), tuple(path_losses))


def _bound(sums: MemberSums, mixed: NDArray[np.float64]) -> float:
    """log max_m mean_i(t_mi / q_i), for mixed q (N,)."""
    ratios = sums.mean_products(np.arange(len(sums.members)), 1.0 / mixed)
    return max(0.0, math.log(float(ratios.max())))
