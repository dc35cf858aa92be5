"""Temperature scaling: one number a member, or one for the blend, that makes confidence honest.

Takes log-probabilities (n, C) and labels, gives temperatures: p ** (1 / T), renormalised. Source:
Guo, Pleiss, Sun and Weinberger, On Calibration of Modern Neural Networks, ICML 2017.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def at_temperature(log_prob: NDArray[np.floating], temperature: float) -> NDArray[np.float32]:
    """(n, C) log-probabilities of p ** (1 / T), rows of probabilities sum to 1."""
    raise NotImplementedError


def fit_temperature(log_prob: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    """The temperature with the least log loss of log_prob (n, C) for labels (n,)."""
    raise NotImplementedError


def part_temperatures(
    log_prob: NDArray[np.floating], labels: NDArray[np.int64], parts: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(1 + K,): [0] fitted on all rows (N, C), [1 + k] on the rows outside part k."""
    raise NotImplementedError


def true_prob_at(
    log_prob: NDArray[np.floating], labels: NDArray[np.int64], temperature: float
) -> NDArray[np.float32]:
    """(n,) probability of the true class at the temperature, from log_prob (n, C)."""
    raise NotImplementedError
