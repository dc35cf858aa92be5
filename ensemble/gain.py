"""What a member would add to a blend: the bounded gain of a step toward it.

Takes true-class probabilities of the member and of the blend on the same rows, gives mean and
standard error in nats a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STEP = 0.1
"""Weight of the member in the step."""


@dataclass(frozen=True)
class Gain:
    """Mean and standard error over `rows` rows, in nats a row."""

    mean: float
    se: float
    rows: int


def bounded_gain(true_prob: NDArray[np.floating], mixed: NDArray[np.floating]) -> Gain:
    """x_i = (log((1 - STEP) q_i + STEP t_i) - log q_i) / STEP for the member's t (n,) and the
    blend's q (n,), q > 0; to first order minus the slope of the blend's log loss toward the
    member, and bounded where q is tiny: one overconfident row cannot decide."""
    raise NotImplementedError
