"""Metrics of predicted classes, also of rows that count several times, as in a bootstrap.

Takes labels and predicted classes, (n,) each in 0..C-1, and how often each row counts; gives a
number. Source of the weighted kappa: Cohen, Weighted kappa: nominal scale agreement with provision
for scaled disagreement or partial credit, Psychological Bulletin 70, 1968.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Classes = NDArray[np.int64]
Weights = NDArray[np.number]
ClassScore = Callable[[Classes, Classes, int, Weights | None], float]
"""Labels (n,), predicted classes (n,), C, and how often each row counts (n,), None: once each."""


@dataclass(frozen=True, eq=False)
class ClassCounts:
    """Rows of each class, (C,)."""

    hits: NDArray[np.number]
    predicted: NDArray[np.number]
    actual: NDArray[np.number]

    @classmethod
    def of(
        cls, labels: Classes, predicted: Classes, n_classes: int, weights: Weights | None = None
    ) -> ClassCounts:
        """Count the rows."""
        right = labels == predicted
        of_hits = None if weights is None else weights[right]
        return cls(
            np.bincount(labels[right], of_hits, n_classes),
            np.bincount(predicted, weights, n_classes),
            np.bincount(labels, weights, n_classes),
        )

    @property
    def precision(self) -> NDArray[np.float64]:
        """(C,) 0 where a class is never predicted."""
        return _share(self.hits, self.predicted)

    @property
    def recall(self) -> NDArray[np.float64]:
        """(C,) 0 where a class never occurs."""
        return _share(self.hits, self.actual)

    @property
    def f1(self) -> NDArray[np.float64]:
        """(C,) 0 where a class neither occurs nor is predicted."""
        return _share(2 * self.hits, self.predicted + self.actual)


def _share(part: NDArray[np.number], whole: NDArray[np.number]) -> NDArray[np.float64]:
    return np.asarray(part / np.where(whole > 0, whole, 1), dtype=np.float64)


def accuracy_of(
    labels: Classes, predicted: Classes, n_classes: int, weights: Weights | None = None
) -> float:
    """Share of rows whose class is right."""
    return float(np.average(labels == predicted, weights=weights))


def macro_f1_of(
    labels: Classes, predicted: Classes, n_classes: int, weights: Weights | None = None
) -> float:
    """The mean F1 over the classes that occur in the labels or in the predictions."""
    counts = ClassCounts.of(labels, predicted, n_classes, weights)
    return float(counts.f1[counts.predicted + counts.actual > 0].mean())


def balanced_accuracy_of(
    labels: Classes, predicted: Classes, n_classes: int, weights: Weights | None = None
) -> float:
    """The mean recall over the classes that occur in the labels."""
    counts = ClassCounts.of(labels, predicted, n_classes, weights)
    return float(counts.recall[counts.actual > 0].mean())


def quadratic_kappa_of(
    labels: Classes, predicted: Classes, n_classes: int, weights: Weights | None = None
) -> float:
    """Cohen's kappa with quadratic weights, the classes in their order; 0 for one class alone.

    Squared distances need no table: 1 - sum (p - y)^2 / sum over all pairs (p_i - y_j)^2 / n.
    """
    y, p = labels.astype(np.float64), predicted.astype(np.float64)
    mean_y, mean_p = np.average(y, weights=weights), np.average(p, weights=weights)
    observed = np.average((p - y) ** 2, weights=weights)
    chance = (
        np.average((y - mean_y) ** 2, weights=weights)
        + np.average((p - mean_p) ** 2, weights=weights)
        + (mean_y - mean_p) ** 2
    )
    return float(1.0 - observed / chance) if chance > 0.0 else 0.0
