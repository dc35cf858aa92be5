"""The standard error of a metric, and of the difference of two on the same rows.

Takes a `Metric`, predictions and labels; gives a `Measured` value. A mean over rows has an error in
closed form; other metrics are computed on resampled rows, the same draws for everybody, so that
differences are paired. Where rows come in groups (several photos of one thing), whole groups are
resampled, and the closed form sums over them. Sources: Efron and Tibshirani, An Introduction to the
Bootstrap, 1993; groups: Cameron, Gelbach and Miller, Bootstrap-Based Improvements for Inference
with Clustered Errors, Review of Economics and Statistics 90, 2008.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from foldrace.core.metrics import (
    METRICS,
    Metric,
    MetricScore,
    UnfitMetric,
    metric_value,
    most_probable,
    normalise,
    read_only,
)
from foldrace.core.plugin_files import error_with_place
from foldrace.core.plugins import NO_PARTS, Parts

_log = logging.getLogger("foldrace")

_SEED = 0
_DRAWS = 200
"""The error of a standard error of so many draws is 5 % of it."""
_FEWEST, _MOST_NUMBERS = 20, 1 << 28
"""A metric of probabilities (n, C) gets fewer draws where n * C * draws is beyond the number."""

Predictions = NDArray[Any]
"""Classes (n,) or probabilities (n, C)."""
Groups = NDArray[np.integer]


@dataclass(frozen=True, eq=False)
class Measured:
    """A metric's value, and what its standard error is made of."""

    metric: Metric
    value: float
    rows: NDArray[np.float64] | None
    """(n,) values of the rows, whose mean `value` is; None for other metrics."""
    draws: NDArray[np.float64] | None
    """(B,) values on resampled rows."""
    groups: Groups | None

    @property
    def se(self) -> float | None:
        """The standard error of the value; None where nothing tells, as with a single group."""
        return self._error(self.rows, self.draws)

    def better_by(self, other: Measured) -> tuple[float, float | None]:
        """How far it is better than another on the same rows, and the paired standard error."""
        sign = 1.0 if self.metric.greater_is_better else -1.0
        rows = None if self.rows is None or other.rows is None else self.rows - other.rows
        draws = None if self.draws is None or other.draws is None else self.draws - other.draws
        return sign * (self.value - other.value), self._error(rows, draws)

    def is_better(self, other: Measured) -> bool:
        """Say whether it is better by more than a paired standard error."""
        gain, se = self.better_by(other)
        return se is not None and gain > se and gain > 0.0

    @property
    def score(self) -> MetricScore:
        """The value for a record."""
        return MetricScore(self.metric.name, self.value, self.metric.greater_is_better, self.se)

    def _error(
        self, rows: NDArray[np.float64] | None, draws: NDArray[np.float64] | None
    ) -> float | None:
        if rows is not None:
            return error_of_mean(rows, self.groups)
        return None if draws is None else float(draws.std(ddof=1))


def measure(
    metric: Metric,
    predictions: Predictions,
    labels: NDArray[np.int64],
    n_classes: int,
    groups: Groups | None = None,
) -> Measured:
    """The value of a metric with its uncertainty.

    `predictions` are classes (n,) where the metric is one of classes, else probabilities (n, C)
    whose rows sum to 1; `groups` (n,) are numbers that rows of one group share. Raises UnfitMetric
    where a user's own metric gives no finite number, and whatever it raises.
    """
    if metric.of_row is not None:
        rows = metric.of_row(predictions, labels)
        return Measured(metric, float(rows.mean()), rows, None, groups)
    if metric.of_classes is not None:
        predicted = most_probable(predictions)
        score = metric.of_classes
        draws = [
            score(labels, predicted, n_classes, weights)
            for weights in _row_counts(len(labels), groups, _DRAWS)
        ]
        value = score(labels, predicted, n_classes, None)
    else:
        value = metric_value(metric, predictions, labels)
        count = _MOST_NUMBERS // predictions.size
        draws = []
        for weights in _row_counts(len(labels), groups, min(_DRAWS, max(_FEWEST, count))):
            index = np.repeat(np.arange(len(labels)), weights)
            draws.append(metric_value(metric, predictions[index], labels[index]))
    known = len(labels) > 1 and (groups is None or len(np.unique(groups)) > 1)
    return Measured(metric, value, None, np.array(draws) if known else None, groups)


def error_of_mean(values: NDArray[np.float64], groups: Groups | None = None) -> float | None:
    """The standard error of the mean of values (n,); None for one row or one group alone.

    sd / sqrt(n), or with groups sqrt(G / (G - 1) * sum over groups of (sum of deviations)^2) / n.
    """
    deviations = values - values.mean()
    if groups is not None:
        _, place = np.unique(groups, return_inverse=True)
        deviations = np.bincount(place, weights=deviations)
    count = len(deviations)
    if count < 2:
        return None
    return math.sqrt(count / (count - 1) * float((deviations**2).sum())) / len(values)


def _row_counts(n_rows: int, groups: Groups | None, draws: int) -> Iterator[NDArray[np.int64]]:
    """How often each row counts (n,) in each draw of rows, or groups, with replacement."""
    rng = np.random.default_rng(_SEED)
    place = None if groups is None else np.unique(groups, return_inverse=True)[1]
    count = n_rows if place is None else int(place.max()) + 1
    for _ in range(draws):
        times = np.bincount(rng.integers(0, count, count), minlength=count)
        yield times if place is None else times[place]


def all_metrics(
    prob: ArrayLike,
    labels: NDArray[np.int64],
    parts: Parts = NO_PARTS,
    chosen: str = "",
    groups: Groups | None = None,
) -> tuple[MetricScore, ...]:
    """Every metric that is shown, also of the plugins, for prob (n, C), labels (n,).

    `chosen` is the user's `ensemble.metric`. One that fails or is not finite is left out, with a
    warning: a blend does not depend on it.
    """
    rows, classes = normalise(prob), read_only(labels)
    found: list[MetricScore] = []
    for metric in shown_metrics(parts, chosen):
        try:
            found.append(measure(metric, rows, classes, rows.shape[1], groups).score)
        except UnfitMetric as error:
            _log.warning("metric %s is left out: it %s", metric.name, error)
        except Exception as error:  # a user's own metric may raise anything
            _log.warning("metric %s is left out: %s", metric.name, error_with_place(error))
            _log.debug("metric %s failed", metric.name, exc_info=True)
    return tuple(found)


def shown_metrics(parts: Parts = NO_PARTS, chosen: str = "") -> list[Metric]:
    """The metrics of a report; one that takes classes in their order only where it is chosen."""
    return [m for m in parts[METRICS].values() if not m.is_ordinal or m.name == chosen]
