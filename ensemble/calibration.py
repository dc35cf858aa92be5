"""Which temperatures a blend keeps, and with them the method, by the cross-fitted loss.

Takes `MemberRows` and one or more methods; gives the `MethodChoice` with its `CalibrationChoice`,
and the fit on all rows. Source of the reliability diagram: Guo, Pleiss, Sun and Weinberger, On
Calibration of Modern Neural Networks, ICML 2017, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from foldrace.core.metrics import normalise
from foldrace.core.plugins import NO_PARTS, Parts
from foldrace.core.temperature import at_temperature, fit_temperature
from foldrace.ensemble.crossfit import CrossFitRows, crossfit_rows
from foldrace.ensemble.methods import AUTO, METHODS
from foldrace.ensemble.pool import MemberRows, Pool
from foldrace.ensemble.pooling import Fit, blend_prob
from foldrace.run_folder.blend_records import (
    Calibration,
    CalibrationTrial,
    MethodTrial,
    Reliability,
    ReliabilityBin,
)

_TIE = 1e-5
"""Losses closer than this, in nats, are equal: nobody can tell them apart, and a method that scales
by itself would otherwise get a temperature of 1.000."""


@dataclass(frozen=True, eq=False)
class CalibrationChoice:
    """The temperatures that are kept."""

    members: bool
    blend: bool
    crossfit: CrossFitRows
    """The cross-fitted loss with them."""
    record: Calibration


def choose_calibration(
    rows: MemberRows, fit: Callable[[Pool], Fit], enabled: bool = True
) -> CalibrationChoice:
    """Cross-fit with no temperature, one of the blend, one per member, and both; keep the best.

    The best has the least loss, on a tie the fewest temperatures. Without `enabled` only none is
    tried.
    """
    plain, blend = crossfit_rows(rows, fit, calibrated=False)
    tried = {(False, False): plain}
    if enabled:
        members, both = crossfit_rows(rows, fit, calibrated=True)
        tried |= {(False, True): blend, (True, False): members, (True, True): both}
    kept = _least(tried)
    return CalibrationChoice(*kept, tried[kept], _record(kept, tried))


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


def _least(tried: dict[tuple[bool, bool], CrossFitRows]) -> tuple[bool, bool]:
    """The least loss; of equal ones the first, tried in ascending number of temperatures.

    No margin for noise: asking for a paired gain of one standard error gave the higher held-out
    loss in 7 of 8 settings at 200 rows (digits, 8 or 20 members, greedy or their mean).
    """
    least = min(crossfit.loss for crossfit in tried.values())
    return next(kept for kept, crossfit in tried.items() if crossfit.loss <= least + _TIE)


def _record(kept: tuple[bool, bool], tried: dict[tuple[bool, bool], CrossFitRows]) -> Calibration:
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
    tried: tuple[MethodTrial, ...]
    """Empty where there was no choice."""


def methods_to_try(method: str, parts: Parts = NO_PARTS) -> tuple[str, ...]:
    """The method itself, or those of `auto`, the first of which wins a tie."""
    of_auto = tuple(name for name, row in parts[METHODS].items() if row.in_auto)
    return of_auto if method == AUTO else (method,)


def choose_method(
    rows: MemberRows,
    methods: Sequence[str],
    fit: Callable[[str, Pool], Fit],
    calibrate: bool = True,
) -> MethodChoice:
    """Cross-fit each method of `methods` and keep the best; fit(method, pool) is one fit."""
    choices = {
        method: choose_calibration(rows, partial(fit, method), calibrate) for method in methods
    }
    best = min(choices, key=lambda method: choices[method].crossfit.loss)
    tried = [
        MethodTrial(method=m, crossfit_logloss=c.crossfit.loss, crossfit_se=c.crossfit.se)
        for m, c in choices.items()
    ]
    return MethodChoice(best, choices[best], tuple(tried) if len(tried) > 1 else ())
