"""The honest loss of a blend method: chosen on the other parts of the rows, scored on this one.

Takes true_prob (M, N) with the fold of each row, or `MemberRows`, and a method; gives the
`CrossFit` loss with its standard error. Also the loss without each member, in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from foldrace.core.metrics import log_loss_of_true, normalise, row_losses
from foldrace.core.temperature import at_temperature, fit_temperature
from foldrace.ensemble.blend import Blend, checked_members, clipped, mixture
from foldrace.ensemble.pool import MemberRows, Pool, cross_fit_parts, take_rows
from foldrace.ensemble.pooling import Fit, blend_prob
from foldrace.ensemble.solvers.optimal import optimal
from foldrace.ensemble.uncertainty import Groups, standard_error


@dataclass(frozen=True)
class CrossFit:
    """The log loss on rows that had no say in the weights."""

    loss: float
    """Pooled: the mean over all rows, not the mean of fold means."""
    se: float
    """Standard error of that mean over rows (`standard_error`: over groups, where rows have some),
    with the chosen weights taken as given."""
    fold_losses: tuple[float, ...]
    """The mean over the rows of each part, in ascending order of the folds."""


@dataclass(frozen=True, eq=False)
class CrossFitRows(CrossFit):
    """A cross-fitted loss with what was predicted for each row."""

    true_prob: NDArray[np.float64]
    """(N,) probability of the true class."""
    confidence: NDArray[np.float64]
    """(N,) the highest probability."""
    hits: NDArray[np.bool_]
    """(N,) whether the class with the highest probability is the true one."""
    predicted: NDArray[np.int64]
    """(N,) the class with the highest probability."""


def crossfit(
    true_prob: ArrayLike,
    folds: ArrayLike,
    method: Callable[[NDArray[np.floating]], Blend],
) -> CrossFit:
    """Cross-fit `method` on true_prob (M, N) over folds (N,) of integers.

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
    """Cross-fit `fit`, as it is and with a temperature of the blend on top.

    calibrated: with the members' temperatures. All temperatures are those of the training side, the
    blend's one is fitted there to the blend's own probabilities.
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


def crossfit_single(rows: MemberRows) -> NDArray[np.float64]:
    """(N,) losses of the best single member: chosen, with its temperature, on the other parts."""
    losses = np.empty(len(rows.labels))
    for part in range(rows.n_parts):
        held = rows.parts == part
        columns = rows.calibrated[1 + part]
        alone = [log_loss_of_true(column[~held]) for column in columns]
        losses[held] = row_losses(columns[int(np.argmin(alone))][held])
    return losses


def predictions_by_part(rows: MemberRows, chosen: Sequence[CrossFitRows]) -> CrossFitRows:
    """The cross-fitted predictions of part k from chosen[k], scored as one."""
    taken = _Predictions(rows)
    for part, found in enumerate(chosen):
        taken.copy(rows.parts == part, found)
    return taken.scored()


class _Predictions:
    """The predictions for each row, filled part by part."""

    def __init__(self, rows: MemberRows) -> None:
        self._rows = rows
        count = len(rows.labels)
        self._true_prob, self._confidence = np.empty(count), np.empty(count)
        self._hits = np.empty(count, dtype=np.bool_)
        self._predicted = np.empty(count, dtype=np.int64)

    def add(self, held: NDArray[np.bool_], prob: NDArray[np.floating]) -> None:
        """prob: (n, C) of the n held rows."""
        labels = self._rows.labels[held]
        self._true_prob[held] = prob[np.arange(len(labels)), labels]
        self._confidence[held] = prob.max(axis=1)
        self._predicted[held] = prob.argmax(axis=1)
        self._hits[held] = self._predicted[held] == labels

    def copy(self, held: NDArray[np.bool_], of: CrossFitRows) -> None:
        """Take what another choice predicts of the held rows."""
        self._true_prob[held] = of.true_prob[held]
        self._confidence[held] = of.confidence[held]
        self._hits[held] = of.hits[held]
        self._predicted[held] = of.predicted[held]

    def scored(self) -> CrossFitRows:
        score = _score(self._true_prob, self._rows.parts, self._rows.groups)
        return CrossFitRows(*score, self._true_prob, self._confidence, self._hits, self._predicted)


def _score(
    true_prob: NDArray[np.float64], parts: NDArray[np.int64], groups: Groups = None
) -> tuple[float, float, tuple[float, ...]]:
    """Loss, its standard error and the loss of each part, from (N,) and (N,)."""
    losses = row_losses(true_prob)
    counts = np.bincount(parts)
    return (
        float(losses.mean()),
        standard_error(losses, groups),
        tuple(float(total) for total in np.bincount(parts, weights=losses) / counts),
    )


_TOLERANCE = 1e-7
"""Certificate of each blend of the others."""
_LEAST_GAIN = 1e-9
"""A smaller one is rounding."""
_MOST = 50
"""Most members to solve for; of more, the heaviest."""


def rise_of_least_loss(true_prob: NDArray[np.floating]) -> list[float | None]:
    """(m,) >= 0: rise of the least log loss without each member, the other weights chosen anew.

    From the least loss of a blend of true_prob (m, N), in nats; None beyond the 50 heaviest members
    of that blend. Raises ValueError on fewer than two members.
    """
    _check_others(len(true_prob))
    blend = optimal(true_prob, tolerance=_TOLERANCE)
    heaviest = np.argsort(-blend.weights, kind="stable")
    without: list[float | None] = [None] * len(true_prob)
    for place, member in enumerate(heaviest.tolist()):
        if blend.weights[member] == 0.0:  # the others do as well alone
            without[member] = 0.0
        elif place < _MOST:
            others = np.delete(true_prob, member, axis=0)
            rise = optimal(others, tolerance=_TOLERANCE).loss - blend.loss
            without[member] = rise if rise > _LEAST_GAIN else 0.0
    return without


def rise_of_mixture(
    true_prob: NDArray[np.floating], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(m,): rise of the log loss without each member, the other weights scaled to 1.

    From the loss of the mixture of true_prob (m, N) with weights (m,), in nats; below 0 where a
    member was in the way. Raises ValueError on fewer than two members.
    """
    _check_others(len(true_prob))
    whole = mixture(true_prob, weights)
    loss = log_loss_of_true(whole)
    rises = np.empty(len(weights))
    for member, weight in enumerate(weights):
        others = np.maximum(whole - weight * clipped(true_prob[member]), 0.0) / (1.0 - weight)
        rises[member] = log_loss_of_true(others) - loss
    return rises


def _check_others(count: int) -> None:
    if count < 2:
        raise ValueError("a blend of one member has nothing left without it")
