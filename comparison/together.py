"""The mean of the runs' blends with the best weights, and what it would gain.

Takes a `Comparison`, gives weights and a cross-fitted loss: weights that minimise the log loss on
the other folds, scored on this one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from foldrace.comparison.differences import Difference, difference
from foldrace.comparison.sides import Comparison
from foldrace.core.metrics import row_losses
from foldrace.ensemble.blend import mixture
from foldrace.ensemble.pool import cross_fit_parts, take_rows
from foldrace.ensemble.solvers.optimal import optimal


@dataclass(frozen=True)
class Together:
    """The weighted mean of the probabilities of all runs' blends."""

    weights: tuple[float, ...]
    """Of each run, chosen on all shared images; they sum to 1."""
    loss: Difference
    """Cross-fitted log loss."""
    change: Difference
    """Cross-fitted loss less that of the best run alone; below 0 it is better."""
    best: str
    """Name of the run with the least loss."""


def together(comparison: Comparison) -> Together | None:
    """What the runs would score together; None where only one image is shared."""
    losses = np.stack([comparison.losses(side) for side in comparison.sides])  # (R, n)
    if losses.shape[1] < 2:
        return None
    columns = np.exp(-losses)
    parts = cross_fit_parts(comparison.fold, comparison.groups)
    held_prob = np.empty(len(parts))
    for part in range(int(parts.max()) + 1):
        held = parts == part
        weights = optimal(take_rows(columns, np.flatnonzero(~held))).weights
        held_prob[held] = mixture(take_rows(columns, np.flatnonzero(held)), weights)
    mixed = row_losses(np.minimum(held_prob, 1.0))
    best = int(losses.mean(axis=1).argmin())
    return Together(
        weights=tuple(optimal(columns).weights.tolist()),
        loss=difference(mixed, comparison.groups),
        change=difference(mixed - losses[best], comparison.groups),
        best=comparison.sides[best].name,
    )
