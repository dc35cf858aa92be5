"""Temperature scaling: one number per model, or one for the blend, that makes confidence honest.

Takes log-probabilities (n, C) and labels, gives temperatures: p ** (1 / T), renormalised; and the
log loss at a fitted one, by which everything is chosen. Source:
Guo, Pleiss, Sun and Weinberger, On Calibration of Modern Neural Networks, ICML 2017; the targets
are smoothed as in Platt, Probabilistic Outputs for Support Vector Machines, 1999. The search is
Newton's with shared passes: `scipy.optimize.minimize_scalar` took 3.5 times as long (33,000 x 396).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foldrace.core.metrics import CLIP, log_loss_of_true

LOG_CLIP = math.log(CLIP)
"""Log-probabilities below count as this one, as they do in the score: a stored zero is -inf in
float16, and one such row would decide the temperature alone."""
HOTTEST = 20.0
"""The highest temperature, near chance; the lowest is 1 / HOTTEST."""

_BLOCK = 1 << 15
"""Numbers worked on at a time: 128 KiB, so that they stay in the cache between operations."""
_SHORT = 64
"""Classes, fewer than which make a row short."""
_LAST_STEP = 3e-3
"""A Newton step this small, relative to 1 / T, is the last: it squares the error, to about 1e-5,
which costs some 1e-10 nats."""
_GRID = 1.05
"""Ratio of the 1 / T that fits on different rows have in common; from a neighbour on this grid one
Newton step is enough."""
_FLAT = 1e-9
"""A slope this small, in nats per unit of 1 / T, is none: HOTTEST times as much is to gain."""
_MAX_PASSES = 60
"""Several times what bisection alone needs."""

Slopes = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class _RowSlopes:
    """How the loss of each row changes with 1 / T."""

    at: Callable[[float], Slopes]
    """1 / T -> the first and the second derivative (n,)."""
    lead: NDArray[np.float64]
    """(n,) log-probability of the label less that of the best other class."""


def at_temperature(log_prob: NDArray[np.floating], temperature: float) -> NDArray[np.float32]:
    """(n, C) log-probabilities of p ** (1 / T), each at least LOG_CLIP.

    Rows of probabilities sum to 1.
    """
    scaled = _below_peak(log_prob)
    for rows in _blocks(scaled):
        block = scaled[rows]
        block *= np.float32(1.0 / temperature)
        block -= np.log(np.exp(block).sum(axis=1, keepdims=True))
        np.maximum(block, np.float32(LOG_CLIP), out=block)
    return scaled


def true_prob_at(
    log_prob: NDArray[np.floating], labels: NDArray[np.int64], temperature: float
) -> NDArray[np.float32]:
    """(n,) probability of the true class at the temperature, from log_prob (n, C)."""
    true = np.empty(len(labels), dtype=np.float32)
    for rows in _blocks(log_prob):
        block = _below_peak(log_prob[rows])
        block *= np.float32(1.0 / temperature)
        own = block[np.arange(len(block)), labels[rows]]
        true[rows] = own - np.log(np.exp(block, out=block).sum(axis=1))
    return np.exp(np.maximum(true, np.float32(LOG_CLIP)))


def fit_temperature(log_prob: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    """The temperature with the least log loss of log_prob (n, C) for labels (n,), n at least 1.

    One row more counts, whose label is the runner-up: n rows that are all right do not promise that
    the next one is, and certainty would pay for it without end. Photos, 200 rows, greedy: a
    held-out loss of 0.104, without that row 0.413, without temperatures 0.123.
    """
    every = np.ones(len(labels), dtype=np.bool_)
    return 1.0 / _minimum(_row_slopes(log_prob, labels), every)


def calibrated_log_loss(
    log_prob: NDArray[np.floating], labels: NDArray[np.int64], true_prob: NDArray[np.floating]
) -> float:
    """The score, in nats, of log_prob (n, C) for labels (n,) at the temperature that suits them.

    It is what a model's loss will be in a submission, whose temperatures are fitted, too.
    true_prob (n,) are the uncalibrated probabilities of the labels, whose own log loss stands where
    the fitted temperature would raise it. NaN where a number is not finite.
    """
    if not np.isfinite(log_prob).all():
        return math.nan
    fitted = true_prob_at(log_prob, labels, fit_temperature(log_prob, labels))
    return min(log_loss_of_true(true_prob), log_loss_of_true(fitted))


def part_temperatures(
    log_prob: NDArray[np.floating], labels: NDArray[np.int64], parts: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(1 + K,): [0] fitted on all rows (N, C), [1 + k] on the rows outside part k.

    The fits share their passes over the rows, yet none starts from what another found: a part
    would leave a trace in the temperature that is to be tested on it.
    """
    slopes = _row_slopes(log_prob, labels)
    sides = [parts >= 0, *(parts != k for k in range(int(parts.max()) + 1))]
    return 1.0 / np.array([_minimum(slopes, side) for side in sides])


def _minimum(slopes: _RowSlopes, rows: NDArray[np.bool_]) -> float:
    """The 1 / T with the least loss on the rows: Newton's method in a bracket that shrinks.

    The loss is convex in 1 / T; where the steps leave the bracket or do not halve, bisection. Long
    steps end on a fixed grid, where fits on other rows have passed or will.
    """
    n_rows = int(rows.sum())
    further = float(slopes.lead[rows].mean()) / (n_rows + 1)  # of the one row more
    low, high = 1.0 / HOTTEST, HOTTEST
    beta, step = 1.0, math.inf
    for _ in range(_MAX_PASSES):
        first, second = (float(values[rows].mean()) for values in slopes.at(beta))
        first += further
        if abs(first) <= _FLAT:
            break
        low, high = (beta, high) if first < 0 else (low, beta)
        target = beta - first / second if second > 0 else math.inf
        if not low < target < high or abs(target - beta) > step / 2:
            target = math.sqrt(low * high)
        near = _GRID ** round(math.log(target, _GRID))
        if low < near < high and near != beta:
            target = near
        beta, step = target, abs(target - beta)
        if step <= _LAST_STEP * beta:
            break
    return beta


def _row_slopes(log_prob: NDArray[np.floating], labels: NDArray[np.int64]) -> _RowSlopes:
    """E_p[x] - x_label and Var_p[x], with x a row's log-probabilities and p = softmax(x / T).

    Slopes that were computed are remembered.
    """
    below = _below_peak(log_prob)
    own = np.arange(len(labels)), labels
    true = below[own].astype(np.float64)

    @functools.cache
    def slopes(beta: float) -> Slopes:
        mean, square = np.empty(len(below)), np.empty(len(below))
        for rows in _blocks(below):
            mean[rows], square[rows] = _moments(below[rows], beta)
        return mean - true, square - mean * mean

    if below.shape[1] < 2:
        return _RowSlopes(slopes, np.zeros(len(below)))
    return _RowSlopes(slopes, true - _best_others(below, labels))


def _best_others(below: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n,) the highest of the other classes of rows (n, C), C at least 2."""
    best = np.empty(len(below))
    for rows in _blocks(below):
        block = below[rows].copy()
        block[np.arange(len(block)), labels[rows]] = -np.inf
        best[rows] = _row_max(block)
    return best


def _moments(below: NDArray[np.float32], beta: float) -> Slopes:
    """E_p[x] and E_p[x^2] (n,) of rows x (n, C) whose highest value is 0."""
    terms = np.exp(below * np.float32(beta))
    ones = np.ones(terms.shape[1], dtype=np.float32)
    total = np.einsum("nc,c->n", terms, ones).astype(np.float64)  # 4 times as fast as a row's sum
    terms *= below
    mean = np.einsum("nc,c->n", terms, ones) / total
    return mean, np.einsum("nc,nc->n", terms, below) / total


def _below_peak(log_prob: NDArray[np.floating]) -> NDArray[np.float32]:
    """A copy (n, C) of at least LOG_CLIP each, less the row's highest."""
    below: NDArray[np.float32] = np.maximum(log_prob, LOG_CLIP, dtype=np.float32)
    below -= _row_max(below)[:, None]
    return below


def _row_max(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n,) the highest of rows (n, C).

    Short rows are turned first: numpy takes 10 ns a number along them, and a fortieth of that along
    the columns.
    """
    turned = np.asfortranarray(rows) if rows.shape[1] < _SHORT else rows
    highest: NDArray[np.float32] = turned.max(axis=1)
    return highest


def _blocks(array: NDArray[np.floating]) -> Iterator[slice]:
    step = max(1, _BLOCK // array.shape[1])
    return (slice(start, start + step) for start in range(0, len(array), step))
