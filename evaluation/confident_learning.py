"""Confident learning: which labels are probably wrong, by out-of-fold probabilities.

Takes calibrated probabilities (n, C) by models that did not see the row, and labels (n,); gives a
`NoiseEstimate`. A class's threshold is the mean probability of it over the rows with its label; a
row is confidently of the most probable class whose threshold it reaches. Rows counted by label and
confident class, scaled to the labels' numbers, estimate which classes are taken for one another.
Source: Northcutt, Jiang and Chuang, Confident Learning: Estimating Uncertainty in Dataset Labels,
Journal of Artificial Intelligence Research 70, 2021.

A single label is suspected by the threshold's counterpart: another class is the most probable one,
and the label is hardly more probable than that class is on average of rows with other labels, so
that nothing in the image speaks for it. Weak models put many rows off the diagonal whose labels are
right; this asks for more (measured in `benchmarks/label_errors.py`, beside cleanlab's rules).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foldrace.core.metrics import CLIP

_LEAST_THRESHOLD = 2e-6
"""A class that its own rows are never given is not found everywhere."""
_ROUNDING = 1e-6
_HARDLY_MORE = 1.5
"""How often the mean of other rows a label's probability may be to be suspected. Chosen with
random forests on digits, hands and small photos, 5 % of the labels wrong: a higher precision than
cleanlab's default, and about as many of the errors."""


@dataclass(frozen=True, eq=False)
class NoiseEstimate:
    """What the probabilities say of the labels."""

    joint: NDArray[np.float64]
    """(C, C) estimated share of rows with a label (row) and a true class (column); sums to 1."""
    suspects: NDArray[np.int64]
    """Rows whose label is probably wrong, the most suspicious first."""
    suggested: NDArray[np.int64]
    """(n,) the most probable class other than the label, of every row."""

    @property
    def off_diagonal(self) -> float:
        """Share of rows that the joint puts into another class: wrong labels and overlap."""
        return float(1.0 - np.trace(self.joint))


def estimate_noise(prob: NDArray[np.float64], labels: NDArray[np.int64]) -> NoiseEstimate:
    """The joint of labels and true classes, and the rows whose labels nothing speaks for.

    Rows are ranked by log p(most probable class) - log p(label).
    """
    rows = np.arange(len(labels))
    counts = np.bincount(labels, minlength=prob.shape[1])
    joint = calibrated_joint(confident_counts(prob, labels), counts)
    own = prob[rows, labels]
    others = prob.copy()
    others[rows, labels] = -1.0
    best = others.max(axis=1)
    least = _HARDLY_MORE * counter_thresholds(prob, labels)
    suspects = np.flatnonzero((best > own) & (own < least[labels]))
    ratio = np.log(np.maximum(own, CLIP)) - np.log(np.maximum(best, CLIP))
    order = np.argsort(ratio[suspects], kind="stable")
    return NoiseEstimate(joint, suspects[order], others.argmax(axis=1).astype(np.int64))


def counter_thresholds(prob: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """(C,) mean probability of a class over the rows with other labels; 0 where there are none."""
    counts = np.bincount(labels, minlength=prob.shape[1])
    own = np.bincount(labels, prob[np.arange(len(labels)), labels], prob.shape[1])
    return np.asarray((prob.sum(axis=0) - own) / np.maximum(len(labels) - counts, 1))


def thresholds(prob: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """(C,) mean probability of a class over the rows with its label; 2 where there are none."""
    counts = np.bincount(labels, minlength=prob.shape[1])
    own = np.bincount(labels, prob[np.arange(len(labels)), labels], prob.shape[1])
    return np.where(counts > 0, np.maximum(own / np.maximum(counts, 1), _LEAST_THRESHOLD), 2.0)


def confident_classes(prob: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,) the class that a row confidently is of; -1 where it reaches no threshold."""
    reached = prob >= thresholds(prob, labels) - _ROUNDING
    best = np.where(reached, prob, -1.0).argmax(axis=1)
    return np.where(reached.any(axis=1), best, -1).astype(np.int64)


def confident_counts(prob: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """(C, C) rows by label and confident class; at least one on the diagonal."""
    n_classes = prob.shape[1]
    found = confident_classes(prob, labels)
    sure = found >= 0
    place = labels[sure] * n_classes + found[sure]
    counts = np.bincount(place, minlength=n_classes**2).reshape(n_classes, n_classes)
    np.fill_diagonal(counts, np.maximum(np.diagonal(counts), 1))
    return counts.astype(np.int64)


def calibrated_joint(
    counts: NDArray[np.int64], of_labels: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(C, C) the counts, each row scaled to the label's number of rows; sums to 1."""
    scaled = counts / counts.sum(axis=1, keepdims=True) * of_labels[:, None]
    return np.asarray(scaled / scaled.sum())
