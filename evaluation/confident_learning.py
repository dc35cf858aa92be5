"""Confident learning: which labels are probably wrong, and how many, by out-of-fold probabilities.

Takes calibrated probabilities (n, C) by models that did not see the row, and labels (n,); gives a
`NoiseEstimate`. A class's threshold is the mean probability of it over the rows with its label; a
row is confidently of the most probable class whose threshold it reaches. Rows counted by label and
confident class, scaled to the labels' numbers, estimate how many rows of each label are truly of
each class. Source: Northcutt, Jiang and Chuang, Confident Learning: Estimating Uncertainty in
Dataset Labels, Journal of Artificial Intelligence Research 70, 2021.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_LEAST_THRESHOLD = 2e-6
"""A class that its own rows are never given is not found everywhere."""
_ROUNDING = 1e-6


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
    def wrong_share(self) -> float:
        """Estimated share of rows whose label is wrong."""
        return float(1.0 - np.trace(self.joint))


def estimate_noise(prob: NDArray[np.float64], labels: NDArray[np.int64]) -> NoiseEstimate:
    """The joint of labels and true classes, and the rows that it lets go ("by noise rate").

    Of each label i and other class j so many rows as are estimated to be truly of j, by their
    margin p(j) - p(i); rows are ranked by p(label), least first, then by that margin.
    """
    n_classes = prob.shape[1]
    counts = confident_counts(prob, labels)
    joint = calibrated_joint(counts, np.bincount(labels, minlength=n_classes))
    own = prob[np.arange(len(labels)), labels]
    others = prob.copy()
    others[np.arange(len(labels)), labels] = -1.0
    suggested = others.argmax(axis=1).astype(np.int64)
    suspects = np.flatnonzero(_by_noise_rate(prob, labels, joint))
    margin = others.max(axis=1) - own
    order = np.lexsort((-margin[suspects], own[suspects]))
    return NoiseEstimate(joint, suspects[order], suggested)


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


def _by_noise_rate(
    prob: NDArray[np.float64], labels: NDArray[np.int64], joint: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """(n,) rows of label i with the greatest margins to j, as many as are estimated to be of j."""
    wanted = np.rint(joint * len(labels)).astype(np.int64)
    np.fill_diagonal(wanted, 0)
    found = np.zeros(len(labels), dtype=np.bool_)
    for i in np.flatnonzero(wanted.sum(axis=1)):
        rows = np.flatnonzero(labels == i)
        for j in np.flatnonzero(wanted[i]):
            margin = prob[rows, j] - prob[rows, i]
            order = np.argsort(-margin, kind="stable")[: wanted[i, j]]
            found[rows[order]] = True
    return found
