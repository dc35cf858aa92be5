"""The mean of the folds' blends, which is what is submitted, and the loss that it has.

Takes the log-probabilities (n, C) of each of K folds' blends; gives their geometric mean and, where
one fold's loss is known, the loss of the mean. With p_k the folds' probabilities at the blend's
temperature, the mean has log p(y) = mean_k log p_k(y) - log Z, Z = sum_c exp(mean_k log p_k(c)).
Z <= 1 by Hölder's inequality, and does not depend on the label y: so the mean's loss is the mean of
the folds' losses plus log Z, and how much the mean gains is known of images without labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foldrace.core.metrics import normalise
from foldrace.ensemble.uncertainty import Groups, standard_error


@dataclass(frozen=True, eq=False)
class FoldMean:
    """The geometric mean of the folds' blends on n images."""

    prob: NDArray[np.float64]
    """(n, C) probabilities, rows sum to 1."""
    log_z: NDArray[np.float64]
    """(n,) what the mean adds to a row's loss, whatever its label: 0 or less, 0 where the folds
    agree."""


def fold_mean(log_probs: Iterable[NDArray[np.floating]], temperature: float = 1.0) -> FoldMean:
    """The mean of the folds' log-probabilities (n, C), at least one, each at the temperature.

    One fold's at a time is in memory, and the sum.
    """
    total: NDArray[np.float64] | None = None
    of_folds = np.zeros(0)
    count = 0
    for log_prob in log_probs:
        logits = np.asarray(log_prob, dtype=np.float64) / temperature
        sums = _log_sum(logits)
        total, of_folds = (logits, sums) if total is None else (total + logits, of_folds + sums)
        count += 1
    if total is None:
        raise ValueError("no fold has predicted anything")
    mean = total / count
    log_sum = _log_sum(mean)
    prob = normalise(np.exp(mean - log_sum[:, None]))
    return FoldMean(prob, np.minimum(log_sum - of_folds / count, 0.0))


def _log_sum(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) log of the sum of exp of each row."""
    most = logits.max(axis=1)
    return np.asarray(most + np.log(np.exp(logits - most[:, None]).sum(axis=1)))


def loss_of_mean(
    loss: float, se: float, log_z: NDArray[np.float64], groups: Groups = None
) -> tuple[float, float]:
    """Log loss of the folds' mean and its standard error, from one fold's loss ± se and log Z (n,).

    The two terms are of different images, and so independent; `groups` (n,) are those of the
    images of log Z.
    """
    spread = standard_error(log_z, groups) if log_z.any() else 0.0
    return loss + float(log_z.mean()), math.hypot(se, spread)
