"""The honest loss of a blend method: chosen on the other parts of the rows, scored on this one.

Takes true_prob (M, N) with the fold of each row, or `MemberRows`, and a method; gives the
`CrossFit` loss with its standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensemble.blend import Blend, checked_members, mixture
from ensemble.calibrate import at_temperature, fit_temperature
from ensemble.fit import Fit, blend_prob
from ensemble.pool import MemberRows, Pool, cross_fit_parts, take_rows
from experiment.metrics import normalise, row_losses


@dataclass(frozen=True)
class CrossFit:
    """The log loss on rows that had no say in the weights."""

    loss: float
    """Pooled: the mean over all rows, not the mean of fold means."""
    se: float
    """Standard error of that mean over rows: sd of the row losses / sqrt(N), with the chosen
    weights taken as given."""
    fold_losses: tuple[float, ...]
    """The mean over the rows of each part, in ascending order of the folds."""


@dataclass(frozen=True, eq=False)
class CrossFitRows(CrossFit):
    """The same with what was predicted for each row."""

    true_prob: NDArray[np.float64]
    """(N,) probability of the true class."""
    confidence: NDArray[np.float64]
    """(N,) the highest probability."""
    hits: NDArray[np.bool_]
    """(N,) whether the class with the highest probability is the true one."""


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
    if np.shape(folds) != members.shape[1:]:
        raise ValueError(f"folds have shape {np.shape(folds)}, should be {members.shape[1:]}")
    parts = cross_fit_parts(folds)
    held_prob = np.empty(members.shape[1])
    for part in range(int(parts.max()) + 1):
        held = parts == part
        weights = method(take_rows(members, np.flatnonzero(~held))).weights
        held_prob[held] = mixture(take_rows(members, np.flatnonzero(held)), weights)
    return CrossFit(*_score(held_prob, parts))


def crossfit_rows(
    rows: MemberRows, fit: Callable[[Pool], Fit], calibrated: bool
) -> tuple[CrossFitRows, CrossFitRows]:
    """Cross-fits `fit`: as it is, and with a temperature of the blend on top.

    calibrated: with the members' temperatures. All temperatures are those of the training side,
    the blend's one is fitted there to the blend's own probabilities.
    """
    plain, tempered = _Predictions(rows), _Predictions(rows)
    for part in range(rows.n_parts):
        held = rows.parts == part
        chosen = fit(rows.training(part, calibrated))
        prob = normalise(blend_prob(chosen, rows.scored(part, calibrated)))
        plain.add(held, prob[held])
        log_prob = np.log(prob, out=prob)
        temperature = fit_temperature(log_prob[~held], rows.labels[~held])
        tempered.add(held, np.exp(at_temperature(log_prob[held], temperature)))
    return plain.scored(), tempered.scored()


class _Predictions:
    """What is predicted for each row, filled part by part."""

    def __init__(self, rows: MemberRows) -> None:
        self._rows = rows
        count = len(rows.labels)
        self._true_prob, self._confidence = np.empty(count), np.empty(count)
        self._hits = np.empty(count, dtype=np.bool_)

    def add(self, held: NDArray[np.bool_], prob: NDArray[np.floating]) -> None:
        """prob: (n, C) of the n held rows."""
        labels = self._rows.labels[held]
        self._true_prob[held] = prob[np.arange(len(labels)), labels]
        self._confidence[held] = prob.max(axis=1)
        self._hits[held] = prob.argmax(axis=1) == labels

    def scored(self) -> CrossFitRows:
        score = _score(self._true_prob, self._rows.parts)
        return CrossFitRows(*score, self._true_prob, self._confidence, self._hits)


def _score(
    true_prob: NDArray[np.float64], parts: NDArray[np.int64]
) -> tuple[float, float, tuple[float, ...]]:
    """Loss, its standard error and the loss of each part, from (N,) and (N,)."""
    losses = row_losses(true_prob)
    counts = np.bincount(parts)
    return (
        float(losses.mean()),
        float(losses.std(ddof=1) / math.sqrt(len(losses))),
        tuple(float(total) for total in np.bincount(parts, weights=losses) / counts),
    )
