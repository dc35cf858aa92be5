"""The honest loss of a blend method: weights chosen on the other folds, scored on this one.

Takes true_prob (M, N), the fold of each row and a method; gives the `CrossFit` loss with its
standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensemble.blend import Blend, checked_members, mixture
from experiment.metrics import row_losses

_PARTS = 5
_SEED = 0


@dataclass(frozen=True)
class CrossFit:
    """The log loss on rows that had no say in the weights."""

    loss: float
    """Pooled: the mean over all rows, not the mean of fold means."""
    se: float
    """Standard error of that mean over rows: sd of the row losses / sqrt(N), with the chosen
    weights taken as given."""
    fold_losses: tuple[float, ...]
    """The mean over the rows of each fold, in ascending order of the folds."""


def crossfit(
    true_prob: ArrayLike,
    folds: ArrayLike,
    method: Callable[[NDArray[np.floating]], Blend],
) -> CrossFit:
    """Cross-fits `method` on true_prob (M, N) over folds (N,) of integers.

    Rows of a single fold (`k: 1`) are split into 5 parts, the same ones on every call. Raises
    ValueError on wrong shapes or values, and on fewer than two rows.
    """
    members = checked_members(true_prob)
    fold_of_row = _at_least_two_folds(_checked_folds(folds, members.shape[1]))
    losses = np.empty(members.shape[1])
    names = np.unique(fold_of_row)
    for name in names:
        held = fold_of_row == name
        losses[held] = row_losses(mixture(members[:, held], method(members[:, ~held]).weights))
    return CrossFit(
        loss=float(losses.mean()),
        se=float(losses.std(ddof=1) / math.sqrt(len(losses))),
        fold_losses=tuple(float(losses[fold_of_row == name].mean()) for name in names),
    )


def _checked_folds(folds: ArrayLike, n_rows: int) -> NDArray[np.int64]:
    values = np.asarray(folds)
    if values.shape != (n_rows,):
        raise ValueError(f"folds have shape {values.shape}, should be ({n_rows},)")
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"folds have the type {values.dtype}, should be an integer type")
    if n_rows < 2:
        raise ValueError("one row cannot be cross-fitted: at least 2 are needed")
    return values.astype(np.int64, copy=False)


def _at_least_two_folds(folds: NDArray[np.int64]) -> NDArray[np.int64]:
    """The folds (N,) as they are, or a fixed random split if there is only one."""
    if (folds != folds[0]).any():
        return folds
    order = np.random.default_rng(_SEED).permutation(len(folds))
    parts = np.empty_like(folds)
    parts[order] = np.arange(len(folds)) % _PARTS
    return parts
