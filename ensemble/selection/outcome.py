"""The record of a blend that has been chosen.

Takes the fit, its calibration and prices; gives the `EnsembleRecord` and the text of
trajectory.csv.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foldrace.core.metrics import (
    accuracy,
    log_loss_of_true,
    normalise,
    row_losses,
    true_class_probability,
)
from foldrace.core.plugins import NO_PARTS, Parts
from foldrace.core.standard_errors import all_metrics, shown_metrics
from foldrace.ensemble.calibration import CalibrationChoice
from foldrace.ensemble.crossfit import (
    CrossFitRows,
    crossfit_single,
    rise_of_least_loss,
    rise_of_mixture,
)
from foldrace.ensemble.methods import METHODS
from foldrace.ensemble.pool import Member, MemberRows
from foldrace.ensemble.pooling import Fit
from foldrace.ensemble.selection.eligible import Prices
from foldrace.ensemble.selection.external import VARIANT
from foldrace.ensemble.selection.members import member_name
from foldrace.ensemble.single_members import members_that_win
from foldrace.ensemble.uncertainty import Groups, standard_error
from foldrace.run_folder.blend_records import (
    BeatenBy,
    CurvePoint,
    EnsembleRecord,
    MemberRecord,
    MethodTrial,
    MetricChoice,
    NearDuplicates,
    UnvalidatedRecord,
)

_EQUAL = 1e-12
"""Weights that differ by less are equal."""


@dataclass(frozen=True, eq=False)
class ChosenBlend:
    """A chosen combination and the members it was chosen from."""

    method: str
    methods_tried: tuple[MethodTrial, ...]
    rows: MemberRows
    fit: Fit
    choice: CalibrationChoice
    crossfit: CrossFitRows
    """Cross-fitted with all that was chosen."""
    temperature: float
    """Temperature of the blend."""
    prob: NDArray[np.float64]
    """(N, C) of the blend on the scored rows."""
    losses: NDArray[np.float64]
    """(M,) of each member alone, uncalibrated."""
    prices: Prices
    """Prices of the members that the fit uses, at least."""
    parts: Parts = NO_PARTS
    """The run's own methods and metrics."""
    metric_choice: MetricChoice | None = None
    """The last selection by the user's own metric; None: by log loss."""


@dataclass(frozen=True)
class ChoiceCounts:
    """Numbers of candidates and members that stood to choose from."""

    candidates: int
    without_weights: int
    """Members left out, since they could not predict."""


def record_of(
    blended: ChosenBlend,
    considered: ChoiceCounts,
    k: int,
    folds_hash: str,
    near: NDArray[np.int64] | None,
    duplicates: Sequence[tuple[Member, ...]],
    curve: Sequence[CurvePoint],
    unvalidated: Sequence[str],
) -> EnsembleRecord:
    """The content of `ensemble.json`.

    `k` is the number of folds, not of the parts that a single one is split into; `near` are the
    rows (indices into the N scored ones) with a near-duplicate image elsewhere, None where the
    images were never compared.
    """
    rows, fit, choice = blended.rows, blended.fit, blended.choice
    best = int(np.argmin(blended.losses))
    true_prob = true_class_probability(blended.prob, rows.labels)
    members = _members(blended)
    crossfit, single = blended.crossfit, crossfit_single(rows)
    gain = single - row_losses(crossfit.true_prob)
    return EnsembleRecord(
        method=blended.method,
        methods_tried=blended.methods_tried,
        pooling=fit.combiner.pooling,
        members=tuple(members),
        oof_logloss=log_loss_of_true(true_prob),
        mixture_logloss=None if fit.blend is None else fit.blend.loss,
        certificate=None if fit.blend is None else fit.blend.certificate,
        crossfit_logloss=crossfit.loss,
        crossfit_se=crossfit.se,
        single_crossfit_logloss=float(single.mean()),
        gain_over_single_se=standard_error(gain, rows.groups),
        k=k,
        best_single_oof_logloss=float(blended.losses[best]),
        best_single=member_name(rows.members[best]),
        best_single_calibrated_logloss=_best_calibrated(blended),
        oof_accuracy=float(accuracy(blended.prob, rows.labels)),
        metrics=all_metrics(
            blended.prob, rows.labels, blended.parts, _chosen(blended), rows.groups
        ),
        choice=blended.metric_choice,
        beaten=tuple(_beaten(blended)),
        blend_temperature=blended.temperature,
        calibration=choice.record,
        ms_per_image=_total([m.ms_per_image for m in members]),
        weight_bytes=_whole(_total([m.weight_bytes for m in members])),
        device=blended.prices.device,
        members_considered=len(rows.members),
        candidates_considered=considered.candidates,
        members_without_weights=considered.without_weights,
        folds_hash=folds_hash,
        curve=tuple(curve),
        duplicates=tuple(tuple(member_name(m) for m in same) for same in duplicates),
        near_duplicates=_near(true_prob, near, rows.groups),
        unvalidated=_equal_parts(unvalidated),
    )


def heaviest_first(fit: Fit) -> NDArray[np.intp]:
    """The members that count, in the order of `ensemble.json`.

    The combiner's arrays that lie beside it must have the same order.
    """
    weights = fit.combiner.weights[fit.used]
    return fit.used[np.argsort(-weights, kind="stable")]


def trajectory(members: Sequence[Member], fit: Fit) -> str:
    """The text of trajectory.csv: the member that came in at each round, and the loss after it.

    The rounds after the best prefix have a loss alone.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["round", "candidate", "variant", "oof_logloss", "run"])
    path, losses = (fit.blend.path, fit.blend.path_losses) if fit.blend else ((), ())
    for i, loss in enumerate(losses):
        picked = members[path[i]] if i < len(path) else Member("", "")
        writer.writerow([i + 1, picked.candidate, picked.variant, f"{loss:.9g}", picked.run])
    return buffer.getvalue()


def half_logs(prob: NDArray[np.float64]) -> NDArray[np.float16]:
    """(N, C) log-probabilities as `ensemble/oof.npy` keeps them."""
    return np.log(normalise(prob)).astype(np.float16)


def _chosen(blended: ChosenBlend) -> str:
    """The user's own metric, or nothing."""
    return "" if blended.metric_choice is None else blended.metric_choice.metric


def _beaten(blended: ChosenBlend) -> Iterator[BeatenBy]:
    """The metrics in which a member is better than a blend of several."""
    if len(blended.fit.used) < 2:
        return iter(())
    rows, choice = blended.rows, blended.metric_choice
    return members_that_win(
        rows,
        blended.prob,
        None if choice is None else choice.rule,
        shown_metrics(blended.parts, _chosen(blended)),
        lambda member: member_name(rows.members[member]),
        rows.groups,
    )


def _members(blended: ChosenBlend) -> list[MemberRecord]:
    """Records of the members used, with gains and prices."""
    rows, weights = blended.rows, blended.fit.combiner.weights
    used = blended.fit.used
    gains = dict(zip(used.tolist(), _gains(blended), strict=True))
    temperatures = rows.temperatures[0] if blended.choice.members else np.ones(len(rows.members))
    return [
        MemberRecord(
            candidate=rows.members[i].candidate,
            variant=rows.members[i].variant,
            run=rows.members[i].run,
            added=rows.members[i].variant == VARIANT,
            weight=float(weights[i]),
            temperature=float(temperatures[i]),
            oof_logloss=float(blended.losses[i]),
            gain=gains[i],
            ms_per_image=blended.prices.ms_per_image.get(rows.members[i]),
            weight_bytes=blended.prices.weight_bytes.get(rows.members[i]),
        )
        for i in heaviest_first(blended.fit).tolist()
    ]


def _best_calibrated(blended: ChosenBlend) -> float | None:
    if len(blended.choice.record.tried) < 2:  # nothing was to be calibrated
        return None
    return min(log_loss_of_true(column) for column in blended.rows.calibrated[0])


def _gains(blended: ChosenBlend) -> list[float | None]:
    """Gain of each member used, in ascending order; None where the blend is no mixture."""
    used, weights = blended.fit.used, blended.fit.combiner.weights[blended.fit.used]
    if blended.fit.blend is None or len(used) < 2:
        return [None] * len(used)
    true_prob = blended.rows.pool(blended.choice.members).true_prob[used]
    method = blended.parts[METHODS][blended.method]
    if not method.fits_weights and np.ptp(weights) < _EQUAL:
        return [*rise_of_mixture(true_prob, weights).tolist()]
    return rise_of_least_loss(true_prob)


def _near(
    true_prob: NDArray[np.float64], near: NDArray[np.int64] | None, groups: Groups
) -> NearDuplicates | None:
    if near is None:
        return None
    # What a group has in common leaks with any of its rows.
    alike = near if groups is None else np.flatnonzero(np.isin(groups, groups[near]))
    others = np.delete(true_prob, alike)
    loss = log_loss_of_true(others) if len(others) else None
    return NearDuplicates(rows=len(near), oof_logloss_without=loss)


def _equal_parts(names: Sequence[str]) -> tuple[UnvalidatedRecord, ...]:
    """Records of files without OOF rows: no score tells them apart, so all weigh alike."""
    weight = 1.0 / (1 + len(names))
    return tuple(UnvalidatedRecord(name=name, weight=weight) for name in names)


def _total(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
