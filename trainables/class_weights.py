"""Class weights by name: how much an image of each class counts in the training loss.

Takes the number of training rows of each class, gives one weight a class, 1 on average over the
training rows: the loss keeps its scale, and with it the learning rate its meaning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ClassWeights:
    """One row of the table."""

    name: str
    doc: str
    source: str
    function: Callable[[NDArray[np.float64], float], NDArray[np.float64]]
    """(P,) positive row counts and `class_weight_beta` -> (P,) weights of any scale."""


def _effective(counts: NDArray[np.float64], beta: float) -> NDArray[np.float64]:
    """(1 - beta) / (1 - beta^n); beta 0 weighs all classes alike."""
    with np.errstate(divide="ignore"):
        covered: NDArray[np.float64] = -np.expm1(counts * np.log(beta))  # 1 - beta^n
    return (1.0 - beta) / covered


CLASS_WEIGHTS: dict[str, ClassWeights] = {
    row.name: row
    for row in (
        ClassWeights(
            "none", "every image counts 1", "", lambda counts, beta: np.ones_like(counts)
        ),
        ClassWeights(
            "balanced", "every class counts alike: by inverse frequency",
            "King and Zeng, Logistic Regression in Rare Events Data, Political Analysis 2001",
            lambda counts, beta: 1.0 / counts,
        ),
        ClassWeights(
            "effective", "by the inverse effective number of images; see class_weight_beta",
            "Cui, Jia, Lin, Song and Belongie, Class-Balanced Loss Based on Effective Number of "
            "Samples, CVPR 2019",
            _effective,
        ),
    )
}  # fmt: skip


def class_weights(name: str, class_counts: NDArray[np.int64], beta: float) -> NDArray[np.float64]:
    """(C,) training rows of each class -> (C,) weights with sum_c n_c w_c = sum_c n_c. A class
    without a training row weighs 1: only smoothed targets ever reach it."""
    weights = np.ones(len(class_counts))
    present = class_counts > 0
    counts = class_counts[present].astype(np.float64)
    found = CLASS_WEIGHTS[name].function(counts, beta)
    weights[present] = found * counts.sum() / (found * counts).sum()
    return weights
