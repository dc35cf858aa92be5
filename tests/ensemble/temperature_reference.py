"""The temperature by its definition: an array of soft targets and scipy's scalar minimiser.

Takes log-probabilities (n, C) and labels; shares no code with `foldrace.core.temperature`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

COLDEST, HOTTEST = 0.05, 20.0


def targets(log_prob: NDArray[np.floating], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n, C): 1 / (n + 1) of each row goes from the label to the likeliest other class."""
    rows, classes = log_prob.shape
    soft = np.eye(classes)[labels]
    if classes == 1:
        return soft
    for target, values, label in zip(soft, log_prob, labels, strict=True):
        runner_up = max((c for c in range(classes) if c != label), key=lambda c: values[c])
        target[label], target[runner_up] = rows / (rows + 1), 1 / (rows + 1)
    return soft


def smoothed_loss(log_prob: NDArray[np.floating], labels: NDArray[np.int64], beta: float) -> float:
    """Mean cross-entropy to the soft targets, nats, at the temperature 1 / beta."""
    return _cross_entropy(targets(log_prob, labels), log_prob, beta)


def smoothed_temperature(log_prob: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    """Of the least `smoothed_loss`."""
    return _least(targets(log_prob, labels), log_prob)


def plain_loss(log_prob: NDArray[np.floating], labels: NDArray[np.int64], beta: float) -> float:
    """Log loss of the rows alone, nats, at the temperature 1 / beta."""
    return _cross_entropy(np.eye(log_prob.shape[1])[labels], log_prob, beta)


def plain_temperature(log_prob: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    """Of the least log loss of the rows alone."""
    return _least(np.eye(log_prob.shape[1])[labels], log_prob)


def _least(soft: NDArray[np.float64], log_prob: NDArray[np.floating]) -> float:
    found = minimize_scalar(
        lambda beta: _cross_entropy(soft, log_prob, beta),
        bounds=(1 / HOTTEST, 1 / COLDEST),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return 1.0 / float(found.x)


def _cross_entropy(soft: NDArray[np.float64], log_prob: NDArray[np.floating], beta: float) -> float:
    scaled = log_softmax(log_prob.astype(np.float64) * beta, axis=1)
    return -float((soft * scaled).sum(axis=1).mean())
