"""What a member would add to a blend: the bounded gain of a step toward it.

Takes true-class probabilities of the member and of the blend on the same rows, gives mean and
standard error in nats a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ensemble.blend import clipped
from ensemble.kernels import backend_for, member_sums

STEP = 0.1
"""Weight of the member in the step."""
MOST_LOST = -math.log1p(-STEP) / STEP
"""Nats that a row can lose at most: the member gives its true class nothing."""


@dataclass(frozen=True)
class Gain:
    """Mean and standard error over `rows` rows, in nats a row."""

    mean: float
    se: float
    rows: int


def bounded_gain(true_prob: NDArray[np.floating], mixed: NDArray[np.floating]) -> Gain:
    """x_i = (log((1 - STEP) q_i + STEP t_i) - log q_i) / STEP for the member's t (n,) and the
    blend's q (n,), q > 0; to first order minus the slope of the blend's log loss toward the
    member, and bounded where q is tiny: one overconfident row cannot decide.

    The standard error is that of a mean of independent rows, sd (n - 1 in it) / sqrt(n). One row
    alone has no spread: its error is MOST_LOST, so that with z >= 1 it stops nobody.

    Raises ValueError on no rows, on other shapes, and where q is not positive.
    """
    if true_prob.shape != mixed.shape or true_prob.ndim != 1 or len(mixed) == 0:
        raise ValueError(
            f"the member has shape {true_prob.shape}, the blend {mixed.shape}, both should be (n,)"
        )
    if not mixed.min() > 0.0:
        row = int((~(mixed > 0.0)).argmax())
        raise ValueError(f"row {row}: the blend gives {mixed[row]}, should be above 0")
    gains = np.log1p(STEP * (clipped(true_prob) / mixed - 1.0)) / STEP
    rows = len(gains)
    se = float(gains.std(ddof=1)) / math.sqrt(rows) if rows > 1 else MOST_LOST
    return Gain(float(gains.mean()), se, rows)


def mean_gains(
    members: Sequence[NDArray[np.floating]], mixed: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(k,) the mean of `bounded_gain` of each member (n,) over the same blend (n,), without its
    error: mean_i (log(STEP) + log((1 / STEP - 1) q_i + t_i) - log q_i) / STEP, whose logarithms are
    those of products, and the last ones the same for all. Equal to 1e-10."""
    backend = backend_for(sum(len(member) for member in members))
    offset, only = (1.0 / STEP - 1.0) * mixed, np.zeros(1, dtype=np.intp)
    sums = [member_sums(member[None], backend).mean_logs(only, offset)[0] for member in members]
    level = math.log(STEP) - float(np.log(mixed).mean())
    return np.asarray((np.array(sums) + level) / STEP)
