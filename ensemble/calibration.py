"""Which temperatures a blend keeps, and with them the method, by the cross-fitted loss.

Takes `MemberRows` and one or more methods; gives the `MethodChoice` with its `CalibrationChoice`,
and the fit on all rows. Source of the reliability diagram: Guo, Pleiss, Sun and Weinberger, On
Calibration of Modern Neural Networks, ICML 2017, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from foldrace.core.metrics import normalise, row_losses
from foldrace.core.plugins import NO_PARTS, Parts
from foldrace.core.temperature import at_temperature, fit_temperature
from foldrace.ensemble.crossfit import CrossFitRows, crossfit_rows, predictions_by_part
from foldrace.ensemble.methods import AUTO, METHODS
from foldrace.ensemble.pool import MemberRows, Pool
from foldrace.ensemble.pooling import Fit, blend_prob
from foldrace.ensemble.uncertainty import Groups, standard_error
from foldrace.run_folder.blend_records import (
    Calibration,
    CalibrationTrial,
    MethodTrial,
    Reliability,
    ReliabilityBin,
)

_Kind = tuple[bool, bool]
"""Whether there are temperatures of the members, and one of the blend."""
_PREFERRED = "geometric"
"""The method of `auto`, unless another one is better by more than chance: of those it tries it lost
least on most data (`benchmarks/generalisation.py`), and the least of several losses of few rows is
chance more often than not."""
_TIE = 1e-5
"""Losses closer than this, in nats, are equal: nobody can tell them apart, and a method that scales
by itself would otherwise get a temperature of 1.000."""


@dataclass(frozen=True, eq=False)
class CalibrationChoice:
    """The temperatures that are kept."""

    members: bool
    blend: bool
    crossfit: CrossFitRows
    """The cross-fitted loss with them: the least of those tried, and so optimistic."""
    record: Calibration
    tried: Mapping[_Kind, CrossFitRows]
    """Cross-fitted with each kind of temperatures."""

    def with_temperatures(self, members: bool, blend: bool) -> CalibrationChoice:
        """The same with other temperatures that were tried."""
        return _choice((members, blend), self.tried)


def choose_calibration(
    rows: MemberRows, fit: Callable[[Pool], Fit], enabled: bool = True
) -> CalibrationChoice:
    """Cross-fit with no temperature, one of the blend, one per member, and both; keep the best.

    The best has the least loss, on a tie the fewest temperatures. Without `enabled` only none is
    tried.
    """
    plain, blend = crossfit_rows(rows, fit, calibrated=False)
    tried: dict[_Kind, CrossFitRows] = {(False, False): plain}
    if enabled:
        members, both = crossfit_rows(rows, fit, calibrated=True)
        tried |= {(False, True): blend, (True, False): members, (True, True): both}
    return _choice(_least({kind: found.loss for kind, found in tried.items()}), tried)


def _choice(kept: _Kind, tried: Mapping[_Kind, CrossFitRows]) -> CalibrationChoice:
    return CalibrationChoice(*kept, tried[kept], _record(kept, tried), tried)


def final_fit(
    rows: MemberRows, fit: Callable[[Pool], Fit], choice: CalibrationChoice
) -> tuple[Fit, float, NDArray[np.float64]]:
    """Fit all rows with the kept temperatures.

    Gives the fit, the temperature of the blend (1: none) and the probabilities (N, C) of the blend
    on the rows it was fitted on, its temperature included.
    """
    pool = rows.pool(choice.members)
    chosen = fit(pool)
    prob = normalise(blend_prob(chosen, pool))
    if not choice.blend:
        return chosen, 1.0, prob
    log_prob = np.log(prob, out=prob)
    temperature = fit_temperature(log_prob, rows.labels)
    return chosen, temperature, np.exp(at_temperature(log_prob, temperature), dtype=np.float64)


def _least(losses: Mapping[_Kind, float]) -> _Kind:
    """The least loss; of equal ones the first, tried in ascending number of temperatures.

    No margin for noise: asking for a paired gain of one standard error gave the higher held-out
    loss in 7 of 8 settings at 200 rows (digits, 8 or 20 members, greedy or their mean).
    """
    least = min(losses.values())
    return next(kind for kind, loss in losses.items() if loss <= least + _TIE)


def _record(kept: _Kind, tried: Mapping[_Kind, CrossFitRows]) -> Calibration:
    before, after = tried[False, False], tried[kept]
    return Calibration(
        members=kept[0],
        blend=kept[1],
        tried=tuple(
            CalibrationTrial(
                members=members,
                blend=blend,
                crossfit_logloss=crossfit.loss,
                crossfit_se=crossfit.se,
            )
            for (members, blend), crossfit in tried.items()
        ),
        before=reliability(before.confidence, before.hits),
        after=reliability(after.confidence, after.hits),
    )


def reliability(
    confidence: NDArray[np.floating], hits: NDArray[np.bool_], bins: int = 15
) -> Reliability:
    """The diagram of confidence (n,) in [0, 1] and hits (n,), n at least 1.

    Bin b holds the rows with a confidence in (b / bins, (b + 1) / bins], the first also 0. All bins
    are given, so that the place of one tells its edges; one without rows has its middle as
    confidence and an accuracy of 0.
    """
    place = np.clip(np.ceil(confidence * bins).astype(np.intp) - 1, 0, bins - 1)
    rows = np.bincount(place, minlength=bins)
    sure = np.bincount(place, weights=confidence, minlength=bins)
    right = np.bincount(place, weights=hits, minlength=bins)
    return Reliability(
        ece=float(np.abs(sure - right).sum() / len(place)),
        bins=tuple(
            _bin(b, bins, int(rows[b]), float(sure[b]), float(right[b])) for b in range(bins)
        ),
    )


def _bin(place: int, bins: int, rows: int, sure: float, right: float) -> ReliabilityBin:
    if rows == 0:
        return ReliabilityBin(rows=0, confidence=(place + 0.5) / bins, accuracy=0.0)
    return ReliabilityBin(rows=rows, confidence=sure / rows, accuracy=right / rows)


@dataclass(frozen=True, eq=False)
class MethodChoice:
    """A method with its temperatures."""

    method: str
    calibration: CalibrationChoice
    crossfit: CrossFitRows
    """The cross-fitted loss whose rows had no say in method and temperatures either."""
    tried: tuple[MethodTrial, ...]
    """Empty where there was no choice."""
    choices: dict[str, CalibrationChoice]
    """Method -> its own choice, for all that were tried."""


def methods_to_try(method: str, parts: Parts = NO_PARTS) -> tuple[str, ...]:
    """The method itself, or those of `auto`."""
    of_auto = tuple(name for name, row in parts[METHODS].items() if row.in_auto)
    return of_auto if method == AUTO else (method,)


def choose_method(
    rows: MemberRows,
    methods: Sequence[str],
    fit: Callable[[str, Pool], Fit],
    calibrate: bool = True,
) -> MethodChoice:
    """Cross-fit each method of `methods` and keep the best; fit(method, pool) is one fit.

    The best: see `_PREFERRED`.
    """
    choices = {
        method: choose_calibration(rows, partial(fit, method), calibrate) for method in methods
    }
    losses = {
        method: {kind: row_losses(of.true_prob) for kind, of in choice.tried.items()}
        for method, choice in choices.items()
    }
    best, _ = _chosen(losses, rows.groups)
    tried = [
        MethodTrial(method=m, crossfit_logloss=c.crossfit.loss, crossfit_se=c.crossfit.se)
        for m, c in choices.items()
    ]
    honest = _chosen_on_other_parts(rows, choices, losses)
    shown = tuple(tried) if len(tried) > 1 else ()
    return MethodChoice(best, choices[best], honest, shown, choices)


_Losses = Mapping[str, Mapping[_Kind, NDArray[np.float64]]]
"""Method -> temperatures -> (N,) cross-fitted losses."""


def _chosen_on_other_parts(
    rows: MemberRows, choices: Mapping[str, CalibrationChoice], losses: _Losses
) -> CrossFitRows:
    """The predictions of each part by what is chosen on the other parts' cross-fitted losses.

    So a row has no say in the method and the temperatures that predict it. It had one in the
    weights that predict the other parts, of which it is one row in many: fitting all methods anew
    on each side without two parts would rule that out too, for 2 to 3 times the time. Source of the
    short way: Tsamardinos, Greasidou and Borboudakis, Bootstrapping the Out-of-sample Predictions
    for Efficient and Accurate Cross-validation, Machine Learning 2018; how far the figure is off
    `benchmarks/coverage.py` measures.
    """
    picked: list[CrossFitRows] = []
    for part in range(rows.n_parts):
        others = rows.parts != part
        groups = None if rows.groups is None else rows.groups[others]
        seen = {m: {k: of[others] for k, of in kinds.items()} for m, kinds in losses.items()}
        method, kind = _chosen(seen, groups)
        picked.append(choices[method].tried[kind])
    return predictions_by_part(rows, picked)


def _chosen(losses: _Losses, groups: Groups) -> tuple[str, _Kind]:
    """The method and its temperatures.

    Each method with the least loss that temperatures give it; then the preferred one, or the best
    of those whose loss is lower by more than a standard error of the difference, row by row.
    """
    kinds = {
        m: _least({k: float(of.mean()) for k, of in all_.items()}) for m, all_ in losses.items()
    }
    preferred = _PREFERRED if _PREFERRED in kinds else next(iter(kinds))
    of_preferred = losses[preferred][kinds[preferred]]
    best, least = preferred, 0.0
    for method, kind in kinds.items():
        change = losses[method][kind] - of_preferred
        mean = float(change.mean())
        if mean < least and -mean > standard_error(change, groups):
            best, least = method, mean
    return best, kinds[best]
